"""Trained states on disk: what is told of wrong, damaged and foreign files."""

import json

import jax
import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft.config import from_json, to_json

PARAMS = {"one": {"kernel": jnp.ones((6, 8))}, "two": {"kernel": jnp.ones((8, 6))}}
LOW = jpeft.LoRA(2, 4.0, r"kernel$", rank_pattern={"two": 1}, parts={"one": (2, (1,))})


@pytest.fixture
def path(tmp_path):
    state = LOW.init(jax.random.key(0), PARAMS)
    jpeft.save(tmp_path / "state.safetensors", state, LOW, {"note": "as made"})
    return tmp_path / "state.safetensors"


def edit(path, change):
    """The same arrays with another header."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        about = json.loads(file.metadata()["jpeft"])
    change(about)
    save_file(load_file(path), path, {"jpeft": json.dumps(about)})


def test_load_tells_what_differs(path):
    def like(method):
        return method.init(jax.random.key(0), PARAMS)

    other = jpeft.LoRA(3, 4.0, r"one/kernel$")
    with pytest.raises(ValueError, match=r"misshapen: one/kernel/a is \(6, 2\), not \(6, 3\)"):
        jpeft.load(path, like(other))
    with pytest.raises(ValueError, match=r"unexpected: one/kernel/a"):
        jpeft.load(path, like(jpeft.LoRA(1, 4.0, r"two/kernel$")))
    with pytest.raises(ValueError, match="no such file"):
        jpeft.load(path.with_name("absent"), like(LOW))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="no complete safetensors file"):
        jpeft.load(path, like(LOW))


def test_the_transform_is_in_the_file(path):
    assert jpeft.load_transform(path) == LOW


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda a: a["transform"].update(rnak=4), "LoRA has no option 'rnak': did you mean 'rank'"),
        (lambda a: a["transform"].update(type="Lora"), "no transform 'Lora': did you mean 'LoRA'"),
        (lambda a: a.update(version=3), "has format 3, this version reads 2: update jpeft"),
        (
            lambda a: a.update(version=1, transform=to_json(jpeft.Subspace(5))),
            "has format 1, whose Subspace had another projection",
        ),
        (lambda a: a.pop("transform"), "saved without a transform"),
        (lambda a: a["transform"].pop("type"), "a transform has a 'type'"),
        (lambda a: a["transform"].update(type=3), "there is no transform '3'"),
        (lambda a: a["transform"].update(rank=0), "LoRA cannot be made: .* at least 1, got 0"),
        (lambda a: a["transform"].update(axes={"type": "LoRA", "a": 1}), "LoRA has no option 'a'"),
        (lambda a: a.update(version="new"), "has a damaged header"),
        (lambda a: a.update(transform=[1]), "a transform has a 'type'"),
    ],
)
def test_a_header_that_cannot_be_read(path, change, told):
    edit(path, change)
    with pytest.raises(jpeft.CheckpointError, match=told):
        jpeft.load_transform(path)


@pytest.mark.parametrize("header", ["no JSON", "[1]", "7", ""])
def test_a_header_that_is_no_description(path, header):
    save_file(load_file(path), path, {"jpeft": header})
    with pytest.raises(jpeft.CheckpointError, match="has a damaged header: 'jpeft' is"):
        jpeft.restore(path, PARAMS)


def test_a_pattern_may_be_the_word_type():
    method = jpeft.LoRA(alpha_pattern={"type": 2.0}, axes={"type": "io", "b": "io"})
    assert from_json(json.loads(json.dumps(to_json(method)))) == method
    assert from_json(json.loads(json.dumps(to_json(jpeft.chain(method))))) == jpeft.chain(method)


def test_json_of_nested_transforms():
    method = jpeft.chain(LOW, jpeft.chain(jpeft.PromptTuning(2, tokens=((1, 2),)).decoding()))
    assert from_json(json.loads(json.dumps(to_json(method)))) == method


def test_a_field_without_a_form_in_json(unchecked):
    with pytest.raises(jpeft.ConfigError, match=r"LoRA.targets is a set"):
        to_json(jpeft.LoRA(2, 4.0, {"a"}))  # pyright: ignore[reportArgumentType]
