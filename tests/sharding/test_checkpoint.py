"""Checkpoints: there and back to the bit, onto other shardings, and what is refused."""

import errno
import logging
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sharding import CheckpointError, Checkpoints, fingerprint, make_mesh
from sharding.checkpoint_bits import bit_sums

MESH = make_mesh()
SPLIT, WHOLE = NamedSharding(MESH, P("fsdp")), NamedSharding(MESH, P())


@pytest.fixture
def state():
    return {
        "w": jax.device_put(jax.random.normal(jax.random.key(0), (16, 4)), SPLIT),
        "half": (jnp.arange(8, dtype=jnp.bfloat16) / 3, jnp.zeros((), jnp.int32)),
        "key": jax.random.key(5),
        "other": jax.random.split(jax.random.key(5, impl="rbg"), 3),
    }


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.array_equal(x, y)


def test_there_and_back(tmp_path, state):
    with Checkpoints(tmp_path / "c") as saved:
        saved.save(3, state, {"data": {"epoch": 1}})
        saved.wait()
        got, about = saved.restore(state)
    same(got, state)
    assert about == {"data": {"epoch": 1}}
    assert got["w"].sharding == SPLIT
    jax.random.normal(got["other"][0])  # a key to draw from


def test_onto_another_sharding_and_from_shapes(tmp_path, state):
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    like["w"] = jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=WHOLE)
    with Checkpoints(tmp_path) as saved:
        saved.save(1, state)
        saved.wait()
        got, _ = saved.restore(like)
    same(got, state)
    assert got["w"].sharding == WHOLE


def test_the_newest_few_are_kept(tmp_path, state):
    with Checkpoints(tmp_path, keep=2) as saved:
        assert saved.latest() is None
        for i in range(4):
            saved.save(i, state, i)
        saved.save(3, state, "again")  # there already
        saved.wait()
        assert saved.latest() == 3
        assert saved.restore(state)[1] == 3
        assert saved.restore(state, 2)[1] == 2
        with pytest.raises(CheckpointError, match="holds no checkpoint of step 1"):
            saved.restore(state, 1)


def test_nothing_there(tmp_path, state):
    with (
        Checkpoints(tmp_path) as saved,
        pytest.raises(CheckpointError, match="holds no checkpoint$"),
    ):
        saved.restore(state)
    with pytest.raises(ValueError, match="keep"):
        Checkpoints(tmp_path, keep=0)


def test_another_state_is_refused_with_all_that_differs(tmp_path, state):
    with Checkpoints(tmp_path) as saved:
        saved.save(1, state)
        saved.wait()
        like = {**state, "w": jnp.zeros((16, 5)), "new": jnp.zeros(2)}
        del like["key"]
        with pytest.raises(CheckpointError) as e:
            saved.restore(like)
    told = str(e.value)
    assert "missing: new" in told
    assert "unexpected: key" in told
    assert "w is float32[16, 4], not float32[16, 5]" in told


def test_what_is_saved_is_what_was_there_when_it_was_saved(tmp_path):
    """The next step eats the arrays while they are written."""
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros((8, 2**18))
    with Checkpoints(tmp_path, keep=4) as saved:
        for i in range(4):
            saved.save(i, {"x": x})
            x = step(x)
        for i in range(4):
            like = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype)}
            assert np.all(np.asarray(saved.restore(like, i)[0]["x"]) == i)


def test_what_json_cannot_hold_is_told_at_once(tmp_path, state):
    with Checkpoints(tmp_path) as saved:
        with pytest.raises(TypeError, match="`about` of step 1 must be what JSON can hold"):
            saved.save(1, state, {"data": object()})
        assert saved.latest() is None


