"""What a step costs: floating point operations, and bytes to and from memory.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs; a model whose
layers are scanned would come out as one layer. What is here multiplies by the loops' trip counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sharding._hlo import ArrayType, Instruction, Program, parameter_number, parse, runs
from sharding._program import opened, shape_of

# Instructions that move nothing: names for what is there already, or the loops' own frames.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *("while", "conditional", "call", "partition-id", "replica-id", "opt-barrier"),
}
_SLICES = {"dynamic-slice", "slice", "gather"}


def traced_flops(jaxpr: Any) -> float:
    """The flops of a traced function's products, over all devices; loops are multiplied, and
    Pallas kernels by their grids.

    A product of `(m, k)` and `(k, n)` is `2 m n k`. Only products and convolutions are counted; of
    branches the one that costs most; of a `while`, or an axis of a grid, whose length nobody knows,
    one pass. What `jax.checkpoint` computes again is in there.

    **Arguments:** `jaxpr`, of `jax.make_jaxpr` or `jax.jit(f).trace(...)`.
    """
    program, _ = opened(jaxpr)
    return sum(_equation(eqn) for eqn in program.eqns)


def _equation(eqn: Any) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs, out = shape_of(eqn.invars[0]), shape_of(eqn.outvars[0])
        return 2.0 * math.prod(out) * math.prod(lhs[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel, out = shape_of(eqn.invars[1]), shape_of(eqn.outvars[0])
        features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(out) * math.prod(kernel) / features
    if name == "ragged_dot_general" or name == "ragged_dot":
        return 2.0 * math.prod(shape_of(eqn.outvars[0])) * shape_of(eqn.invars[0])[-1]
    inner = [traced_flops(j) for value in params.values() for j in _programs(value)]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "pallas_call":
        grid = params["grid_mapping"].grid
        return math.prod(n for n in grid if isinstance(n, int)) * sum(inner)
    if name == "cond":
        return max(inner, default=0.0)
    if name == "shard_map":
        return params["mesh"].size * sum(inner)
    return (
        sum(inner) if name not in ("custom_jvp_call", "custom_vjp_call") else max(inner, default=0)
    )


def _programs(value: Any) -> list[Any]:
    """The programs in an equation's parameter."""
    if isinstance(value, tuple | list):
        return [j for x in value for j in _programs(x)]  # type: ignore[misc]
    return [value] if hasattr(opened(value)[0], "eqns") else []


def program_flops(text: str | Program) -> float:
    """The flops of the products in a compiled program, one device's; loops are multiplied.

    What it finds beside `traced_flops` over the number of devices is computed on several of them.
    Of products that a backend leaves to a library (`custom-call`) those of cuBLAS are seen.

    **Raises:** `ValueError` for text that is no program.
    """
    program = parse(text) if isinstance(text, str) else text
    total = 0.0
    for name, places in runs(program).items():
        here = sum(_product(i, program) for i in program.computations[name].values())
        total += here * sum(how.times for how in places)
    return total


def _product(i: Instruction, program: Program) -> float:
    cublas = i.op == "custom-call" and 'custom_call_target="__cublas$' in i.attributes
    if i.op == "dot" or cublas:
        lhs = program.operand_types(i)[0].shape
        summed = _contracted(i) if cublas else _dims("lhs_contracting_dims", i)
        return 2.0 * i.results[0].elements * math.prod(lhs[d] for d in summed)
    return _convolution(i, program) if i.op == "convolution" else 0.0


def _dims(name: str, i: Instruction) -> list[int]:
    found = re.search(name + r"=\{([\d,]*)\}", i.attributes)
    return [int(d) for d in found[1].split(",") if d] if found else []


def _contracted(i: Instruction) -> list[int]:
    """The axes of its first operand that a product of cuBLAS sums over."""
    found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', i.attributes)
    return [int(d) for d in re.findall(r"\d+", found[1])] if found else []


