"""A small sentiment task of this project's own: `train.tsv` and `dev.tsv`, text TAB label."""

import pathlib

SAMPLE = pathlib.Path(__file__).resolve().parent
