"""How often words of a text stand together."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt16

# Places apart.
WINDOW = 5


def pairs_of(
    stream: UInt16[np.ndarray, " n"], size: int, window: int = WINDOW
) -> Float[np.ndarray, "v v"]:
    """How often two words stand at most `window` places apart, near ones counting for more."""
    table = np.zeros(size * size, np.float32)
    step = 2**22  # numbers at once, of 8 bytes
    for apart in range(1, window + 1):
        weight = (window + 1 - apart) / window
        left, right = stream[:-apart], stream[apart:]
        for at in range(0, len(left), step):
            both = left[at : at + step].astype(np.int64) * size + right[at : at + step]
            table += np.float32(weight) * np.bincount(both, minlength=len(table)).astype(np.float32)
    table = table.reshape(size, size)
    return table + table.T
