"""Who the other processes are, and jobs of several over loopback."""

import os
import random
import shutil
import signal
import socket
import threading

import jax
import numpy as np
import pytest
from jax._src.clusters import ClusterEnv

import sharding.cluster
from sharding import Zero, initialise, make_mesh, waiting
from sharding.cluster import Cluster, detect, everywhere, global_batch, process_rows
from tests.sharding.job import Job, losses

# The jobs of this file share fixtures that take seconds: one worker makes them once.
pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.slow]

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NODELIST": "a[1-2]",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}


def without(environ, name):
    return {k: v for k, v in environ.items() if k != name}


@pytest.mark.parametrize(
    ("environ", "kind"),
    [
        ({}, None),
        ({"HOME": "/", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}, None),
        (SLURM, "slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}, "ompi"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "k8s"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        (SLURM | EXPLICIT, "explicit"),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
    ],
)
def test_who_started_it(environ, kind):
    found = detect(environ)
    assert (None if found is None else found.kind) == kind


SLICES = {
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "0",
    "MEGASCALE_COORDINATOR_ADDRESS": "slice-0-0:8080",
}


@pytest.mark.parametrize(
    ("environ", "joins"),
    [
        ({}, True),  # the metadata server knows
        ({"TPU_SKIP_MDS_QUERY": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, False),
        ({"TPU_PROCESS_ADDRESSES": "local", "TPU_WORKER_HOSTNAMES": "a,b"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0"} | SLICES, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
    ],
)
def test_a_tpu_host_is_alone_or_one_of_a_slice(environ, joins):
    assert detect(environ, tpu=True) == (Cluster("tpu") if joins else None)


def test_what_is_told_goes_before_what_a_tpu_host_knows():
    assert detect(EXPLICIT, tpu=True) == Cluster("explicit", "10.0.0.1:1234", 2, 1)


@pytest.mark.parametrize(
    ("environ", "what"),
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_ID is not set"),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "2"}, "TPU_WORKER_ID is 2, of 2 hosts"),
        (without(SLICES, "MEGASCALE_SLICE_ID"), "MEGASCALE_SLICE_ID is not set"),
    ],
)
def test_a_broken_tpu_environment_is_told(environ, what):
    with pytest.raises(ValueError, match=what):
        detect(environ, tpu=True)


def test_open_mpi_5_needs_the_first_host():
    environ = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
    with pytest.raises(ValueError, match="set JAX_COORDINATOR_ADDRESS"):
        detect(environ)
    environ |= {"JAX_COORDINATOR_ADDRESS": "h:1"}
    with pytest.raises(ValueError, match="OMPI_COMM_WORLD_LOCAL_RANK is not set"):
        detect(environ)
    # JAX does not know this one, so it would give each process all GPUs of the host.
    environ |= {"OMPI_COMM_WORLD_LOCAL_RANK": "3"}
    assert detect(environ) == Cluster("explicit", "h:1", 2, 1, device=3)


def test_how_jax_is_told(monkeypatch):
    """By name JAX finds SLURM and Open MPI alone: the others it has to look for by itself."""
    names = {c.name for c in ClusterEnv._cluster_types}
    told = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: told.append((a, k)))
    kubernetes = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(sharding.cluster, "wait_for_first", lambda *job: told.append(job))
    for environ in (SLURM, EXPLICIT, kubernetes):
        for name in {*SLURM, *EXPLICIT, *kubernetes}:
            monkeypatch.delenv(name, raising=False)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        initialise()
    wait = {"initialization_timeout": 300}
    assert told.pop() == ((), {"cluster_detection_method": None} | wait)
    assert told.pop() == (("10.0.0.1:1234", 2, 1), {"local_device_ids": None} | wait)
    assert told.pop() == ("10.0.0.1:1234", 2, 1, 300)
    assert told.pop() == ((), {"cluster_detection_method": "slurm"} | wait)
    assert {"slurm", "ompi"} <= names
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install 'jax\\[k8s\\]'"):
        initialise()
    with pytest.raises(ValueError, match="together, or none"):
        initialise("10.0.0.1:1234")


@pytest.mark.parametrize(
    ("environ", "what"),
    [
        (without(EXPLICIT, "JAX_COORDINATOR_ADDRESS"), "not JAX_COORDINATOR_ADDRESS"),
        (without(EXPLICIT, "JAX_PROCESS_ID"), "not JAX_PROCESS_ID"),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'"),
        (EXPLICIT | {"JAX_PROCESS_ID": "2"}, "process 2 of 2"),
        (EXPLICIT | {"JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "must be host:port"),
        (without(SLURM, "SLURM_STEP_NODELIST"), "SLURM_STEP_NODELIST is not set: start .* srun"),
        (SLURM | {"SLURM_NTASKS": "many"}, "SLURM_NTASKS is 'many'"),
    ],
)
def test_a_broken_environment_is_told(environ, what):
    with pytest.raises(ValueError, match=what):
        detect(environ)


def test_a_first_process_that_does_not_listen_is_told_by_its_address(monkeypatch, caplog):
    monkeypatch.setattr(waiting, "TELL", 0.1)
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(TimeoutError, match=f"process 1 of 2: nobody listens at {where} after"):
            initialise(where, 2, 1, timeout=0.5)
    assert f"process 1 of 2: waiting for the others at {where}" in caplog.text


def test_a_first_process_that_comes_later_is_waited_for():
    with socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        listens = threading.Timer(0.5, first.listen)
        listens.start()
        waiting.wait_for_first(f"127.0.0.1:{first.getsockname()[1]}", 2, 1, 60)
        assert listens.finished.is_set()


def test_rows_and_batches_of_one_process():
    zero = Zero(make_mesh())
    rows = {"x": np.arange(16.0).reshape(8, 2)}
    where = zero.batch(rows)
    np.testing.assert_array_equal(process_rows(8, where["x"]), np.arange(8))
    for made in (global_batch(rows, where, 8), everywhere(rows, where)):
        np.testing.assert_array_equal(made["x"], rows["x"])
        assert made["x"].sharding == where["x"]
    assert everywhere(made, where)["x"] is made["x"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The losses and the final state of one process with eight devices, and of two with four."""
    out = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"of{processes}")
        with Job(folder, processes) as job:
            job.finish()
        out[processes] = losses(folder), np.load(folder / "final.npz")
    return out


def test_two_and_four_processes_train_as_one(undisturbed, tmp_path):
    with Job(tmp_path, 4) as job:
        job.finish()
    want = undisturbed[1][0]
    assert want[40] < 0.8 * want[1]
    for got in (undisturbed[2][0], losses(tmp_path)):
        np.testing.assert_allclose(list(got.values()), list(want.values()), atol=1e-5)


@pytest.mark.parametrize(
    "options", [("--shuffled",), ("--mesh", "fsdp=2,tensor=4"), ("--mesh", "fsdp=4,tensor=2")]
)
def test_rows_are_of_a_processs_own_devices(undisturbed, tmp_path, options):
    """Not in order, or made by several where `tensor` splits layers over them."""
    with Job(tmp_path, 4, steps=8, options=options) as job:
        job.finish()
    want = undisturbed[1][0]
    np.testing.assert_allclose(
        list(losses(tmp_path).values()), [want[i] for i in range(1, 9)], atol=1e-5
    )


def test_processes_that_start_from_other_arrays_are_refused(tmp_path):
    with Job(tmp_path, 2, options=("--own-start",)) as job:
        for process in job.processes:
            process.join(60)
        assert all(process.exitcode for process in job.processes), job.logs()
    for log in ("log0.txt", "log1.txt"):
        told = "process 0 and others (of 2: 1) were given different arrays"
        assert told in (tmp_path / log).read_text()


def test_killed_ten_times_it_ends_as_if_nothing_had_happened(undisturbed, tmp_path):
    """Each time one of two processes gets SIGKILL, at a random moment after a few steps."""
    rng = random.Random(0)
    for _ in range(10):
        before = max(losses(tmp_path), default=0)
        with Job(tmp_path, 2, options=("--every", "1")) as job:
            new = rng.randint(1, 3)
            job.wait_for(lambda n=before + new: max(losses(tmp_path), default=0) >= n)
            job.processes[rng.randrange(2)].kill()
    with Job(tmp_path, 2) as job:
        job.finish()
    want, final = undisturbed[2]
    assert losses(tmp_path) == want
    got = np.load(tmp_path / "final.npz")
    assert got.files == final.files
    for name in final.files:
        np.testing.assert_array_equal(got[name], final[name])


def test_sigterm_saves_and_leaves_and_the_job_goes_on(undisturbed, tmp_path):
    """A preemption of one process stops all of them at the same step."""
    with Job(tmp_path, 2) as job:
        job.wait_for(lambda: len(losses(tmp_path)) >= 3)
        os.kill(job.processes[1].pid, signal.SIGTERM)
        job.finish()
    assert len(losses(tmp_path)) < 40
    assert "stopped" in (tmp_path / "log0.txt").read_text()
    with Job(tmp_path, 2) as job:
        job.finish()
    want, final = undisturbed[2]
    assert losses(tmp_path) == want
    got = np.load(tmp_path / "final.npz")
    assert all(np.array_equal(got[n], final[n]) for n in final.files)


LARGE = ("--large", "1", "--every", "1")


@pytest.fixture
def three_steps(tmp_path):
    """A folder with checkpoints of two steps, and the files of the newer one's second process."""
    with Job(tmp_path, 2, steps=3, options=LARGE) as job:
        job.finish()
    own = tmp_path / "checkpoints" / "3" / "arrays" / "ocdbt.process_1"
    shards = [p for p in own.rglob("*") if p.is_file() and p.stat().st_size > 2**16]
    assert shards
    return tmp_path, shards


def test_a_shard_that_one_process_may_not_read_stops_all_and_is_kept(three_steps):
    folder, shards = three_steps
    for path in shards:
        path.unlink()
        path.symlink_to(path)  # too many links: for root too an error of the system
    with Job(folder, 2, steps=4, options=LARGE) as job:
        for process in job.processes:
            process.join(60)
        assert all(process.exitcode for process in job.processes), job.logs()
    assert "another process tells why" in (folder / "log0.txt").read_text()
    assert "os_error_code" in (folder / "log1.txt").read_text()
    assert {"2", "3"} <= {p.name for p in (folder / "checkpoints").iterdir()}


def test_a_shard_that_one_process_cannot_read_is_passed_over_by_all(three_steps):
    """The other one has read its own, and must not go on from there alone."""
    tmp_path, shards = three_steps
    for path in shards:
        path.write_bytes(path.read_bytes()[:1000])
    before = losses(tmp_path)
    (tmp_path / "losses.jsonl").unlink()
    with Job(tmp_path, 2, steps=4, options=LARGE) as job:
        job.finish()
    assert list(losses(tmp_path)) == [3, 4]
    assert (tmp_path / "checkpoints" / "3.damaged").is_dir()
    assert losses(tmp_path)[3] == before[3]
    assert "3 cannot be read: another process cannot" in (tmp_path / "log0.txt").read_text()
    assert "3 cannot be read: Encountered error" in (tmp_path / "log1.txt").read_text()


@pytest.fixture(scope="module")
def eight_steps(tmp_path_factory):
    """What eight steps on eight devices leave."""
    folder = tmp_path_factory.mktemp("eight")
    with Job(folder, steps=8) as job:
        job.finish()
    return folder


@pytest.mark.parametrize(("processes", "devices"), [(1, 4), (1, 1), (2, 4)])
def test_a_checkpoint_of_eight_devices_goes_on_elsewhere(
    undisturbed, eight_steps, tmp_path, processes, devices
):
    shutil.copytree(eight_steps, tmp_path, dirs_exist_ok=True)
    with Job(tmp_path, processes, devices=devices) as job:
        job.finish()
    want = undisturbed[1][0]
    np.testing.assert_allclose(
        [losses(tmp_path)[i] for i in range(1, 41)], list(want.values()), atol=1e-5
    )


def test_killed_during_a_save_the_last_whole_one_loads(tmp_path):
    folder = tmp_path / "checkpoints"

    def saving():
        return len(losses(tmp_path)) >= 3 and any("tmp" in p.name for p in folder.glob("*"))

    options = ("--large", "64", "--every", "1")
    with Job(tmp_path, 1, devices=1, steps=200, options=options) as job:
        job.wait_for(saving)
        job.kill()
    left = [p.name for p in folder.iterdir()]
    whole = sorted(int(n) for n in left if n.isdigit())
    assert any("tmp" in n for n in left)
    with Job(tmp_path, 1, devices=1, steps=whole[-1] + 1, options=options) as job:
        job.finish()
    assert max(losses(tmp_path)) >= whole[-1] + 1
    assert jax.process_count() == 1
