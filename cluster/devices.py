"""A CPU as several devices, one per core: what divides particles between devices then keeps every
core busy with programs of its own, instead of all cores with the small loops of one.
"""

import os

import jax


def one_per_core() -> None:
    """Asks jax for as many CPU devices as this process has cores. Changes nothing where jax is
    already in use, or a number was asked for.
    """
    asked = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if asked or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    # not every system restricts processes to some cores
    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    try:
        jax.config.update("jax_num_cpu_devices", len(affinity(0)))
    except RuntimeError:  # jax has its devices
        return