def _convolution(i: Instruction, program: Program) -> float:
    """As XLA counts: only where a position of the kernel lies on one of the input.

    Products of several axes are convolutions on TPUs, with axes of the batch as axes of a window
    of which one position at a time counts.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    lhs, rhs = (t.shape for t in program.operand_types(i)[:2])
    if labels is None:
        return 0.0
    left, right, out = labels[1], labels[2], labels[3]
    window = _window(i.attributes)
    pairs = 1
    for axis in sorted(set(left) & set("0123456789")):
        n = int(axis)
        pairs *= _pairs(
            lhs[left.index(axis)],
            rhs[right.index(axis)],
            i.results[0].shape[out.index(axis)],
            {key: values[n] for key, values in window.items() if n < len(values)},
        )
    shape = i.results[0].shape
    rows, features = shape[out.index("b")], shape[out.index("f")]
    return 2.0 * rows * features * rhs[right.index("i")] * pairs


def _window(attributes: str) -> dict[str, list[str]]:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    parts = (part.split("=") for part in (found[1].split() if found else []))
    return {key: values.split("x") for key, values in parts}


def _pairs(size: int, kernel: int, out: int, window: Mapping[str, str]) -> int:
    """How many pairs of an output's and a kernel's position read the input, along one axis."""
    stride = int(window.get("stride", "1"))
    spread, apart = int(window.get("lhs_dilate", "1")), int(window.get("rhs_dilate", "1"))
    low = int(window.get("pad", "0_0").split("_")[0])
    last = (size - 1) * spread
    return sum(
        0 <= at <= last and at % spread == 0
        for o in range(out)
        for at in (o * stride - low + k * apart for k in range(kernel))
    )


def traffic(text: str | Program) -> float:
    """Bytes that one device reads from and writes to its main memory in a step, loops multiplied.

    Each instruction reads its operands and writes its result; what a fusion makes inside of itself
    is not in memory, of an array that it only slices it reads the slice, and where it updates a
    slice in place it writes that. What the compiler keeps in on-chip memory is left out: TPU
    programs say so, others do not, and for those this is too much.

    **Raises:** `ValueError` for text that is no program.
    """
    program = parse(text) if isinstance(text, str) else text
    total = 0.0
    for name, places in runs(program).items():
        times = sum(how.times for how in places if not how.fused)
        if times:
            total += times * sum(_moved(i, program) for i in program.computations[name].values())
    return total


def _moved(i: Instruction, program: Program) -> float:
    if i.op in _FREE or i.op.endswith(("-done", "-update")):
        return 0.0
    operands = program.operands(i)
    results = i.results
    if i.op.endswith("-start") and len(results) > len(operands):
        results = results[len(operands) : 2 * len(operands)]  # operands come first among them
        if i.op == "copy-start":
            results = i.results[:1]
        if i.op == "slice-start":
            return sum(_in_memory(r) for r in results) + results[0].bytes
    if i.op in _SLICES:
        return 2.0 * sum(_in_memory(r) for r in results)
    if i.op == "dynamic-update-slice":
        return 2.0 * sum(_in_memory(r) for r in operands[1].results)
    if i.op == "fusion":
        return _fusion(i, operands, program)
    return float(
        sum(_in_memory(r) for r in results)
        + sum(_in_memory(t) for o in operands for t in o.results)
    )


def _in_memory(t: ArrayType) -> int:
    return t.bytes if t.space == 0 else 0


def _fusion(i: Instruction, operands: Sequence[Instruction], program: Program) -> float:
    inner = program.computations[i.called()["calls"][0]]
    numbers = {name: parameter_number(x) for name, x in inner.items()}
    parameters = {name: n for name, n in numbers.items() if n is not None}
    users: dict[str, list[Instruction]] = {name: [] for name in inner}
    for x in inner.values():
        for operand in x.operands:
            if operand in users:
                users[operand].append(x)

    def ends(name: str) -> list[tuple[Instruction, str]]:
        """What reads a value, past what only names it again, and by which name."""
        out: list[tuple[Instruction, str]] = []
        for user in users[name]:
            out += ends(user.name) if user.op == "bitcast" else [(user, name)]
        return out

    total = 0.0
    for name, number in parameters.items():
        if number >= len(operands) or not any(t.space == 0 for t in operands[number].results):
            continue
        readers = ends(name)
        for user, by in readers:
            if user.op in _SLICES and user.operands[0] == by:
                total += user.results[0].bytes
            elif not (user.op == "dynamic-update-slice" and user.operands[0] == by):
                total += sum(_in_memory(t) for t in operands[number].results)
                break
    root = next(x for x in inner.values() if x.root)
    made = [inner[n] for n in root.operands if n in inner] if root.op == "tuple" else [root]
    for x, result in zip(made, i.results, strict=False):
        source = x
        while source.op == "bitcast" and source.operands[0] in inner:
            source = inner[source.operands[0]]
        if result.space:
            continue
        if source.op == "dynamic-update-slice":
            total += inner[source.operands[1]].results[0].bytes
        else:
            total += result.bytes
    return total