def truncate(folder):
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 0 and "d" in path.parent.name:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# Where one read fails, TensorStore drops the others without a look at them.
dropped = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@dropped
def test_no_bit_goes_wrong_unseen(tmp_path, caplog):
    """Whichever file of it is damaged: the state is the one that was saved, or the one before."""
    rng = np.random.default_rng(0)
    # Random numbers, too many to stand within an index: nothing else would tell one from another.
    states = [
        {"w": jax.device_put(rng.normal(size=(64, 64)), SPLIT), "n": jnp.full(3, i)} for i in (0, 1)
    ]
    with Checkpoints(tmp_path / "whole") as saved:
        for i, state in enumerate(states):
            saved.save(i, state, {"of": i})
    files = [p for p in (tmp_path / "whole" / "1").rglob("*") if p.is_file() and p.stat().st_size]
    taken = []
    for number, file in enumerate(files):
        copy = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", copy)
        flip(copy / file.relative_to(tmp_path / "whole"), file.stat().st_size // 2)
        with Checkpoints(copy) as saved:
            got, about = saved.restore(states[0])
        same(got, states[about["of"]])
        taken.append(about["of"])
    assert 0 in taken
    assert "not what was saved: w" in caplog.text
    note = tmp_path / "whole" / "1" / "note" / "metadata"
    note.write_text(note.read_text().replace('{"of": 1}', '{"of": 7}'))
    with Checkpoints(tmp_path / "whole") as saved:
        assert saved.restore(states[0])[1] == {"of": 0}


@dropped
def test_a_run_that_went_on_without_a_damaged_one_replaces_it(tmp_path, state, caplog):
    with Checkpoints(tmp_path) as saved:
        for i in (2, 3, 4):
            saved.save(i, state, f"first {i}")
    for i in (3, 4):
        truncate(tmp_path / str(i))
    with Checkpoints(tmp_path) as saved:
        assert saved.restore(state)[1] == "first 2"
        saved.save(3, state, "again 3")
        assert "4 is set aside as 4.damaged" in caplog.text
        saved.save(4, state, "again 4")
        saved.wait()
        assert saved.restore(state)[1] == "again 4"
        assert saved.restore(state, 3)[1] == "again 3"
        with pytest.raises(CheckpointError, match="holds step 4, and this one is 1"):
            saved.save(1, state)


@dropped
def test_a_damaged_one_is_passed_over(tmp_path, state, caplog):
    with Checkpoints(tmp_path) as saved:
        for i in (1, 2):
            saved.save(i, state, i)
        saved.wait()
    truncate(tmp_path / "2")
    with Checkpoints(tmp_path) as saved, caplog.at_level(logging.WARNING, "sharding"):
        got, about = saved.restore(state)
        assert about == 1
        same(got, state)
        assert "2 cannot be read" in caplog.text
        with pytest.raises(CheckpointError, match="2 cannot be read"):
            saved.restore(state, 2)
        same(saved.restore(state, 1)[0], state)
    truncate(tmp_path / "1")
    with Checkpoints(tmp_path) as saved, pytest.raises(CheckpointError, match="cannot be read"):
        saved.restore(state)


def folders(path):
    return sorted(p.name for p in path.iterdir())


def test_a_sharding_that_cannot_be_leaves_every_checkpoint(tmp_path, state):
    five = NamedSharding(make_mesh("fsdp=5", jax.devices()[:5]), P("fsdp"))
    wrong = {**state, "w": jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=five)}
    with Checkpoints(tmp_path, keep=4) as saved:
        for i in (1, 2, 3):
            saved.save(i, state)
        with pytest.raises(CheckpointError, match="w cannot stand where it is to: .*divide"):
            saved.restore(wrong)
        saved.save(4, state)
    assert folders(tmp_path) == ["1", "2", "3", "4"]


