"""One environment for every test and the processes it starts, set before jax is imported."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

JAX_CACHE = Path(__file__).parent.parent / ".cache" / "jax"

os.environ["JAX_PLATFORMS"] = "cpu"
# compiling is most of what the tests do
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(JAX_CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# made by the first process, be it pytest itself or xdist's controller; workers inherit it
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["LEARNED_OPT_CACHE"] = tempfile.mkdtemp(prefix="learned-opt-tests-")
    atexit.register(shutil.rmtree, os.environ["LEARNED_OPT_CACHE"], ignore_errors=True)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def ray_home(tmp_path_factory):
    """Where Ray writes its authentication token: one home for all tests of a process, as Ray reads
    the token once per process and a cluster of another home would find none.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module", autouse=True)
def _programs_end_with_their_module():
    """Compiled programs are most of what a test process holds: gigabytes, by the end."""
    yield
    jax.clear_caches()
