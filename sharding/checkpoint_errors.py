"""What went wrong with a checkpoint: its files, or something that leaves them as they are."""

from __future__ import annotations

import re


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that is of something else."""


def is_damage(e: BaseException) -> bool:
    """Whether files are at fault, and not the caller, memory, or what the system refuses."""
    if e.__cause__ is not None and not is_damage(e.__cause__):
        return False
    if isinstance(e, (FileNotFoundError, NotADirectoryError, IsADirectoryError)):
        return True
    if isinstance(e, (CheckpointError, OSError, MemoryError)):
        return False
    # XLA and TensorStore put it in words: numbers are `errno`'s, but for those of the three above.
    return not re.search(r"RESOURCE_EXHAUSTED|os_error_code='(?!(2|20|21)')", str(e))
