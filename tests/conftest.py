"""Settings that hold for every test: eight virtual CPU devices, no network, one thread a worker."""

import importlib.metadata
import os

# Tests compile thousands of small programs once: the compiler is told to be quick about it. Its
# older way to make kernels is quicker; newer ones stop at that flag.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false"
    * importlib.metadata.version("jaxlib").startswith("0.10."),
)
# Eight devices meet in a collective: with fewer threads they wait for one another for ever.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Nobody reads where in the source a test's program comes from.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import gc
import itertools
import pathlib
import tempfile
from collections.abc import Iterator

import jax
import jaxtyping
import pytest

# Shapes in signatures are checked at run time, in the modules that have some: of the rest many a
# function is called so often, and does so little, that the check is most of its time.
_ROOT = pathlib.Path(__file__).resolve().parents[1]
_SHAPES = [p for p in (_ROOT / "jpeft").rglob("*.py") if "from jaxtyping" in p.read_text()]
if "JAXTYPING_DISABLE" not in os.environ:
    jaxtyping.install_import_hook(
        [".".join(p.relative_to(_ROOT).with_suffix("").parts) for p in _SHAPES],
        "beartype.beartype",
    )

# Tracing makes many small objects, which the collector would look at every 700 of them.
gc.set_threshold(100_000, 20, 100)

# Many tests compile the same small programs: all workers, and the commands that tests start, keep
# them in one folder for this session, which the first process makes and removes.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _PROGRAMS = tempfile.TemporaryDirectory(prefix="jpeft-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _PROGRAMS.name
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--one-each`."""
    parser.addoption("--one-each", action="store_true", help="each test with its first parameters")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `--one-each` drop what differs from an earlier test in its parameters alone."""
    if config.getoption("--one-each"):
        first: dict[str, pytest.Item] = {}
        for item in items:
            first.setdefault(item.nodeid.split("[")[0], item)
        kept = set(first.values())
        config.hook.pytest_deselected(items=[i for i in items if i not in kept])
        items[:] = first.values()


_DONE = itertools.count(1)


@pytest.fixture(autouse=True)
def few_mappings() -> Iterator[None]:
    """Let go of compiled programs before they fill the process's memory map.

    Each program has pieces of it, and Linux gives a process 65,530: past them the compiler crashes.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if next(_DONE) % 20 == 0 and maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the tests' type checks at run time: what a user's wrong value meets."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def key() -> jax.Array:
    """A PRNG key, the same in every test."""
    return jax.random.key(0)


@pytest.fixture(scope="session")
def data() -> pathlib.Path:
    """The folder of real data: `$JPEFT_DATA`, or `shared/data` beside the repository."""
    beside = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = pathlib.Path(os.environ.get("JPEFT_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is absent (set JPEFT_DATA)")
    return folder
