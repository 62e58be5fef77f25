"""Compiled programs read: collectives in every form in which XLA writes them, loops, costs."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sharding import make_mesh
from sharding._hlo import parse, runs
from sharding.costs import program_flops, traced_flops, traffic
from sharding.hlo import by_kind, collectives

MESH = make_mesh()
LAYERS, WIDTH = 4, 64


def program(body, before=""):
    return f"HloModule m\n\n{before}\n\nENTRY %main (p: f32[8,4]) -> f32[8,4] {{\n{body}\n}}\n"


P0 = "  %p = f32[8,4]{1,0} parameter(0)\n"


def only(text, **options):
    (found,) = collectives(text, **options)
    return found


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups={}", 8),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=8,'axis_2'=1] {'axis_1'}", 8),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", 4),
        ("replica_groups=mesh['a'=4,'b'=2] {'a':(1)2,'b'}", 4),
    ],
)
def test_groups_in_every_notation(groups, size):
    body = P0 + f"  ROOT %r = f32[8,4]{{1,0}} all-reduce(%p), channel_id=1, {groups}, to_apply=%add"
    found = only(program(body), devices=8)
    assert (found.kind, found.group, found.bytes, found.elements) == ("all-reduce", size, 128, 32)
    assert found.wire == pytest.approx(2 * 128 * (size - 1) / size)


def test_unknown_groups_are_not_guessed():
    body = P0 + "  ROOT %r = f32[8,4]{1,0} all-reduce(%p), replica_groups=new(3), to_apply=%add"
    with pytest.raises(ValueError, match="groups are written in a way"):
        collectives(program(body))


def test_a_start_and_its_done_are_one():
    body = (
        P0
        + "  %s = (f32[8,4]{1,0}, f32[64,4]{1,0}) all-gather-start(%p), replica_groups=[1,8]<=[8]\n"
        + "  ROOT %d = f32[64,4]{1,0} all-gather-done(%s)"
    )
    found = only(program(body))
    assert (found.kind, found.shape, found.operands) == ("all-gather", (64, 4), ((8, 4),))
    assert found.wire == 64 * 4 * 4 * 7 / 8


def test_a_wrapped_asynchronous_one_is_found_once():
    inner = (
        "%wrapped (q: f32[8,4]) -> f32[1,4] {\n  %q = f32[8,4]{1,0} parameter(0)\n"
        "  ROOT %rs = f32[1,4]{1,0} reduce-scatter(%q), replica_groups={{0,1,2,3,4,5,6,7}}\n}"
    )
    body = (
        P0
        + "  %s = ((f32[8,4]), f32[1,4], u32[]) async-start(%p), calls=%wrapped\n"
        + "  %u = ((f32[8,4]), f32[1,4], u32[]) async-update(%s), calls=%wrapped\n"
        + "  ROOT %d = f32[1,4]{1,0} async-done(%u), calls=%wrapped"
    )
    found = only(program(body, inner))
    assert (found.kind, found.bytes, found.times) == ("reduce-scatter", 128, 1)


def test_a_gather_spread_over_fusions_is_one():
    """As TPU programs have it: the same channel in its start, in a step, and in its end."""
    gather = (
        "f32[64,4]{1,0:T(8,128)S(1)} all-gather(%q), channel_id=5, replica_groups=[1,8]<=[8], "
        'frontend_attributes={chain_id="2"}'
    )

    def fused(name, end):
        return f"%{name} (q: f32[8,4]) -> f32[64,4] {{\n  %q = f32[8,4] parameter(0)\n{end}\n}}\n"

    target = 'custom-call(%g), custom_call_target="AsyncCollectiveStart"'
    start = fused("start", f"  %g = {gather}\n  ROOT %c = f32[64,4] {target}")
    others = [fused(name, f"  ROOT %g = {gather}") for name in ("step", "end")]
    calls = "\n".join(
        f"  %{name}.1 = f32[64,4] fusion(%p), kind=kCustom, calls=%{name}"
        for name in ("start", "step", "end")
    )
    found = only(program(P0 + calls, start + "".join(others)))
    assert (found.kind, found.computation, found.bytes) == ("all-gather", "start", 1024)


def test_a_fused_sum_of_which_a_part_is_kept_is_a_reduce_scatter():
    inner = (
        "%all-reduce-scatter.1 (q: f32[8,4]) -> f32[1,4] {\n  %q = f32[8,4]{1,0} parameter(0)\n"
        "  %a = f32[8,4]{1,0} all-reduce(%q), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add\n"
        "  ROOT %d = f32[1,4] dynamic-slice(%a), dynamic_slice_sizes={1,4}\n}"
    )
    body = P0 + "  ROOT %f = f32[1,4] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1"
    assert only(program(body, inner)).kind == "reduce-scatter"


def loop(condition, start=0, step=1, known=""):
    """A loop around an all-reduce whose counter is the tuple's first element."""
    return program(
        P0
        + f"  %zero = s32[] constant({start})\n"
        + "  %init = (s32[], f32[8,4]) tuple(%zero, %p)\n"
        + f"  %w = (s32[], f32[8,4]) while(%init), condition=%cond, body=%body{known}\n"
        + "  ROOT %o = f32[8,4] get-tuple-element(%w), index=1",
        "%cond (c: (s32[], f32[8,4])) -> pred[] {\n  %c = (s32[], f32[8,4]) parameter(0)\n"
        f"  %i = s32[] get-tuple-element(%c), index=0\n  %n = s32[] constant(12)\n"
        f"  ROOT %t = pred[] {condition}\n}}\n\n"
        "%body (b: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {\n"
        "  %b = (s32[], f32[8,4]) parameter(0)\n  %j = s32[] get-tuple-element(%b), index=0\n"
        f"  %x = f32[8,4] get-tuple-element(%b), index=1\n  %k = s32[] constant({step})\n"
        "  %next = s32[] add(%j, %k)\n"
        "  %y = f32[8,4] all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%add\n"
        "  ROOT %r = (s32[], f32[8,4]) tuple(%next, %y)\n}",
    )


