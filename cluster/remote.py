"""An estimator whose particles live on Ray actors. The outer loop cannot tell it from one in its
own process.

A worker is a pure function, (theta, state, key) -> (estimate, state'). States stay in Ray's object
store, owned by the driver, so a worker that dies is restarted by Ray and its call repeated with the
same arguments: it costs time and changes nothing. Nor does it change anything which worker hosts
which part of the particles: that is decided by what they cost, once, so that a worker compiles the
programs of its parts and no others.
"""

import dataclasses
import math
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from learned_opt.base import Theta
from meta_train.estimators.base import Estimate, Key, ParticleEstimator, combine
from meta_train.estimators.compiled import Compiled, put_once
from meta_train.estimators.mixture import Mixture, divided, keys, members

TASK_RETRIES = 5
PATIENCE_SECONDS = 5.0
HINT = (
    "start one with `ray start --head` and give the address it prints, or leave `address` out to "
    "run on this machine"
)


class Part(NamedTuple):
    """`particles` of the `member`-th member of a mixture, from `first` on."""

    member: int
    first: int
    particles: int


class Worker:
    """Runs parts of the particles' programs. Keeps no state between calls but the programs it
    knows.

    An estimator comes as a list with a reference to it: what a constructor is given, Ray may lose
    before it restarts an actor.
    """

    def __init__(self):
        self._members: dict[Any, tuple[ParticleEstimator, ...]] = {}
        self._programs: dict[Any, Compiled] = {}
        self._put = put_once()
        self._compilations = 0

        def count(event: str, *_: Any, **__: Any) -> None:
            self._compilations += event.endswith("backend_compile_duration")

        jax.monitoring.register_event_duration_secs_listener(count)

    def _program(self, reference: list[Any], part: Part) -> Compiled:
        import ray

        (name,) = reference
        if name not in self._members:
            self._members[name] = members(ray.get(name))
        shape = name, part.member, part.particles
        if shape not in self._programs:
            member: Any = self._members[name][part.member]
            member = dataclasses.replace(member, particles=part.particles)
            self._programs[shape] = Compiled(member, put=self._put)
        return self._programs[shape].starting_at(part.first)

    def init(self, reference: list[Any], part: Part, theta: Theta, key_data: np.ndarray) -> Any:
        key = jax.random.wrap_key_data(jnp.asarray(key_data))
        return jax.device_get(self._program(reference, part).init(theta, key))

    def estimate(
        self, reference: list[Any], part: Part, theta: Theta, state: Any, key_data: np.ndarray
    ) -> tuple[Estimate, Any]:
        key = jax.random.wrap_key_data(jnp.asarray(key_data))
        return jax.device_get(self._program(reference, part).estimate(theta, state, key))

    def compilations(self) -> int:
        """Of anything, since this process began."""
        return self._compilations

    def pid(self) -> int:
        return os.getpid()


@jax.tree_util.register_pytree_node_class
class RemoteState:
    """The particles' states: references to those of the parts, in a list or, of a mixture, a list
    for each member; or (`whole`) arrays over all particles, as the estimator itself has them.

    As a pytree it is the whole, fetched when looked at. A checkpoint is therefore the same for any
    number of workers.
    """

    def __init__(self, parts: Any = None, whole: Any = None):
        self.parts, self.whole = parts, whole

    def tree_flatten(self):
        if self.parts is None:
            return (self.whole,), None
        import ray

        def joined(parts: list[Any]) -> Any:
            return jax.tree.map(lambda *x: np.concatenate(x), *ray.get(parts))

        return (jax.tree.map(joined, self.parts, is_leaf=lambda x: isinstance(x, list)),), None

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


def actors(cls: type, count: int, cpus: int = 1, gpus: float = 0.0) -> list[Any]:
    """Ray actors of a class, each with so many cores and GPUs of its own; one that dies is
    restarted, and its call repeated. Ray is connected.
    """
    import ray

    # NPROC is the one setting that holds XLA's thread pool to a core; it must be there before jax
    # is
    environment = {"NPROC": str(cpus), "JAX_PLATFORMS": "" if gpus else "cpu"}
    if gpus:
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(0.9 * min(gpus, 1.0))
    cache = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if cache:
        environment["JAX_COMPILATION_CACHE_DIR"] = cache
    actor = ray.remote(cls).options(
        num_cpus=cpus,
        num_gpus=gpus,
        max_restarts=-1,
        max_task_retries=TASK_RETRIES,
        runtime_env={"env_vars": environment},
    )
    return [actor.remote() for _ in range(count)]


