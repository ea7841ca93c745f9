"""Results on disk under the hash of all that determines them; a damaged file is recomputed."""

import dataclasses
import functools
import hashlib
import os
import re
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from evaluation.baselines import Baseline, Scheduled
from tasks.base import Key, TaskFamily, train_step
from tasks.data import cache_directory

SCHEMA = 2  # raise it when the same inputs would give other numbers

Arrays = dict[str, np.ndarray]


def default_directory() -> Path:
    """The sub-folder of baselines in the cache directory."""
    return cache_directory() / "baselines"


def content_hash(family: TaskFamily, *parts: Any) -> str:
    """sha256 of a task family (the program of a training step and every array), of `parts` (of a
    baseline also its program), and of the versions of jax and optax."""
    digest = hashlib.sha256()
    programs = [_family_program(_Same(family))]
    programs += [_baseline_program(part) for part in parts if isinstance(part, Baseline)]
    for part in (SCHEMA, jax.__version__, optax.__version__, *parts, *programs):
        digest.update(_without_addresses(repr(part)).encode() + b"\0")
    for leaf in jax.tree.leaves(family):
        digest.update(_bytes(leaf))
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class _Same:
    """Compares by identity of what it holds."""

    value: Any

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


@functools.lru_cache(maxsize=64)
def _family_program(family: _Same) -> str:
    return _program(_task_step, family.value, jax.random.key(0))


def _program(function: Callable, *args: Any) -> str:
    """What `function` computes, as text: functions held in static fields have no other name that
    lasts longer than the process, and an edited one keeps its name."""
    closed = jax.make_jaxpr(function)(*args)
    consts = hashlib.sha256(b"".join(_bytes(const) for const in closed.consts)).hexdigest()
    return _without_addresses(str(closed)) + consts


def _task_step(family: TaskFamily, key: Key) -> Any:
    task, optimizer = family(key), optax.sgd(1.0)
    params = task.init(key)
    batches = [task.batch(key, split) for split in ("train", "valid", "test")]
    step = train_step(task, optimizer, params, optimizer.init(params), batches[0])
    return step, [task.normalize(task.loss(params, batch)) for batch in batches]


def _baseline_program(baseline: Baseline) -> str:
    def step(params):
        optimizer = Scheduled(baseline.make, 10)({name: v[0] for name, v in hypers.items()})
        return optimizer.update(params, optimizer.init(params), params)

    hypers = baseline.grid()
    return _program(step, {"w": jnp.ones((2, 3)), "b": jnp.ones(3)})


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _bytes(leaf: Any) -> bytes:
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.ascontiguousarray(leaf)
    return f"{array.shape}{array.dtype}".encode() + array.tobytes()


def cached(path: Path, names: tuple[str, ...], compute: Callable[[], Arrays]) -> Arrays:
    """The arrays called `names` in `path`, or else `compute()`, which is then stored there.

    A file that is truncated, damaged (zip checksums) or lacks a name is computed again and
    replaced. Writing is atomic, so two processes may share a directory.
    """
    stored = _read(path, names)
    if stored is not None:
        return stored
    arrays = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            np.savez_compressed(file, allow_pickle=False, **{name: arrays[name] for name in names})
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    return {name: np.asarray(arrays[name]) for name in names}


def _read(path: Path, names: tuple[str, ...]) -> Arrays | None:
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError):
        return None
