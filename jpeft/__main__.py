"""`python -m jpeft`."""

import sys

from jpeft.cli import main

if __name__ == "__main__":
    sys.exit(main())
