"""What `lift` does to the program: nothing without a leaf, the low-rank products with one."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jpeft
from jpeft import _compat
from tests.core.test_lift import (
    LORA,
    PARAMS,
    X,
    check_close,
    keyword_static,
    plain,
    scanned,
    trained,
)


def test_without_a_leaf_it_is_the_function_itself():
    calls = []

    def apply(params, x):
        calls.append(type(x))
        return x @ params["w"]

    text = str(jax.make_jaxpr(jpeft.lift(apply))(PARAMS, X))
    assert text == str(jax.make_jaxpr(apply)(PARAMS, X))
    jpeft.lift(apply)(PARAMS, np.ones((1, 6)))
    assert calls[-1] is np.ndarray, "an untouched call must not be traced"


def equations(jaxpr):
    """Every equation of a program, those of inner programs too."""
    program, _ = _compat.open_jaxpr(jaxpr)
    for eqn in program.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from equations(inner)


def primitives(jaxpr):
    names: dict[str, int] = {}
    for eqn in equations(jaxpr):
        names[eqn.primitive.name] = names.get(eqn.primitive.name, 0) + 1
    return names


def test_lora_adds_exactly_its_products():
    rewritten = LORA.rewrite(PARAMS, trained())
    before = primitives(jax.make_jaxpr(scanned)(PARAMS, X))
    after = primitives(jax.make_jaxpr(jpeft.lift(scanned))(rewritten, X))
    added = {k: n - before.get(k, 0) for k, n in after.items() if n != before.get(k, 0)}
    assert added == {"dot_general": 2, "mul": 1, "add": 1}


def test_a_leaf_that_is_not_read_adds_nothing():
    only_stack = jpeft.LoRA(rank=2, targets="stack", axes={"stack": "bio"})
    rewritten = only_stack.rewrite(PARAMS, trained(only_stack))
    before = primitives(jax.make_jaxpr(plain)(PARAMS, X))
    assert primitives(jax.make_jaxpr(jpeft.lift(plain))(rewritten, X)) == before


def test_no_full_size_sum_and_no_full_size_gradient_in_the_compiled_step():
    n, rank = 96, 4
    params = {"w": jnp.ones((n, n + 1))}
    lora = jpeft.LoRA(rank=rank, targets="w")
    x = jnp.ones((5, n))

    def step(params, state, x):
        return jax.value_and_grad(
            lambda s: jnp.sum(jpeft.lift(lambda p, x: x @ p["w"])(lora.rewrite(params, s), x) ** 2)
        )(state)

    state = lora.init(jax.random.key(0), params)
    compiled = jax.jit(step).lower(params, state, x).compile()
    full = f"f32[{n},{n + 1}]"
    made = [
        line
        for line in compiled.as_text().splitlines()
        if f"= {full}" in line and "parameter(" not in line
    ]
    assert made == []
    frozen = sum(v.size for v in jax.tree.leaves(params)) * 4
    assert compiled.memory_analysis().temp_size_in_bytes < frozen / 2


def test_named_scopes_survive():
    def model(params, x):
        with jax.named_scope("outer"):
            x = jnp.sin(x)
            with jax.named_scope("projection"):
                return x @ params["w"]

    rewritten = LORA.rewrite(PARAMS, trained())
    text = jax.jit(jpeft.lift(model)).lower(rewritten, X).as_text(debug_info=True)
    assert "outer/sin" in text
    assert "outer/projection/dot_general" in text


def test_donation_is_kept():
    inner = jax.jit(lambda w, x: x @ w, donate_argnums=1)
    rewritten = LORA.rewrite(PARAMS, trained())
    donated = jnp.array(X)
    jpeft.lift(lambda p, x: inner(p["w"], x))(rewritten, donated)
    assert donated.is_deleted()


def test_debug_callbacks_run():
    seen = []

    def model(params, x):
        y = x @ params["w"]
        jax.debug.callback(lambda v: seen.append(float(v)), y.sum())
        return y

    out = jax.jit(jpeft.lift(model))(LORA.rewrite(PARAMS, trained()), X)
    jax.effects_barrier()
    np.testing.assert_allclose(seen, [float(out.sum())], rtol=1e-5)


def test_static_and_keyword_arguments():
    rewritten = LORA.rewrite(PARAMS, trained())
    got = jpeft.lift(keyword_static)(rewritten, X, deterministic=False, scale=3.0, name="relu")
    want = keyword_static(jpeft.merge(rewritten), X, deterministic=False, scale=3.0, name="relu")
    check_close(got, want)


def test_leaf_as_a_keyword_and_returned():
    rewritten = LORA.rewrite(PARAMS, trained())
    out = jpeft.lift(lambda x, *, params: {"y": x @ params["w"], "same": params["w"]})(
        X, params=rewritten
    )
    assert jpeft.is_leaf(out["same"])
    check_close(jpeft.merge(out)["same"], jpeft.merge(rewritten)["w"])


def test_inner_shardings_are_kept():
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("d"))
    inner = jax.jit(lambda w, x: x @ w, in_shardings=(None, rows), out_shardings=rows)
    rewritten = LORA.rewrite(PARAMS, trained())
    out = jpeft.lift(lambda p, x: inner(p["w"], x))(rewritten, X)
    assert out.sharding.is_equivalent_to(rows, 2)
    check_close(out, X @ jpeft.merge(rewritten)["w"])


def test_a_primitive_without_a_rule_tells_once(caplog):
    def model(params, x):
        return jnp.sort(params["told"], axis=0) + x

    lora = jpeft.LoRA(rank=1, targets="told")
    rewritten = lora.rewrite(
        {"told": jnp.ones((4, 6))}, lora.init(jax.random.key(0), {"told": jnp.ones((4, 6))})
    )
    with caplog.at_level(logging.WARNING, "jpeft"):
        jpeft.lift(model)(rewritten, X)
        jpeft.lift(model)(rewritten, X)
    told = [r.message for r in caplog.records if "'told'" in r.message]
    assert len(told) == 1
    assert "sort" in told[0]


@jax.custom_vjp
def reversing(x, w, b):
    """A layer whose gradient is turned round on its way to `x`."""
    return x @ w + b


reversing.defvjp(
    lambda x, w, b: (reversing(x, w, b), (x, w)),
    lambda kept, g: (-(g @ kept[1].T), kept[0].T @ g, g.sum(0)),
)


def layer(params, x):
    return reversing(x, params["turned/w"], params["turned/b"])


TURNED = {"turned/w": jnp.ones((6, 8)), "turned/b": jnp.zeros(8)}


def test_an_adapter_in_a_function_with_a_derivative_of_its_own_is_told_of_once(caplog):
    adapter = jpeft.Adapter(2, "turned/b$", zero_up=True)
    rewritten = adapter.rewrite(TURNED, adapter.init(jax.random.key(0), TURNED))
    with caplog.at_level(logging.WARNING, "jpeft"):
        for _ in range(2):
            check_close(jpeft.lift(layer)(rewritten, X), layer(TURNED, X))
    told = [r.message for r in caplog.records if "'turned/b'" in r.message]
    assert len(told) == 1
    assert "read by 'reversing', which then has its body's derivative" in told[0]


def test_dropout_in_a_function_with_a_derivative_of_its_own_is_off_in_value_and_gradient(caplog):
    lora = jpeft.LoRA(2, 4.0, "turned/w$", dropout=0.5)
    state = trained(lora, TURNED)

    def loss(state, x, key):
        return jnp.sum(jpeft.lift(layer)(lora.rewrite(TURNED, state, key=key), x) ** 2)

    with caplog.at_level(logging.WARNING, "jpeft"):
        got = jax.value_and_grad(loss, (0, 1))(state, X, jax.random.key(1))
    want = jax.value_and_grad(loss, (0, 1))(state, X, None)
    jax.tree.map(check_close, got, want)
    told = [r.message for r in caplog.records if "'turned/w'" in r.message]
    assert "whose own derivative rule has the dense weight: without dropout" in told[0]


def test_a_site_without_a_rule_names_the_leaf_and_the_primitive():
    from jpeft.leaf import Site, register, static

    @register
    @dataclasses.dataclass(frozen=True)
    class Here(Site):
        base: object
        path: str = static("layer/bias")

        def specs(self, spec):
            return spec

    with pytest.raises(jpeft.LeafError, match=r"Here at 'layer/bias'.*'sin'"):
        jpeft.lift(jnp.sin)(Here(X))
    with pytest.raises(jpeft.LeafError, match="no array"):
        jpeft.merge({"a": Here(X)})
    with pytest.raises(jpeft.LeafError, match="scan"):
        jpeft.lift(lambda c: jax.lax.scan(lambda c, _: (c + 1, None), c, length=2))(Here(X))
