"""An estimator whose particles live on Ray actors. The outer loop cannot tell it from one in its
own process.

A worker is a pure function, (theta, state, key) -> (estimate, state'). States stay in Ray's object
store, owned by the driver, so a worker that dies is restarted by Ray and its call repeated with the
same arguments: it costs time and changes nothing.
"""

import itertools
import os
import signal
import socket
import threading
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from learned_opt.base import Theta
from meta_train.estimators.base import Estimate, Key, ParticleEstimator, combine, partition

TASK_RETRIES = 5
PATIENCE_SECONDS = 5.0
HINT = (
    "start one with `ray start --head` and give the address it prints, or leave `address` out to "
    "run on this machine"
)


class Worker:
    """Runs parts of the particles' program. Keeps no state between calls but the programs it knows.

    An estimator comes as a list with a reference to it: what a constructor is given, Ray may lose
    before it restarts an actor.
    """

    def __init__(self):
        self._programs: dict[Any, Any] = {}

    def _program(self, reference: list[Any]) -> Any:
        import ray

        from meta_train.estimators.compiled import Compiled

        if reference[0] not in self._programs:
            self._programs[reference[0]] = Compiled(ray.get(reference[0]))
        return self._programs[reference[0]]

    def init(self, reference: list[Any], theta: Theta, key_data: np.ndarray) -> Any:
        key = jax.random.wrap_key_data(jnp.asarray(key_data))
        return jax.device_get(self._program(reference).init(theta, key))

    def estimate(
        self, reference: list[Any], theta: Theta, state: Any, key_data: np.ndarray
    ) -> tuple[Estimate, Any]:
        key = jax.random.wrap_key_data(jnp.asarray(key_data))
        return jax.device_get(self._program(reference).estimate(theta, state, key))

    def pid(self) -> int:
        return os.getpid()


@jax.tree_util.register_pytree_node_class
class RemoteState:
    """The particles' states: references to the parts, or (`whole`) arrays over all particles.

    As a pytree it is the whole, fetched when looked at. A checkpoint is therefore the same for any
    number of workers.
    """

    def __init__(self, parts: list[Any] | None = None, whole: Any = None):
        self.parts, self.whole = parts, whole

    def tree_flatten(self):
        if self.parts is None:
            return (self.whole,), None
        import ray

        return (jax.tree.map(lambda *x: np.concatenate(x), *ray.get(self.parts)),), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(whole=children[0])


def connect(address: str | None, cpus: int) -> bool:
    """Joins the cluster at `address` ("auto" or host:port), or starts one on this machine's
    loopback interface. Returns whether this call did either: a session that was there is used.

    Raises:
      ConnectionError: no cluster answers there.
      ValueError: it has fewer than `cpus` cores, and would make the workers wait for ever.
    """
    # All of these must be set before ray is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is None:
        # Despite its name this is Ray's only switch that makes its servers listen on 127.0.0.1
        # alone.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    else:
        _check_reachable(address)
    import ray

    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is None:
        # "local": not whatever RAY_ADDRESS or an earlier `ray start` points to
        options |= {"address": "local", "include_dashboard": False}
        options["num_cpus"] = max(cpus, os.cpu_count() or 1)
    else:
        options["address"] = address
    on_terminate = signal.getsignal(signal.SIGTERM)
    with warnings.catch_warnings():
        # Ray starts its servers by fork and exec at once, which jax's threads do not mind
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
        try:
            ray.init(**options)
        except ConnectionError:
            raise ConnectionError(f"no Ray cluster at `address` {address}; {HINT}") from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_terminate)  # Ray put its own handler there
    available = ray.cluster_resources().get("CPU", 0)
    if available < cpus:
        ray.shutdown()
        raise ValueError(
            f"`workers` need {cpus} cores, the cluster at {address} has {available:.0f}"
        )
    return True


def _check_reachable(address: str) -> None:
    """Ray itself would try for a minute; a plain connection knows in seconds."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(f"no Ray cluster at `address` {address} ({error}); {HINT}") from None


class Remote:
    """The estimator's particles, divided over `workers` actors of `cpus_per_worker` cores each."""

    def __init__(
        self,
        estimator: ParticleEstimator,
        workers: int,
        address: str | None = None,
        cpus_per_worker: int = 1,
        gpus_per_worker: float = 0.0,
    ):
        parts = partition(estimator, workers)
        self._particles = [part.particles for part in parts]
        self._connected = connect(address, cpus=workers * cpus_per_worker)
        # NPROC is the one setting that holds XLA's thread pool to a core; it must be there before
        # jax is
        environment = {
            "NPROC": str(cpus_per_worker),
            "JAX_PLATFORMS": "" if gpus_per_worker else "cpu",
        }
        if gpus_per_worker:
            environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(0.9 * min(gpus_per_worker, 1.0))
        cache = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
        if cache:
            environment["JAX_COMPILATION_CACHE_DIR"] = cache
        import ray

        self._ray = ray
        actor = ray.remote(Worker).options(
            num_cpus=cpus_per_worker,
            num_gpus=gpus_per_worker,
            max_restarts=-1,
            max_task_retries=TASK_RETRIES,
            runtime_env={"env_vars": environment},
        )
        self._parts = [[ray.put(part)] for part in jax.device_get(parts)]
        self._workers = [actor.remote() for _ in parts]

    def init(self, theta: Theta, key: Key) -> RemoteState:
        arguments = jax.device_get((theta, jax.random.key_data(key)))
        return RemoteState(
            [
                worker.init.remote(part, *arguments)
                for worker, part in zip(self._workers, self._parts, strict=True)
            ]
        )

    def estimate(self, theta: Theta, state: RemoteState, key: Key) -> tuple[Estimate, RemoteState]:
        theta, key_data = jax.device_get((theta, jax.random.key_data(key)))
        calls = [
            worker.estimate.options(num_returns=2).remote(part, theta, particles, key_data)
            for worker, part, particles in zip(
                self._workers, self._parts, self._split(state), strict=True
            )
        ]
        estimates = self._ray.get([estimate for estimate, _ in calls])
        state = RemoteState([particles for _, particles in calls])
        return combine(estimates, self._particles), state

    def _split(self, state: RemoteState) -> list[Any]:
        if state.parts is not None:
            return state.parts
        bounds = np.cumsum([0, *self._particles])
        whole = jax.device_get(state.whole)
        return [
            jax.tree.map(lambda x, a=a, b=b: x[a:b], whole) for a, b in itertools.pairwise(bounds)
        ]

    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return self._ray.get([worker.pid.remote() for worker in self._workers])

    def close(self) -> None:
        """Ends the workers, and the connection (with it a local cluster) if it was made here."""
        for worker in self._workers:
            self._ray.kill(worker)  # pyright: ignore[reportArgumentType]
        if self._connected:
            self._ray.shutdown()
