"""What a device holds during a step, against what the compiler says, and by hand."""

import jax
import jax.numpy as jnp
import pytest

from sharding.timeline import timeline

TEXT = """HloModule step, is_scheduled=true, entry_computation_layout={()->f32[8]{0}}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %g = f32[32]{0} all-gather(%x), dimensions={0}, metadata={op_name="jit(step)/gather"}
  %y = f32[16]{0} fusion(%g), kind=kLoop, calls=%f
  %z = f32[8]{0} slice(%y), slice={[0:8]}
  ROOT %t = (s32[], f32[8]{0}) tuple(%next, %z)
}

%test (p: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[], f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %n = s32[] constant(3)
  ROOT %lt = pred[] compare(%i.1, %n), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %b = f32[8]{0} negate(%a)
  %init = (s32[], f32[8]{0}) tuple(%zero, %b)
  %loop = (s32[], f32[8]{0}) while(%init), condition=%test, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %out = f32[8]{0} get-tuple-element(%loop), index=1
  %c = f32[8]{0} negate(%out)
  ROOT %d = f32[8]{0} add(%c, %c)
}
"""


def kind(i):
    return "gathered" if i.op == "all-gather" else "rest"


def test_by_hand():
    moments = timeline(TEXT, kind, smallest=32)
    inside = [m for m in moments if m.loops]
    assert [m.loops for m in inside] == [(0,)] * 2 + [(1,)] * 2 + [(2,)] * 2
    # The loop's array, then with the gathered one, then with what it becomes.
    assert [dict(m.live) for m in inside[:2]] == [
        {"rest": 32, "gathered": 128},
        {"rest": 32 + 64, "gathered": 128},
    ]
    assert inside[0].source == "jit(step)/gather"
    # The loop's array is in its place until the last read of it.
    assert moments[0].total == 32
    assert moments[-1].name == "c"
    assert moments[-1].total == 64


def test_a_loop_that_does_not_tell_its_passes_is_refused():
    text = TEXT.replace('"known_trip_count":{"n":"3"}', "")
    text = text.replace("constant(3)", "add(%i.1, %i.1)")
    with pytest.raises(ValueError, match="how often the loop loop runs"):
        timeline(text, kind)


def test_it_bounds_what_the_compiler_takes():
    def loss(w, x):
        @jax.checkpoint
        def layer(x, w):
            return x + jnp.tanh(x @ w), None

        return jnp.sum(jax.lax.scan(layer, x, w)[0])

    w, x = jnp.ones((6, 128, 128)), jnp.ones((64, 128))
    compiled = jax.jit(jax.grad(loss)).lower(w, x).compile()
    high = max(m.total for m in timeline(compiled.as_text(), kind))
    taken = compiled.memory_analysis().temp_size_in_bytes
    assert taken < 1.05 * high
    assert high < 3 * taken