@pytest.mark.parametrize(
    ("options", "times"),
    [
        ({}, 12),
        ({"start": 2}, 10),
        ({"step": 5}, 3),
        ({"known": ', backend_config={"known_trip_count":{"n":"7"}}'}, 7),
    ],
)
def test_trip_counts(options, times):
    found = only(loop("compare(%i, %n), direction=LT", **options))
    assert (found.times, found.loops, found.inside_loop) == (times, (times,), True)
    assert by_kind([found])["all-reduce"].bytes == 128 * times


def test_a_loop_whose_length_the_text_does_not_tell_says_so():
    found = only(loop("compare(%i, %i), direction=NE"))
    assert (found.times, found.loops) == (1, (None,))


def test_text_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="no program of XLA's"):
        collectives("func.func @main() {}")


def sharded(*spec):
    return NamedSharding(MESH, P(*spec))


def step(w, x):
    """Layers' weights, each gathered where it is used, over a batch that is split."""

    def layer(x, w):
        w = jax.lax.with_sharding_constraint(w, sharded())
        return x + jnp.tanh(x @ w), None

    return jnp.mean(jax.lax.scan(jax.checkpoint(layer), x, w)[0] ** 2)


def compiled():
    w = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32, sharding=sharded(None, "fsdp"))
    x = jax.ShapeDtypeStruct((16, WIDTH), jnp.float32, sharding=sharded("fsdp"))
    traced = jax.jit(jax.grad(step)).trace(w, x)
    return traced, traced.lower().compile().as_text()


def test_a_real_program_gathers_each_layer_twice_and_sums_its_gradient():
    traced, text = compiled()
    found = collectives(text, 8)
    totals = by_kind(found)
    weights = LAYERS * WIDTH * WIDTH
    assert totals["all-gather"].elements == 2 * weights
    assert totals["all-gather"].runs == 2 * LAYERS
    assert totals["all-reduce"].elements == weights
    assert {c.times for c in found if c.kind == "all-gather"} == {LAYERS}
    assert all(c.group == 8 for c in found)
    # Forward, forward again, and two products backward; nothing on two devices.
    assert traced_flops(traced.jaxpr) == 4 * 2 * 16 * weights
    assert program_flops(text) * 8 == traced_flops(traced.jaxpr)


def test_every_loop_is_multiplied_through():
    def nested(x):
        def outer(x, _):
            return jax.lax.fori_loop(0, 3, lambda i, x: x @ x, x), None

        return jax.lax.scan(outer, x, None, length=5)[0]

    x = jnp.zeros((8, 8))
    text = jax.jit(nested).lower(x).compile().as_text()
    assert traced_flops(jax.make_jaxpr(nested)(x)) == 15 * 2 * 8**3
    assert program_flops(text) == 15 * 2 * 8**3
    assert any(how.loops == (5, 3) for places in runs(parse(text)).values() for how in places)


