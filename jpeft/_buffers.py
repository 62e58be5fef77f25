"""What a walk over a program is told and what it finds: compilers' habits, operands, buffers."""

from __future__ import annotations

import dataclasses

from jpeft._split import Split


@dataclasses.dataclass(frozen=True)
class Compiler:
    """What differs between compilers.

    **Attributes:** `narrow`, whether fp32 operands of products are multiplied as bf16, and kept so
    where nothing else reads them; `into_products`, whether elementwise work is fused into the
    products that read it; `pieces`, whether what a loop's step adds to its stacks stands beside
    them until the step ends; `recomputes`, whether costly functions too are computed by each reader
    anew, one element set in each row is a comparison with its place, fused as any, and a loop's
    steps make what is the same in all of them, where it is made of less.
    """

    narrow: bool = False
    into_products: bool = False
    pieces: bool = False
    recomputes: bool = False


# From what they make of training steps: the TPU's multiplies fp32 in bf16 by default.
COMPILERS = {
    "tpu": Compiler(narrow=True, into_products=True, recomputes=True),
    "cpu": Compiler(pieces=True),
    "gpu": Compiler(),
}


@dataclasses.dataclass(frozen=True)
class Operand:
    """What a program is given.

    **Attributes:** `piece`, a step's part of what a loop reads: it has a buffer only where work
    that is not fused reads it; `sharded`, it is a device's part, gathered where it is read;
    `parameter`, it stands for the whole step, so that a narrow copy of it is made once; `split`, by
    how many devices each axis of it is, gathered or not; None for none.
    """

    piece: bool = False
    sharded: bool = False
    parameter: bool = False
    split: Split | None = None


@dataclasses.dataclass
class Buffer:
    """Bytes from where they are made to where they are read last, by equation numbers."""

    size: int
    made: int
    last: int
    gathered: bool = False


@dataclasses.dataclass(frozen=True)
class Peak:
    """The most bytes at once, and what they are, at equation `at`.

    **Attributes:** `buffers`, by value; `gathered` and `working`, bytes inside the loop that runs
    there.
    """

    total: int = 0
    at: int = -1
    buffers: dict[int, Buffer] = dataclasses.field(default_factory=dict[int, Buffer])
    gathered: int = 0
    working: int = 0
