"""LoRA's own options, its counts and errors, and parity with HF PEFT."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jpeft
from jpeft.leaf import dense
from jpeft.lowrank import LowRank
from tests.core.drawn import drawn, normal

W = jax.random.normal(jax.random.key(1), (6, 8))
X = jax.random.normal(jax.random.key(2), (4, 6))


def matmul(params, x):
    return x @ params["w"]


def filled(state, seed=3):
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten(
        [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


def test_starting_values():
    state = jpeft.LoRA(4, 8.0, "w$").init(jax.random.key(0), {"w": W})["w"]
    assert state.a.shape == (6, 4)
    assert state.b.shape == (4, 8)
    bound = 1 / np.sqrt(6)
    assert np.abs(state.a).max() <= bound
    assert np.abs(state.a).max() > 0.7 * bound
    assert not np.any(state.b)
    table = jpeft.LoRA(4, 8.0, "embedding$").init(jax.random.key(0), {"embedding": W})["embedding"]
    assert not np.any(table.a)
    assert 0.6 < float(table.b.std()) < 1.4


def test_each_path_has_its_own_start_whatever_else_is_matched():
    both = {"one": {"w": W}, "two": {"w": W}}
    state = jpeft.LoRA(2, 4.0, "w$").init(jax.random.key(0), both)
    assert not np.array_equal(state["one/w"].a, state["two/w"].a)
    alone = jpeft.LoRA(2, 4.0, "two/w$").init(jax.random.key(0), both)
    np.testing.assert_array_equal(alone["two/w"].a, state["two/w"].a)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_scale(rslora, scale):
    method = jpeft.LoRA(4, 8.0, "w$", rslora=rslora)
    state = filled(method.init(jax.random.key(0), {"w": W}))
    got = jpeft.merge(method.rewrite({"w": W}, state))["w"]
    np.testing.assert_allclose(got, W + scale * state["w"].a @ state["w"].b, rtol=1e-5, atol=1e-5)


def test_patterns_of_rank_and_alpha():
    both = {"one": {"w": W}, "two": {"w": W}}
    method = jpeft.LoRA(4, 8.0, "w$", rank_pattern={"^two": 1}, alpha_pattern={"^one": 2.0})
    state = method.init(jax.random.key(0), both)
    assert state["one/w"].a.shape == (6, 4)
    assert state["two/w"].a.shape == (6, 1)
    assert method.scale("one/w") == 0.5
    assert method.scale("two/w") == 8


def test_dora_is_the_paper_formula_with_a_detached_norm():
    method = jpeft.LoRA(2, 4.0, "w$", dora=True)
    state = method.init(jax.random.key(0), {"w": W})
    np.testing.assert_allclose(state["w"].magnitude, jnp.linalg.norm(W, axis=0), rtol=1e-6)
    state = filled(state)

    def formula(f, x):
        v = W + 2 * f.a @ f.b
        norm = jax.lax.stop_gradient(jnp.linalg.norm(v, axis=0))
        return jnp.sum((x @ (f.magnitude * v / norm)) ** 2)

    def ours(f, x):
        return jnp.sum(jpeft.lift(matmul)(method.rewrite({"w": W}, {"w": f}), x) ** 2)

    np.testing.assert_allclose(ours(state["w"], X), formula(state["w"], X), rtol=1e-5)
    got, want = (jax.grad(f)(state["w"], X) for f in (ours, formula))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("weight", ["ioe", "ieo", "oie", "eio"])
@pytest.mark.parametrize("shape", [(3, 3, 3), (2, 3, 4)])
def test_dora_of_experts_stored_along_any_axis(weight, shape):
    sizes = dict(zip("eio", shape, strict=True))
    params = {"w": jax.random.normal(jax.random.key(1), [sizes[c] for c in weight])}
    x = jax.random.normal(jax.random.key(2), (5, sizes["e"], sizes["i"]))

    def apply(params, x):
        return jnp.einsum(f"bei,{weight}->boe", x, params["w"])

    method = jpeft.LoRA(2, 4.0, "w$", dora=True)
    state = method.init(jax.random.key(0), params, uses=jpeft.uses(apply, params, x))
    forward = jpeft.lift(apply)
    start = forward(method.rewrite(params, state), x)
    np.testing.assert_allclose(start, apply(params, x), rtol=1e-5, atol=1e-5)
    f = filled(state)["w"]
    v = params["w"] + 2 * jnp.einsum(f"eir,ero->{weight}", f.a, f.b)
    inputs = weight.index("i")
    norm = jnp.linalg.norm(v, axis=inputs, keepdims=True)
    want = jnp.expand_dims(f.magnitude, inputs) * v / norm
    rewritten = method.rewrite(params, {"w": f})
    np.testing.assert_allclose(jpeft.merge(rewritten)["w"], want, rtol=1e-4, atol=1e-4)
    got = forward(rewritten, x)
    np.testing.assert_allclose(got, apply({"w": want}, x), rtol=1e-4, atol=1e-4)


def test_dora_of_a_column_of_zeros_starts_at_the_model_and_trains():
    params = {"w": W.at[:, 2].set(0)}
    method = jpeft.LoRA(2, 4.0, "w$", dora=True)
    state = method.init(jax.random.key(0), params)
    forward = jpeft.lift(matmul)
    np.testing.assert_allclose(forward(method.rewrite(params, state), X), X @ params["w"])

    @jax.jit
    @jax.grad
    def slope(state):
        return jnp.mean((forward(method.rewrite(params, state), X) - 1) ** 2)

    for _ in range(3):
        state = jax.tree.map(lambda x, g: x - 0.05 * g, state, slope(state))
    column = jpeft.merge(method.rewrite(params, state))["w"][:, 2]
    assert np.isfinite(column).all()
    assert np.any(column)


def test_dora_of_a_weight_that_its_update_takes_away_is_finite():
    direction = jnp.linalg.qr(W)[0][:, :1]
    params = {"w": direction * jnp.arange(1.0, 9.0)}
    method = jpeft.LoRA(1, 1.0, "w$", dora=True)
    f = method.init(jax.random.key(0), params)["w"]
    f = dataclasses.replace(f, a=-direction, b=jnp.arange(1.0, 9.0)[None])
    assert np.isfinite(jpeft.merge(method.rewrite(params, {"w": f}))["w"]).all()


def test_dropout_is_on_the_low_rank_branch_alone():
    method = jpeft.LoRA(2, 4.0, "w$", dropout=0.5)
    start = method.init(jax.random.key(0), {"w": W})
    key = jax.random.key(5)

    def run(state, key):
        return jpeft.lift(matmul)(method.rewrite({"w": W}, state, key=key), X)

    np.testing.assert_allclose(run(start, key), X @ W, atol=1e-5)  # B is zero: nothing to drop
    state = filled(start)
    plain = run(state, None)
    np.testing.assert_allclose(plain, run(state, None))
    one, again, other = run(state, key), run(state, key), run(state, jax.random.key(6))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)
    many = jax.vmap(lambda k: run(state, k))(jax.random.split(key, 4000))
    np.testing.assert_allclose(many.mean(0), plain, atol=0.6)
    assert drops_whole_inputs(one - X @ W, state["w"].a @ state["w"].b)


def drops_whole_inputs(branch, update):
    """Input features go, scaled by 2: the branch is a sum over a subset of them."""
    terms = 2 * X[0][:, None] * update
    subsets = jnp.array([[(m >> i) & 1 for i in range(6)] for m in range(64)])
    return float(jnp.abs(subsets @ terms - branch[0] / 2).max(1).min()) < 1e-4


def test_dropout_is_on_what_meets_a_transposed_kernel_too():
    method = jpeft.LoRA(2, 4.0, "w$", dropout=0.5)
    state = filled(method.init(jax.random.key(0), {"w": W.T}))
    forward = jpeft.lift(lambda params, x: x @ params["w"].T)
    one = forward(method.rewrite({"w": W.T}, state, key=jax.random.key(5)), X)
    assert not np.allclose(one, forward(method.rewrite({"w": W.T}, state), X))
    assert drops_whole_inputs(one - X @ W, (state["w"].a @ state["w"].b).T)


def test_fused_kernel_with_parts_has_the_papers_count_and_leaves_k_alone():
    width = 1024
    params = {f"h{i}": {"c_attn": jnp.zeros((width, 3 * width))} for i in range(24)}
    method = jpeft.LoRA(4, 32.0, r"c_attn$", parts={r"c_attn$": (3, (0, 2))})
    assert jpeft.summary(method, params).trainable == 393_216
    fused = jpeft.LoRA(4, 32.0, r"c_attn$")
    assert jpeft.summary(fused, params).trainable == 393_216
    small = {"c_attn": jax.random.normal(jax.random.key(0), (6, 12))}
    method = jpeft.LoRA(2, 4.0, r"c_attn$", parts={r"c_attn$": (3, (0, 2))})
    state = filled(method.init(jax.random.key(0), small))
    f = state["c_attn"]
    delta = jpeft.merge(method.rewrite(small, state))["c_attn"] - small["c_attn"]
    np.testing.assert_allclose(delta[:, :4], 2 * f.a[:, :2] @ f.b[:2], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(delta[:, 4:8], 0, atol=1e-6)
    np.testing.assert_allclose(delta[:, 8:], 2 * f.a[:, 2:] @ f.b[2:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jpeft.LoRA(8, 8.0, "nothing$"), r"'nothing\$' matches no parameter"),
        (lambda: jpeft.LoRA(7, 8.0, "w$"), r"rank 7 is above the size of 'w', which is 6 in"),
        (lambda: jpeft.LoRA(2, 8.0, "bias$"), r"needs a matrix, but 'bias' has shape \(8,\)"),
        (lambda: jpeft.LoRA(2, 8.0, "cube$"), r"'cube' has shape .* which axes are its inputs"),
        (lambda: jpeft.LoRA(2, 8.0, "w$", rank_pattern={"x": 2}), "'x' matches no"),
        (lambda: jpeft.LoRA(2, 8.0, "cube$", axes={"cube": "io"}), "has 3 axes"),
        (lambda: jpeft.LoRA(2, 8.0, "w$", parts={"w": (3, (0,))}), "do not split into 3 equal"),
        (lambda: jpeft.LoRA(2, 8.0, ""), "matches|pattern"),
    ],
)
def test_errors(make, message):
    params = {"w": W, "bias": jnp.zeros(8), "cube": jnp.zeros((2, 3, 4))}
    with pytest.raises(jpeft.TargetError, match=message):
        make().init(jax.random.key(0), params)


@pytest.mark.parametrize("dtype", ["int8", "complex64"])
@pytest.mark.parametrize("method", [jpeft.LoRA(2, 4.0, "w$"), jpeft.IA3("w$")])
def test_what_is_no_real_number_is_refused(method, dtype):
    with pytest.raises(jpeft.TargetError, match=f"'w' is {dtype}: .* changes real numbers alone"):
        method.init(jax.random.key(0), {"w": W.astype(dtype)})


def test_unmerging_other_parameters_is_refused():
    method = jpeft.LoRA(2, 4.0, "w$")
    state = method.init(jax.random.key(0), {"w": W})
    with pytest.raises(jpeft.TargetError, match="'w', which these parameters do not have"):
        method.unmerge({"other": W}, state)


def test_bad_settings():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        jpeft.LoRA(0)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1"):
        jpeft.LoRA(2, dropout=1.0)
    with pytest.raises(ValueError, match="DoRA cannot be unmerged"):
        jpeft.LoRA(2, 4.0, "w$", dora=True).unmerge({}, {})


@st.composite
def contractions(draw):
    """A weight's letters, an input's, and an output's, of one einsum that uses the weight."""
    letters = "abcdefg"
    sizes = {c: draw(st.integers(1, 4)) for c in letters}
    i = draw(st.integers(1, 2))
    o = draw(st.integers(1, 2))
    batch = draw(st.booleans())
    weight = list("abc"[: i + o] if i + o < 4 else "abcd")
    ins, outs = weight[:i], weight[i:]
    axes = dict.fromkeys(ins, "i") | dict.fromkeys(outs, "o")
    if batch:
        weight.append("e")
        axes["e"] = "b"
    order = draw(st.permutations(weight))
    x = [*ins, *(["e"] if batch else []), *(["f", "g"][: draw(st.integers(0, 2))])]
    x = draw(st.permutations(x))
    out = draw(st.permutations([c for c in x if c not in ins] + outs))
    return "".join(order), "".join(x), "".join(out), "".join(axes[c] for c in order), sizes