def test_traced_products_convolutions_and_branches():
    a, b = jnp.zeros((3, 4, 5)), jnp.zeros((3, 5, 6))
    assert traced_flops(jax.make_jaxpr(jnp.matmul)(a, b)) == 2 * 3 * 4 * 5 * 6
    image, kernel = jnp.zeros((2, 8, 10, 10)), jnp.zeros((16, 8, 3, 3))

    def conv(x, k):
        return jax.lax.conv(x, k, (1, 1), "VALID")

    assert traced_flops(jax.make_jaxpr(conv)(image, kernel)) == 2 * 2 * 16 * 8 * 9 * 64

    def branch(p, x):
        return jax.lax.cond(p, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert traced_flops(jax.make_jaxpr(branch)(True, jnp.zeros((4, 4)))) == 2 * 2 * 64
    vmapped = jax.vmap(jax.jit(lambda x: x @ x))
    assert traced_flops(jax.make_jaxpr(vmapped)(jnp.zeros((7, 4, 4)))) == 7 * 2 * 64


def test_a_kernel_counts_as_often_as_its_grid_has_blocks():
    def kernel(a, b, out):
        out[...] = a[...] @ b[...]

    def product(a, b):
        left = pl.BlockSpec((16, 8), lambda i, j: (i, 0))
        right = pl.BlockSpec((8, 16), lambda i, j: (0, j))
        out = pl.BlockSpec((16, 16), lambda i, j: (i, j))
        shape = jax.ShapeDtypeStruct((64, 32), jnp.float32)
        call = pl.pallas_call(kernel, shape, grid=(4, 2), in_specs=[left, right], out_specs=out)
        return call(a, b)

    a, b = jnp.zeros((3, 64, 8)), jnp.zeros((3, 8, 32))
    assert traced_flops(jax.make_jaxpr(product)(a[0], b[0])) == 2 * 64 * 8 * 32
    assert traced_flops(jax.make_jaxpr(jax.vmap(product))(a, b)) == 3 * 2 * 64 * 8 * 32


@pytest.mark.parametrize(
    ("window", "shapes", "labels", "flops"),
    [
        # A product as a convolution over nothing: (2 x 16, 32) and (32, 8).
        ("{size=1}", ("2,16,32", "32,8,1", "2,16,8"), "0bf_io0->0bf", 2 * 2 * 16 * 32 * 8),
        # A batched product: of the window's three positions one counts at each place.
        (
            "{size=3 stride=2 lhs_dilate=3}",
            ("3,16,32", "3,32,8", "3,16,8"),
            "0bf_0io->0bf",
            2 * 3 * 16 * 32 * 8,
        ),
        # A plain one, with padding: 3 positions within, 2 at either edge.
        (
            "{size=3 pad=1_1}",
            ("1,5,4", "3,4,6", "1,5,6"),
            "b0f_0io->b0f",
            2 * (3 * 3 + 2 * 2) * 4 * 6,
        ),
    ],
)
def test_convolutions_of_tpu_programs(window, shapes, labels, flops):
    lhs, rhs, out = (f"f32[{s}]" for s in shapes)
    body = (
        f"  %l = {lhs} parameter(0)\n  %k = {rhs} parameter(1)\n"
        f"  ROOT %c = {out} convolution(%l, %k), window={window}, dim_labels={labels}"
    )
    assert program_flops(program(body)) == flops


def test_traffic_counts_slices_in_place_and_leaves_out_what_is_on_the_chip():
    n = 1024
    whole = f"f32[64,{n}]"
    inner = (
        f"%update (b: {whole}, s: f32[1,{n}], i: s32[]) -> {whole} {{\n"
        f"  %b = {whole} parameter(0)\n  %s = f32[1,{n}] parameter(1)\n  %i = s32[] parameter(2)\n"
        f"  ROOT %u = {whole} dynamic-update-slice(%b, %s, %i, %i)\n}}"
    )
    body = (
        f"  %p = {whole} parameter(0)\n  %i = s32[] parameter(1)\n"
        f"  %d = f32[1,{n}] dynamic-slice(%p, %i, %i), dynamic_slice_sizes={{1,{n}}}\n"
        f"  %e = f32[1,{n}]{{1,0:T(8,128)S(1)}} negate(%d)\n"
        f"  ROOT %f = {whole} fusion(%p, %e, %i), kind=kLoop, calls=%update"
    )
    row = 4 * n
    # The slice read and written, read again; the fusion reads i and writes a row.
    assert traffic(program(body, inner)) == 2 * row + row + (4 + row)


def test_traffic_of_loops_is_multiplied():
    def body(x, _):
        return jnp.sin(x), None

    def run(length):
        x = jnp.zeros((256, 256))
        f = jax.jit(lambda x: jax.lax.scan(body, x, None, length=length)[0])
        return traffic(f.lower(x).compile().as_text())

    size = 4 * 256**2
    assert (run(20) - run(10)) / 10 == pytest.approx(2 * size, rel=0.05)
    assert math.isfinite(run(1))