@dropped
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        MemoryError(),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes."),
        ValueError("PERMISSION_DENIED: Error reading 'w' [os_error_code='13']"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_what_the_machine_refuses_is_raised_and_is_no_damage(tmp_path, state, monkeypatch, error):
    def restore(*_, **__):
        raise error

    with Checkpoints(tmp_path) as saved:
        for i in (1, 2):
            saved.save(i, state, i)
        with monkeypatch.context() as patched:
            patched.setattr(ocp.StandardCheckpointHandler, "restore", restore)
            with pytest.raises(type(error)) as raised:
                saved.restore(state)
        assert raised.value is error
        assert saved.restore(state)[1] == 2
        saved.save(3, state)
    assert folders(tmp_path) == ["1", "2", "3"]


@dropped
def test_a_file_that_the_system_does_not_open_is_no_damage(tmp_path, state):
    with Checkpoints(tmp_path) as saved:
        saved.save(1, {"x": jnp.asarray(np.random.default_rng(0).normal(size=(128, 128)))})
        saved.wait()
        for path in (tmp_path / "1" / "arrays").rglob("*"):
            if path.is_file() and path.stat().st_size > 2**15:
                path.unlink()
                path.symlink_to(path)  # too many links: for root too an error of the system
        with pytest.raises(Exception, match="reading") as raised:
            saved.restore({"x": jnp.zeros((128, 128))})
        assert not isinstance(raised.value, CheckpointError)


@dropped
def test_where_none_could_be_read_nothing_is_touched(tmp_path, state):
    with Checkpoints(tmp_path) as saved:
        for i in (1, 2):
            saved.save(i, state)
        saved.wait()
        for i in (1, 2):
            truncate(tmp_path / str(i))
        with pytest.raises(CheckpointError, match="1 cannot be read"):
            saved.restore(state)
        saved.save(3, state)
    assert folders(tmp_path) == ["1", "2", "3"]


@dropped
def test_each_damaged_one_has_a_folder_of_its_own(tmp_path, state):
    for damaged in ("2.damaged", "2.damaged1"):
        with Checkpoints(tmp_path) as saved:
            for i in (1, 2):
                saved.save(i, state)
        truncate(tmp_path / "2")
        with Checkpoints(tmp_path) as saved:
            saved.restore(state)
            saved.save(2, state)
        assert (tmp_path / damaged).is_dir()
    assert folders(tmp_path) == ["1", "2", "2.damaged", "2.damaged1"]


@pytest.mark.slow
def test_a_program_that_just_ends_has_written_its_last_checkpoint(tmp_path):
    program = (
        "import sys, jax.numpy as jnp, sharding\n"
        "saved = sharding.Checkpoints(sys.argv[1])\n"
        "saved.save(1, {'x': jnp.ones((1024, 1024))})\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    assert folders(tmp_path) == ["1"]


def test_closed_without_a_block(tmp_path, state):
    saved = Checkpoints(tmp_path)
    saved.save(1, state)
    saved.close()
    assert folders(tmp_path) == ["1"]
    saved.close()


def test_other_frozen_parameters_are_refused(tmp_path, state):
    base = {"w": jnp.arange(6.0).reshape(2, 3)}
    with Checkpoints(tmp_path, base=fingerprint(base)) as saved:
        saved.save(1, state)
        saved.wait()
        saved.restore(state)
    other = {"w": base["w"].at[0, 0].add(1e-6)}
    with (
        Checkpoints(tmp_path, base=fingerprint(other)) as saved,
        pytest.raises(CheckpointError, match="trained on other frozen parameters"),
    ):
        saved.restore(state)


def test_a_fingerprint_is_of_contents_not_of_places(state):
    name = fingerprint(state)
    assert fingerprint({**state, "w": jax.device_put(state["w"], WHOLE)}) == name
    swapped = state["w"].at[jnp.array([0, 1])].set(state["w"][jnp.array([1, 0])])
    for other in (
        {**state, "w": swapped},
        {**state, "w": state["w"].astype(jnp.bfloat16)},
        {**state, "w": state["w"].reshape(4, 16)},
        {**state, "key": jax.random.key(6)},
    ):
        assert fingerprint(other) != name


DTYPES = "bool int8 uint32 int64 float8_e4m3fn bfloat16 float32 float64 complex64 complex128"


@pytest.mark.parametrize("dtype", DTYPES.split())
def test_each_bit_of_each_number_counts(dtype):
    with jax.enable_x64(True):
        dtype = jnp.dtype(dtype)
        raw = np.zeros((3, 2, dtype.itemsize), np.uint8)
        seen = [bit_sums({"x": raw.view(dtype)[..., 0]})["x"]]
        for bit in range(1 if dtype.name == "bool" else 8 * dtype.itemsize):
            for row in range(3):
                changed = raw.copy()
                changed[row, 1, bit // 8] = 1 << bit % 8
                seen.append(bit_sums({"x": changed.view(dtype)[..., 0]})["x"])
        assert len(set(seen)) == len(seen)
