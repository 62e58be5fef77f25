"""How the axes of an array correspond across a reshape."""

from __future__ import annotations

from collections.abc import Sequence


def regroup(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The finest grouping of axes under which `reshape(old -> new)` keeps groups apart.

    **Returns:** pairs `(old axes, new axes)` in order, each of equal product. `(6, 4) -> (2, 3, 4)`
    gives `[((0,), (0, 1)), ((1,), (2,))]`. An axis of size 1 joins the group before it, or stands
    in a group with nothing on the other side.

    **Raises:** `ValueError` when the sizes differ.
    """
    groups: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        first_i, first_j = i, j
        left = right = 1
        if i < len(old) and j < len(new):
            left, right, i, j = old[i], new[j], i + 1, j + 1
            if left != right and 1 in (left, right):
                # One side has an extra axis of size 1 here: it stands alone.
                i, j = (i, j - 1) if left == 1 else (i - 1, j)
                left = right = 1
        elif i < len(old):
            left, i = old[i], i + 1
        else:
            right, j = new[j], j + 1
        while left != right:
            if left < right and i < len(old):
                left, i = left * old[i], i + 1
            elif right < left and j < len(new):
                right, j = right * new[j], j + 1
            else:
                raise ValueError(f"cannot reshape {tuple(old)} to {tuple(new)}")
        groups.append((tuple(range(first_i, i)), tuple(range(first_j, j))))
    return groups


def reshaped_kinds(kinds: str, old: Sequence[int], new: Sequence[int]) -> str | None:
    """One letter an axis, carried through a reshape; None where it would mix letters.

    An axis of size 1 that appears takes the letter of its neighbour before it.
    """
    out = ["?"] * len(new)
    for before, after in regroup(old, new):
        letters = {kinds[i] for i in before if old[i] != 1} or {kinds[i] for i in before}
        if len(letters) > 1:
            return None
        for j in after:
            out[j] = next(iter(letters), "")
    for j, letter in enumerate(out):
        if not letter:
            out[j] = out[j - 1] if j else (kinds[0] if kinds else "o")
    return "".join(out)