@settings(max_examples=60, deadline=None)
@given(contractions(), st.integers(0, 2**16))
def test_every_contraction_keeps_its_low_rank_form(case, seed):
    weight, x, out, axes, sizes = case
    draw = np.random.default_rng(seed).standard_normal
    params = {"w": draw([sizes[c] for c in weight]).astype(np.float32)}
    value = draw([sizes[c] for c in x]).astype(np.float32)
    method = jpeft.LoRA(1, 2.0, "w$", axes={"w$": axes})
    state = drawn(method, params, seed)

    def apply(params, value):
        return jnp.einsum(f"{x},{weight}->{out}", value, params["w"])

    @jax.jit  # one program, where the operations alone would be many
    def both(params, state, value):
        rewritten = method.rewrite(params, state)
        assert isinstance(rewritten["w"], LowRank)
        return jpeft.lift(apply)(rewritten, value), apply(jpeft.merge(rewritten), value)

    np.testing.assert_allclose(*both(params, state, value), rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(3)), st.integers(0, 2), st.booleans(), st.integers(0, 2**16))
def test_transposing_and_slicing_a_leaf(order, at, dora, seed):
    params = normal({"w": jax.ShapeDtypeStruct((3, 4, 5), "float32")}, seed)
    method = jpeft.LoRA(2, 2.0, "w$", axes={"w$": "bio"}, dora=dora)

    def apply(params):
        return jnp.transpose(params["w"], order), params["w"][at], params["w"].reshape(3, 20)

    @jax.jit
    def both(params, state):
        rewritten = method.rewrite(params, state)
        return jpeft.merge(jpeft.lift(apply)(rewritten)), apply(jpeft.merge(rewritten))

    for a, b in zip(*both(params, drawn(method, params, seed)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 2**16))
