"""Adapters in the format of loralib, the LoRA paper's own code: `lora_A` and `lora_B` by module."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jpeft._disk import CheckpointError
from jpeft.hf.adapter_names import Contents, Names, by_path, exact
from jpeft.hf.adapter_saved import read_whole
from jpeft.hf.names import Family
from jpeft.lora import Factors, LoRA
from jpeft.paths import by_pattern
from jpeft.transform import Params, Trainable, Transform, chain
from jpeft.uses import Uses


def load_loralib(
    path: str | pathlib.Path,
    params: Params,
    family: Family,
    *,
    alpha: float | int,
    parts: Mapping[str, tuple[int, tuple[int, ...]]] | None = None,
    uses: Uses | None = None,
) -> tuple[Transform, Trainable]:
    """A transform and its trained state from a safetensors file of `loralib.lora_state_dict`.

    `<module>.lora_A` is (rank, in), `.lora_B` (out, rank). The rank is read from the shapes. Other
    parameters in the file, such as biases or a head, become a `jpeft.Train` before the method.

    **Arguments:** `alpha`, as training had it, which the file does not say; `parts`, for loralib's
    `MergedLinear`, as `LoRA`'s: `{r"c_attn/kernel$": (3, (0, 2))}` for `enable_lora=[True, False,
    True]`; its A has the rows of all trained parts, its B (width of their parts, rank). `uses`, for
    tables of embeddings, as `load_adapter`'s.

    **Raises:** `CheckpointError` for a file that is absent, damaged or pickled, and with every
    missing, unexpected and misshapen tensor.

    Source: github.com/microsoft/LoRA, loralib/layers.py.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path} is not read (loading a pickle runs code): convert it with safetensors, "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'new.safetensors')"
        )
    names, contents = Names(family, params, uses), Contents(path, family)
    modules = [m for m in names.kernels if f"{m}.lora_A" in contents]
    if not modules:
        raise CheckpointError(f"{path} has no lora_A of a module of this model")
    parts = parts or {}
    state: dict[str, Factors] = {}
    ranks: dict[str, int] = {}
    for at, of in by_path(names, modules).items():
        names.refuse_tied(at)
        n, trained = by_pattern(parts, at, (1, (0,)))
        state[at], ranks[at] = _factors(names, contents, at, of, n, len(trained))
    others = {n: n for n in names.tensors if n in contents}
    saved = read_whole(names, contents, others)
    contents.finish()
    rank = max(ranks.values())
    method = LoRA(
        rank,
        float(alpha),
        tuple(exact(p) for p in state),
        rank_pattern={exact(p): r for p, r in ranks.items() if r != rank},
        axes={exact(p): "bio" for p in state if names.places[p].stacked},
        parts=parts,
    )
    if saved is None:
        return method, state
    return chain(saved[0], method), (saved[1], state)


def _factors(
    names: Names, contents: Contents, path: str, of: Mapping[int, str], n: int, trained: int
) -> tuple[Factors, int]:
    n_in, n_out = names.fans(path)
    widths = {contents.shape(f"{m}.lora_A")[0] for m in of.values()}
    if len(widths) > 1 or max(widths) % trained or n_out % n:
        raise CheckpointError(
            f"lora_A of '{path}' has {sorted(widths)} rows in its layers: one rank of {trained} "
            "parts is read"
        )
    width = widths.pop()
    rank, outputs = width // trained, n_out // n * trained
    a = np.zeros((len(names.layers(path)), n_in, width), np.float32)
    b = np.zeros((len(names.layers(path)), width, n_out // n), np.float32)
    for i, module in of.items():
        a[i] = contents.take(f"{module}.lora_A", (width, n_in)).T
        # (parts of the output, rank) to (parts of the rank, output of one part).
        rows = contents.take(f"{module}.lora_B", (outputs, rank))
        b[i] = rows.reshape(trained, -1, rank).swapaxes(1, 2).reshape(width, -1)
    if not names.places[path].stacked:
        a, b = a[0], b[0]
    return Factors(jnp.asarray(a), jnp.asarray(b), None, names.axes(path)), rank
