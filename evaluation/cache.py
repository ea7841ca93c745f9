"""Results on disk under the hash of all that determines them; a damaged file is recomputed."""

import hashlib
import inspect
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

SCHEMA = 1  # raise it when the same inputs would give other numbers

Arrays = dict[str, np.ndarray]


def default_directory() -> Path:
    """$LEARNED_OPT_CACHE/baselines, or ~/.cache/learned-opt/baselines."""
    root = os.environ.get("LEARNED_OPT_CACHE") or Path.home() / ".cache" / "learned-opt"
    return Path(root) / "baselines"


def content_hash(family: Any, *parts: Any) -> str:
    """sha256 of a task family (its class, source file, static fields and every array), `parts`
    and the versions of jax and optax."""
    leaves, treedef = jax.tree.flatten(family)
    digest = hashlib.sha256()
    for part in (SCHEMA, jax.__version__, optax.__version__, type(family), treedef, *parts):
        # Functions print their address, which changes from process to process.
        digest.update(re.sub(r" at 0x[0-9a-f]+", "", repr(part)).encode() + b"\0")
    digest.update(_source(family).encode())
    for leaf in leaves:
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)  # noqa: PLW2901
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _source(family: Any) -> str:
    # An edited loss must not be answered with the curves of the old one.
    module = inspect.getmodule(type(family))
    try:
        return inspect.getsource(module) if module else ""
    except (OSError, TypeError):  # defined at a prompt: no file to read
        return ""


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
        np.savez_compressed(file, allow_pickle=False, **{name: arrays[name] for name in names})
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)
    return {name: np.asarray(arrays[name]) for name in names}


def _read(path: Path, names: tuple[str, ...]) -> Arrays | None:
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError):
        return None
