"""`lift`: what it leaves alone, what it adds, and every kind of control flow around a leaf."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft

PARAMS = {
    "w": jax.random.normal(jax.random.key(1), (6, 6)),
    "stack": jax.random.normal(jax.random.key(2), (3, 6, 6)) * 0.4,
    "bias": jnp.arange(6.0),
}
X = jax.random.normal(jax.random.key(3), (4, 6))


def plain(params, x):
    return jnp.tanh(x @ params["w"] + params["bias"])


def jitted(params, x):
    return jax.jit(plain)(params, x)


def nested_jit(params, x):
    return jax.jit(lambda w, x: jax.jit(jnp.matmul)(x, w))(params["w"], x)


def scanned(params, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), h.sum()), x, params["stack"])


def scan_constant(params, x):
    return jax.lax.scan(lambda h, _: (jnp.tanh(h @ params["w"]), None), x, length=3)[0]


def scan_carried(params, x):
    """The weight is part of the carry, handed on untouched (as graph states often are)."""

    def body(carry, _):
        w, h = carry
        return (w, jnp.tanh(h @ w)), h.mean()

    (w, h), means = jax.lax.scan(body, (params["w"], x), length=3)
    return h, means, h @ w


def scan_changed(params, x):
    """The weight is part of the carry and changes: it has to become dense."""
    (_, h), _ = jax.lax.scan(
        lambda c, _: ((c[0] * 0.5, c[1] @ c[0]), None), (params["w"], x), length=2
    )
    return h


def scan_reversed_unrolled(params, x):
    return jax.lax.scan(
        lambda h, w: (jnp.tanh(h @ w), h), x, params["stack"], reverse=True, unroll=2
    )


def scan_stacks_weight(params, x):
    """The body hands its slice of the weight out again, which stacks it."""
    _, ws = jax.lax.scan(lambda h, w: (h @ w, w), x, params["stack"])
    return x @ ws[1]


def while_loop(params, x):
    return jax.lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ params["w"])), (0, x)
    )[1]


def while_cond_reads(params, x):
    def going(c):
        return (c[0] < 50) & (jnp.abs(c[1] @ params["w"]).max() < 12)

    return jax.lax.while_loop(going, lambda c: (c[0] + 1, c[1] * 1.02), (0, x))


def fori(params, x):
    return jax.lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ params["stack"][i]), x)


def cond(params, x):
    return jax.lax.cond(x.sum() > 0, lambda h: h @ params["w"], lambda h: h @ params["w"].T, x)


def switch(params, x):
    branches = [lambda h, w, k=k: (h @ w) * (k + 1) for k in range(3)]
    return jax.lax.switch(jnp.argmax(x[0]) % 3, branches, x, params["w"])


def remat(params, x):
    return jax.checkpoint(plain)(params, x)


def remat_policy(params, x):
    policy = jax.checkpoint_policies.dots_saveable
    return jax.checkpoint(scanned, policy=policy)(params, x)[0]


@jax.custom_jvp
def doubled_slope(x, w):
    return jnp.sin(x @ w)


@doubled_slope.defjvp
def _doubled_slope_jvp(primals, tangents):
    out, out_dot = jax.jvp(lambda x, w: jnp.sin(x @ w), primals, tangents)
    return out, 2 * out_dot


def custom_jvp(params, x):
    return doubled_slope(x, params["w"])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def clipped(x, w, limit):
    return x @ w


clipped.defvjp(
    lambda x, w, limit: (x @ w, (x, w)),
    lambda limit, res, g: (
        jnp.clip(g @ res[1].T, -limit, limit),
        3.0 * jnp.clip(res[0].T @ g, -limit, limit),
    ),
)


def custom_vjp(params, x):
    return clipped(x, params["w"], 0.7)


def vmapped(params, x):
    return jax.vmap(lambda row: row @ params["w"] + params["bias"])(x)


def vmapped_weights(params, x):
    return jax.vmap(lambda w: jnp.tanh(x @ w))(params["stack"])


def grad_inside(params, x):
    return jax.grad(lambda x: plain(params, x).sum())(x)


def arranged(params, x):
    """Transposed, split, joined, sliced, cast: still the same weight."""
    w = params["w"]
    a = x @ w.T
    b = jnp.einsum("td,dnh->tnh", x, w.reshape(6, 2, 3))
    c = jnp.einsum("tnh,nhd->td", b, w.reshape(2, 3, 6))
    d = x[:, :3] @ w[:3, ::2]
    e = x @ w[None][0]
    f = (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)
    g = x @ params["stack"][1]
    h = x[:, 2:4] @ jax.lax.dynamic_slice(w, (x[0, 0].astype(int) * 0 + 2, 0), (2, 6))
    i = jnp.einsum("de,td->te", w, x)
    j = jnp.einsum("lde,td->tle", params["stack"], x)
    k = jnp.einsum("lde,ltd->lte", params["stack"], jnp.stack([x, x, x]))
    return a, b, c, d, e, f, g, h, i, j, k


def barrier(params, x):
    w, x = jax.lax.optimization_barrier((params["w"], x))
    return x @ w


def used_as_array(params, x):
    return (params["w"] ** 2).sum() + x @ (params["w"] + 1.0)


def keyword_static(params, x, *, deterministic=True, scale=2.0, name="gelu"):
    if not deterministic:
        x = x * 0
    return getattr(jax.nn, name)(x @ params["w"]) * scale


MODELS = [
    plain,
    jitted,
    nested_jit,
    scanned,
    scan_constant,
    scan_carried,
    scan_changed,
    scan_reversed_unrolled,
    scan_stacks_weight,
    while_loop,
    while_cond_reads,
    fori,
    cond,
    switch,
    remat,
    remat_policy,
    custom_jvp,
    custom_vjp,
    vmapped,
    vmapped_weights,
    grad_inside,
    arranged,
    barrier,
    used_as_array,
    keyword_static,
]
NOT_DIFFERENTIABLE = {while_loop, while_cond_reads, grad_inside}
LORA = jpeft.LoRA(
    rank=2, alpha=3.0, targets=(r"^w$", r"^stack$"), axes={"^w$": "io", "stack": "bio"}
)


def trained(lora=LORA, params=PARAMS):
    """A state in which every array has moved from where it started."""
    state = lora.init(jax.random.key(7), params)
    leaves, treedef = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(8), len(leaves))
    noise = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, noise)


def check_close(a, b, tolerance=1e-5):
    def compare(x, y):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * (1 + np.abs(y).max()))

    jax.tree.map(compare, a, b)


@functools.cache
def merged_and_plain(model):
    """What the model gives with merged weights, and as it is."""
    run = jax.jit(model)
    return run(jpeft.merge(LORA.rewrite(PARAMS, trained())), X), run(PARAMS, X)


@pytest.mark.parametrize("model", MODELS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("how", ["eager", "jit"])
def test_equals_the_merged_model(model, how):
    lifted = jpeft.lift(model)
    rewritten = LORA.rewrite(PARAMS, trained())
    out = (jax.jit(lifted) if how == "jit" else lifted)(rewritten, X)
    tolerance = 2e-2 if model is arranged else 1e-5  # one of its products is in bf16
    merged, plain_out = merged_and_plain(model)
    check_close(out, merged, tolerance)
    assert any(
        not np.allclose(a, b, atol=1e-3)
        for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(plain_out), strict=True)
    ), "the trained state changed nothing"


@pytest.mark.parametrize("model", MODELS, ids=lambda f: f.__name__)
def test_identity_at_init(model):
    rewritten = LORA.rewrite(PARAMS, LORA.init(jax.random.key(0), PARAMS))
    tolerance = 2e-2 if model is arranged else 1e-6  # one of its products is in bf16
    check_close(jax.jit(jpeft.lift(model))(rewritten, X), jax.jit(model)(PARAMS, X), tolerance)


@pytest.mark.parametrize(
    "model", [m for m in MODELS if m not in NOT_DIFFERENTIABLE], ids=lambda f: f.__name__
)
def test_gradients_equal_those_through_the_dense_weight(model):
    def loss(out):
        return sum(jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in jax.tree.leaves(out))

    state = trained()
    got = jax.jit(jax.grad(lambda s: loss(jpeft.lift(model)(LORA.rewrite(PARAMS, s), X))))(state)
    want = jax.jit(jax.grad(lambda s: loss(model(jpeft.merge(LORA.rewrite(PARAMS, s)), X))))(state)
    check_close(got, want, 5e-2 if model is arranged else 1e-4)
    assert any(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(got))


def test_forward_mode_uses_the_custom_rule():
    state = trained()
    tangent = jax.tree.map(jnp.ones_like, state)

    def run(apply):
        return jax.jvp(lambda s: apply(LORA.rewrite(PARAMS, s)), (state,), (tangent,))

    got = run(lambda p: jpeft.lift(custom_jvp)(p, X))
    check_close(got, run(lambda p: custom_jvp(jpeft.merge(p), X)), 1e-4)


def test_vmap_outside_over_adapters_and_over_inputs():
    states = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), trained())
    xs = jnp.stack([X, -X])
    got = jax.vmap(lambda s, x: jpeft.lift(scanned)(LORA.rewrite(PARAMS, s), x))(states, xs)
    for i in range(2):
        one = jax.tree.map(lambda x, i=i: x[i], states)
        want = scanned(jpeft.merge(LORA.rewrite(PARAMS, one)), xs[i])
        check_close(jax.tree.map(lambda y, i=i: y[i], got), want)


def test_jit_scan_grad_and_remat_outside():
    def loss(state, x):
        return jnp.mean(jpeft.lift(scanned)(LORA.rewrite(PARAMS, state), x)[0] ** 2)

    @jax.jit
    def steps(state):
        def step(state, x):
            value, grads = jax.value_and_grad(jax.checkpoint(loss))(state, x)
            return jax.tree.map(lambda p, g: p - 0.05 * g, state, grads), value

        return jax.lax.scan(step, state, jnp.stack([X] * 20))

    _, losses = steps(trained())
    assert losses[-1] < 0.8 * losses[0]
