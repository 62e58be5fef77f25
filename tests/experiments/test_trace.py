"""Where a step's time goes, by kind of operation."""

import jax
import jax.numpy as jnp

from experiments.common import trace


def test_the_kinds_of_a_trace_add_up():
    events = [(0.0, 4.0, "matrix products"), (2.0, 4.0, "copies"), (6.0, 8.0, "attention")]
    found = trace.shares(events)
    assert found["matrix products"] == 3
    assert found["copies"] == 1
    assert found["idle"] == 2
    assert sum(found.values()) == 8
    assert sum(trace.shares([]).values()) == 0


def test_kinds_of_operations():
    def run(x, w):
        y = jnp.tanh(x @ w)
        return jnp.einsum("btd,bsd->bts", y, y).sum()

    x, w = jnp.ones((2, 8, 4)), jnp.ones((4, 4))
    kinds = trace.kinds_of(jax.jit(run).lower(x, w).compile().as_text())
    assert {"matrix products", "attention", "element-wise"} <= set(kinds.values())
    assert trace.by_name("sm90_xmma_gemm_bf16") == "matrix products"
    assert trace.by_name("cudnn_fmha_forward") == "attention"
    assert trace.by_name("MemcpyD2D") == "copies"
    assert trace.by_name("loop_add_fusion") == "element-wise"
