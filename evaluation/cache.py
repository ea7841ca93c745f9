"""Results on disk under the hash of all that determines them; a damaged file is recomputed."""

import functools
import hashlib
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from evaluation.atomic import replacing
from evaluation.baselines import Baseline, Scheduled
from tasks.base import Key, TaskFamily, behind, train_step
from tasks.data import SPLITS, cache_directory

SCHEMA = 2  # raise it when the same inputs would give other numbers

Arrays = dict[str, np.ndarray]


def default_directory() -> Path:
    """$LEARNED_OPT_CACHE/baselines, or ~/.cache/learned-opt/baselines."""
    return cache_directory() / "baselines"


def content_hash(family: TaskFamily, baseline: Baseline, *parts: Any) -> str:
    """sha256 of what trains: the program that `baseline` and `family` trace to, every array of the
    family, and by their `repr` the baseline, `parts` and the versions of jax and optax.

    An edited loss, model or optimizer is another program, wherever its code is. Python that the
    program calls back into is known by its name only. The program is traced once per process for a
    family (by identity) and `baseline.make`.
    """
    digest = hashlib.sha256(_traced(_Same(family), baseline.make))
    for part in (SCHEMA, jax.__version__, optax.__version__, baseline, *parts):
        digest.update(_text(part) + b"\0")
    return digest.hexdigest()


class _Same:
    """Equal when it holds the same object. It keeps the object alive, so no other gets its id."""

    def __init__(self, held: Any):
        self.held = held

    def __hash__(self) -> int:
        return id(self.held)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.held is other.held


@functools.lru_cache(maxsize=128)
def _traced(same: _Same, make: Callable) -> bytes:
    family = same.held

    def program(family: TaskFamily, key: Key, hyper: dict[str, jax.Array]) -> Any:
        """All that a training curve is made of, once."""
        task = family(key)
        optimizer = behind(task, Scheduled(make, steps=1)(hyper))
        params = task.init(key)
        batches = [task.batch(key, split) for split in SPLITS]
        stepped = train_step(task, optimizer, params, optimizer.init(params), batches[0])
        losses = [task.loss(params, batch) for batch in batches[1:]]
        return params, batches, stepped, losses, task.normalize(losses[0])

    hyper = dict.fromkeys(("learning_rate", "cosine", "weight_decay"), jnp.zeros(()))
    traced, shapes = jax.make_jaxpr(program, return_shape=True)(family, jax.random.key(0), hyper)
    digest = hashlib.sha256(_text(jax.tree.structure(shapes)))  # names of parameters
    for piece in (*_value(traced), *map(_array, jax.tree.leaves(family))):
        digest.update(piece + b"\0")
    return digest.digest()


def _value(value: Any) -> Iterator[bytes]:
    """A parameter of an equation, with any program in it."""
    if isinstance(value, ClosedJaxpr):
        yield from map(_array, value.consts)
        yield from _equations(value.jaxpr)
    elif isinstance(value, Jaxpr):
        yield from _equations(value)
    elif isinstance(value, tuple | list):
        yield str(len(value)).encode()
        for item in value:
            yield from _value(item)
    elif isinstance(value, jax.Array | np.ndarray):
        yield _array(value)
    else:
        yield _text(value)


def _equations(jaxpr: Jaxpr) -> Iterator[bytes]:
    """The equations, variables numbered as they appear.

    jax's own text elides arrays, and depends on which inner programs happen to be one object.
    """
    numbers: dict[Any, int] = {}

    def atoms(several: Any) -> Iterator[bytes]:
        for atom in several:
            if isinstance(atom, Literal):
                yield _array(atom.val)
            else:
                yield f"{numbers.setdefault(atom, len(numbers))}".encode()
            yield _text(atom.aval)

    yield from atoms((*jaxpr.constvars, *jaxpr.invars))
    for equation in jaxpr.eqns:
        yield equation.primitive.name.encode()
        yield from atoms(equation.invars)
        for name, value in sorted(equation.params.items()):
            yield name.encode()
            yield from _value(value)
        yield from atoms(equation.outvars)
    yield from atoms(jaxpr.outvars)


def _array(value: Any) -> bytes:
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    array = np.asarray(value)
    return f"{array.shape}{array.dtype}".encode() + array.tobytes()


def _text(value: Any) -> bytes:
    # Functions print their address, which changes from process to process.
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value)).encode()


def cached(path: Path, names: tuple[str, ...], compute: Callable[[], Arrays]) -> Arrays:
    """The arrays called `names` in `path`, or else `compute()`, which is then stored there.

    A file that is truncated, damaged (zip checksums) or lacks a name is computed again and
    replaced. Writing is atomic, so two processes may share a directory.
    """
    stored = read(path, names)
    if stored is not None:
        return stored
    arrays = compute()
    with replacing(path) as file:
        np.savez_compressed(file, allow_pickle=False, **{name: arrays[name] for name in names})
    return {name: np.asarray(arrays[name]) for name in names}


def read(path: Path, names: tuple[str, ...]) -> Arrays | None:
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError):
        return None