def test_looking_up_rows(rank, seed):
    params = normal({"embedding": jax.ShapeDtypeStruct((10, 6), "float32")}, seed)
    ids = np.random.default_rng(seed).integers(0, 10, (3, 4))
    method = jpeft.LoRA(rank, 2.0, "embedding$")

    def apply(params, ids):
        h = params["embedding"][ids]
        return h, h @ params["embedding"].T  # tied

    @jax.jit
    def both(params, state, ids):
        rewritten = method.rewrite(params, state)
        return jpeft.lift(apply)(rewritten, ids), apply(jpeft.merge(rewritten), ids)

    for a, b in zip(*both(params, drawn(method, params, seed), ids), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_casting_a_leaf_to_integers_makes_it_dense():
    method = jpeft.LoRA(2, 4.0, "w$")
    state = filled(method.init(jax.random.key(0), {"w": W}))
    rewritten = method.rewrite({"w": W}, state)
    got = jpeft.lift(lambda p: p["w"].astype(jnp.int32))(rewritten)
    np.testing.assert_array_equal(got, dense(rewritten["w"]).astype(jnp.int32))


@pytest.mark.interop
@pytest.mark.parametrize("kind", ["plain", "rslora", "dora"])
def test_a_training_step_equals_hf_pefts(kind):
    """One linear layer of torch under HF PEFT: same start, same output, same gradients."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Linear(6, 8, bias=False)

        def forward(self, x):
            return self.w(x)

    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["w"],
        use_rslora=kind == "rslora",
        use_dora=kind == "dora",
    )
    theirs = peft.get_peft_model(Net(), config)
    method = jpeft.LoRA(2, 4.0, "w$", rslora=kind == "rslora", dora=kind == "dora")
    layer = theirs.base_model.model.w
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor(np.array(W.T)))
        if kind == "dora":
            norm = torch.tensor(np.array(jnp.linalg.norm(W, axis=0)))
            layer.lora_magnitude_vector["default"].weight.copy_(norm)
    state = filled(method.init(jax.random.key(0), {"w": W}))
    f = state["w"]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.tensor(np.array(f.a.T)))
        layer.lora_B["default"].weight.copy_(torch.tensor(np.array(f.b.T)))
        if kind == "dora":
            layer.lora_magnitude_vector["default"].weight.copy_(torch.tensor(np.array(f.magnitude)))
    out = theirs(torch.tensor(np.array(X)))
    (out**2).sum().backward()

    def loss(state):
        out = jpeft.lift(matmul)(method.rewrite({"w": W}, state), X)
        return jnp.sum(out**2), out

    (_, ours), grads = jax.value_and_grad(loss, has_aux=True)(state)
    np.testing.assert_allclose(ours, out.detach().numpy(), rtol=1e-4, atol=1e-4)
    g = grads["w"]
    want = [layer.lora_A["default"].weight.grad.T, layer.lora_B["default"].weight.grad.T]
    have = [g.a, g.b]
    if kind == "dora":
        want.append(layer.lora_magnitude_vector["default"].weight.grad)
        have.append(g.magnitude)
    for a, b in zip(have, want, strict=True):
        scale = float(b.abs().max())
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-4, atol=1e-4 * scale)