def process_ids(workers: Sequence[Any]) -> list[int]:
    """Of actors that have a method `pid`."""
    import ray

    return ray.get([worker.pid.remote() for worker in workers])


def end(workers: Sequence[Any], connected: bool) -> None:
    """Ends actors, and if it was made by `connect` the connection, with it a local cluster."""
    import ray

    for worker in workers:
        ray.kill(worker)
    if connected:
        ray.shutdown()


def assigned(loads: Sequence[float], workers: int) -> list[int]:
    """The worker of each part: the largest load first, each to the worker that has the least."""
    totals, found = np.zeros(workers), [0] * len(loads)
    for part in sorted(range(len(loads)), key=lambda i: -loads[i]):
        found[part] = int(np.argmin(totals))
        totals[found[part]] += loads[part]
    return found


class Remote:
    """The estimator's particles, divided over `workers` actors of `cpus_per_worker` cores each.

    `costs`: what a particle of each member of a mixture takes of a worker's time, on any scale;
    None takes them for equal. They decide who does what, never the result.
    """

    def __init__(
        self,
        estimator: ParticleEstimator | Mixture,
        workers: int,
        address: str | None = None,
        cpus_per_worker: int = 1,
        gpus_per_worker: float = 0.0,
        costs: Sequence[float] | None = None,
    ):
        self._estimator, count = estimator, len(members(estimator))
        self._parts = [
            Part(member, int(part.first_particle), part.particles)
            for member, part in divided(estimator, workers)
        ]
        costs = [1.0] * count if costs is None else costs
        if len(costs) != count or not all(0 < cost < math.inf for cost in costs):
            raise ValueError(f"`costs` must be {count} positive numbers, got {costs}")
        self._connected = connect(address, cpus=workers * cpus_per_worker)
        import ray

        self._ray = ray
        # one object, in which data that several members share are once
        self._reference = [ray.put(jax.device_get(estimator))]
        self._workers = actors(Worker, workers, cpus_per_worker, gpus_per_worker)
        loads = [part.particles * costs[part.member] for part in self._parts]
        self._hosts = [self._workers[host] for host in assigned(loads, workers)]

    def init(self, theta: Theta, key: Key) -> RemoteState:
        theta, keys_data = jax.device_get((theta, self._keys(key)))
        calls = [
            host.init.remote(self._reference, part, theta, keys_data[part.member])
            for host, part in zip(self._hosts, self._parts, strict=True)
        ]
        return RemoteState(self._by_member(calls))

    def estimate(self, theta: Theta, state: RemoteState, key: Key) -> tuple[Estimate, RemoteState]:
        theta, keys_data = jax.device_get((theta, self._keys(key)))
        calls = [
            host.estimate.options(num_returns=2).remote(
                self._reference, part, theta, particles, keys_data[part.member]
            )
            for host, part, particles in zip(
                self._hosts, self._parts, self._split(state), strict=True
            )
        ]
        estimates = self._ray.get([estimate for estimate, _ in calls])
        state = RemoteState(self._by_member(particles for _, particles in calls))
        counts = self._by_member(part.particles for part in self._parts)
        if not isinstance(self._estimator, Mixture):
            return combine(estimates, counts), state
        pairs = zip(self._by_member(estimates), counts, strict=True)
        return self._estimator.weighted([combine(*pair) for pair in pairs]), state

    def _keys(self, key: Key) -> list[jax.Array]:
        return [jax.random.key_data(key) for key in keys(self._estimator, key)]

    def _by_member(self, of_parts: Iterable[Any]) -> Any:
        """What there is of the parts, in order, in a list for each member of a mixture."""
        pairs = list(zip(of_parts, self._parts, strict=True))
        grouped = tuple(
            [x for x, part in pairs if part.member == i]
            for i in range(len(members(self._estimator)))
        )
        return grouped if isinstance(self._estimator, Mixture) else grouped[0]

    def _split(self, state: RemoteState) -> list[Any]:
        if state.parts is not None:
            return jax.tree.leaves(state.parts)
        whole = jax.device_get(state.whole)
        states = whole if isinstance(self._estimator, Mixture) else (whole,)
        ranges = [slice(part.first, part.first + part.particles) for part in self._parts]
        return [
            jax.tree.map(lambda x, rows=rows: x[rows], states[part.member])
            for part, rows in zip(self._parts, ranges, strict=True)
        ]

    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return process_ids(self._workers)

    def compilations(self) -> int:
        """How often the workers have compiled anything: after the first step, never again."""
        return sum(self._ray.get([worker.compilations.remote() for worker in self._workers]))

    def close(self) -> None:
        """Ends the workers, and the connection (with it a local cluster) if it was made here."""
        end(self._workers, self._connected)
