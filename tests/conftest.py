"""Eight simulated devices for every test, quick compilation, and the switch that refreshes
goldens.
"""

import gc
import itertools
import os
import signal
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: without LLVM's optimizations they compile three times
# faster. Processes that tests start inherit this. A level that the environment names stays: kernels
# for a GPU spill without optimization.
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    )

import jax
import pytest

if os.environ.get("GATEDJAX_TYPECHECK"):
    # `make test-types`: every annotation, shapes too, is checked at every call. The configuration
    # checks itself and converts what it gets (a list where a tuple is annotated).
    from jaxtyping import install_import_hook

    CHECKED = (
        "gatedjax.aot",
        "gatedjax.evaluation",
        "gatedjax.layers",
        "gatedjax.model",
        "gatedjax.reporting",
        "gatedjax.sharding",
        "gatedjax.study",
        "gatedjax.training",
        "kernels_pallas",
    )
    install_import_hook(CHECKED, "typechecker.check")

jax.config.update("jax_num_cpu_devices", 8)


def pytest_addoption(parser):
    parser.addoption(
        "--refresh-goldens",
        action="store_true",
        help="write the goldens instead of comparing with them",
    )


def pytest_collection_finish():
    """Tracing makes many objects that live for seconds: to look through them, and through all
    modules, for cycles again and again is a twentieth of the tests' time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory):
    """The key that runs sign their paths with: not the one in the home of who runs the tests."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture
def signals_of_a_terminal():
    """Tests that were started in the background inherit ignored signals, and hand them on."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# Linux lets a process map 65,530 pieces of memory, and XLA segfaults on the next one. Programs are
# forgotten between files where they can be, since tests of a file share some; inside of a long file
# only where they must be.
MOST_MAPS_BETWEEN_FILES = 20_000
MOST_MAPS = 40_000
TESTS_PER_LOOK = 8
finished = itertools.count(1)


@pytest.fixture(scope="module", autouse=True)
def room_for_programs():
    """Forgets the compiled programs of a process, dozens of maps each, before they are too many."""
    yield
    forget_programs(MOST_MAPS_BETWEEN_FILES)


@pytest.fixture(autouse=True)
def room_inside_of_a_file():
    """The same between tests of one file."""
    yield
    if next(finished) % TESTS_PER_LOOK == 0:
        forget_programs(MOST_MAPS)


def forget_programs(most_maps: int) -> None:
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > most_maps:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Tests that compile the same program, in one process or in several, compile it once."""
    base = Path(tmp_path_factory.getbasetemp())
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    return folder
