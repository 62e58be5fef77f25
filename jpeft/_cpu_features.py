"""What this machine's processor can do."""

from __future__ import annotations

import pathlib
import re

# Instructions that multiply bf16 and add in fp32: of x86 with AVX-512, and of Intel's tiles.
_SHORT = re.compile(r"^flags\s*:.*\b(avx512_bf16|amx_bf16)\b", re.M)


def multiplies_bf16(info: pathlib.Path = pathlib.Path("/proc/cpuinfo")) -> bool:
    """Whether it has instructions for products of bf16: about twice as fast as those of fp32.

    **Arguments:** `info`, what Linux says of it. Where there is no such file, it is taken to have
    none.
    """
    try:
        return _SHORT.search(info.read_text()) is not None
    except OSError:
        return False
