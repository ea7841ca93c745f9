"""An estimator compiled in this process, its particles divided over the process's devices. The
problem's data travel as arguments: they are never baked into the program.
"""

import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from learned_opt.base import Theta
from meta_train.estimators.base import Estimate, Key, ParticleEstimator, compares_particles
from meta_train.estimators.mixture import Mixture

AXIS = "particles"
SPLIT, WHOLE = PartitionSpec(AXIS), PartitionSpec()

# For XLA's CPU backend. Sums may be reordered, as vectors need; NaN and infinity mean what they do
# elsewhere. LLVM's higher levels take longer, for kernels that are no faster.
CPU_OPTIONS: dict[str, bool | int | str] = {
    "xla_backend_optimization_level": 1,
    "xla_cpu_prefer_vector_width": 512,
    "xla_cpu_enable_fast_math": True,
    "xla_cpu_fast_math_honor_nans": True,
    "xla_cpu_fast_math_honor_infs": True,
    "xla_cpu_fast_math_honor_division": True,
    "xla_cpu_fast_math_honor_functions": True,
}


# (array, sharding) -> the array on the devices
Put = Callable[[Any, Any], jax.Array]


def put_once() -> Put:
    """`jax.device_put` that has one copy of an array, however often it is put: many families train
    on the same data.
    """
    known: dict[Any, tuple[Any, jax.Array]] = {}

    def put(leaf: Any, sharding: Any) -> jax.Array:
        if (id(leaf), sharding) not in known:
            # the leaf is held, too: another could get the id of one that is gone
            known[id(leaf), sharding] = leaf, jax.device_put(leaf, sharding)
        return known[id(leaf), sharding][1]

    return put


def compiled(
    estimator: ParticleEstimator | Mixture, devices: Sequence[Any] | None = None
) -> "Compiled | Mixture":
    """The estimator compiled: a mixture member by member."""
    if not isinstance(estimator, Mixture):
        return Compiled(estimator, devices)
    put = put_once()
    programs: Any = tuple(Compiled(member, devices, put) for member in estimator.members)
    return dataclasses.replace(estimator, members=programs)


class Compiled:
    """The same two methods, jitted.

    `devices` (those of this process; of CPU devices no more than there are cores) share the
    particles equally: as many of them are used as divide the number of particles.
    """

    def __init__(
        self,
        estimator: ParticleEstimator,
        devices: Sequence[Any] | None = None,
        put: Put = jax.device_put,
    ):
        self._mesh = Mesh(np.asarray(usable(estimator, devices)), (AXIS,))
        whole = NamedSharding(self._mesh, WHOLE)
        self.estimator = jax.tree.map(lambda leaf: put(leaf, whole), estimator)
        options = CPU_OPTIONS if self._mesh.devices.flat[0].platform == "cpu" else {}
        # the state is not donated: an interrupt between two steps must find the old one whole
        self._init = jax.jit(functools.partial(_init, self._mesh), compiler_options=options)
        self._estimate = jax.jit(functools.partial(_estimate, self._mesh), compiler_options=options)

    @property
    def particles(self) -> int:
        return self.estimator.particles

    def starting_at(self, first_particle: int) -> "Compiled":
        """The same program for as many other particles."""
        other = copy.copy(self)
        first = jax.device_put(first_particle, NamedSharding(self._mesh, WHOLE))
        other.estimator = dataclasses.replace(self.estimator, first_particle=first)
        return other

    def init(self, theta: Theta, key: Key) -> Any:
        return self._init(self.estimator, *self._placed(theta, key))

    def estimate(self, theta: Theta, state: Any, key: Key) -> tuple[Estimate, Any]:
        state = jax.device_put(state, NamedSharding(self._mesh, SPLIT))
        theta, key = self._placed(theta, key)
        estimate, state = self._estimate(self.estimator, theta, state, key)
        return jax.device_put(estimate, self._mesh.devices.flat[0]), state

    def _placed(self, theta: Theta, key: Key) -> tuple[Theta, Key]:
        return jax.device_put((theta, key), NamedSharding(self._mesh, WHOLE))


def usable(estimator: ParticleEstimator, devices: Sequence[Any] | None) -> list[Any]:
    """The most devices that divide the particles; one, where particles are compared."""
    if devices is None:
        devices = jax.local_devices()
        if devices[0].platform == "cpu":
            devices = devices[: os.cpu_count()]
    if compares_particles(estimator):
        return list(devices[:1])
    count = max(n for n in range(1, len(devices) + 1) if estimator.particles % n == 0)
    return list(devices[:count])


def _part(estimator: Any, parts: int) -> Any:
    """This device's share of the particles."""
    particles = estimator.particles // parts
    first = estimator.first_particle + lax.axis_index(AXIS) * particles
    return dataclasses.replace(estimator, particles=particles, first_particle=first)


def _init(mesh: Mesh, estimator: ParticleEstimator, theta: Theta, key: Key) -> Any:
    def on_device(estimator, theta, key):
        return _part(estimator, mesh.size).init(theta, key)

    return _divided(on_device, mesh, (WHOLE, WHOLE, WHOLE), SPLIT)(estimator, theta, key)


def _estimate(mesh: Mesh, estimator: ParticleEstimator, theta: Theta, state: Any, key: Key) -> Any:
    def on_device(estimator, theta, state, key):
        estimate, state = _part(estimator, mesh.size).estimate(theta, state, key)
        return lax.pmean(estimate, AXIS), state

    specs = (WHOLE, WHOLE, SPLIT, WHOLE), (WHOLE, SPLIT)
    return _divided(on_device, mesh, *specs)(estimator, theta, state, key)


def _divided(function: Any, mesh: Mesh, in_specs: Any, out_specs: Any) -> Any:
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
