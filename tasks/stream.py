"""Rows that stay on the host, in memory or in a file: data larger than the device.

A program holds none of them; it calls back for those it needs. One call for a whole block of steps,
while the next block is fetched in the background, costs far less than a call per step.
"""

import collections
import functools
import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters import partial_eval

BLOCKS = 5  # at most, of a truncation: the first is waited for, the others are fetched meanwhile
CHUNK = 4096  # rows that the host reads at a time when it goes through all of them


class HostArray:
    """An array [N, ...] of which programs `take` rows. A pytree without leaves, compared by
    identity; its `repr` is a hash of its content.

    Args:
      array: numpy, also mapped from a file.
      order: [N] numbers of the rows of `array` that these are, so that a file need not be permuted.
      origin: (function, arguments) that give this object again in another process, instead of its
        content.
    """

    def __init__(
        self,
        array: np.ndarray,
        order: np.ndarray | None = None,
        origin: tuple[Callable[..., "HostArray"], tuple] | None = None,
    ):
        # numpy would copy an unaligned one (floats in a mapped file) at every take
        self._array = np.require(array, requirements=("A", "C"))
        self._order = np.arange(len(array)) if order is None else order
        self._origin = origin
        self._lock = threading.Lock()
        self._fetched: collections.OrderedDict[bytes, Future] = collections.OrderedDict()
        self.fetched_ahead = 0  # blocks that were asked for after they had been announced

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self._order), *self._array.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return self._array.dtype

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """On the host."""
        return self._array[self._order[rows]]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of dtype, shape and content."""
        return hash_rows(hashlib.sha256(), self).hexdigest()

    def __repr__(self) -> str:
        # it is in the text of programs, where it tells those that call back for other data apart
        return f"HostArray({self.fingerprint})"

    def __reduce__(self) -> tuple:
        return self._origin or (HostArray, (self._array, self._order))

    def take(self, rows: jax.Array) -> jax.Array:
        """[*rows.shape, ...]; under vmap one call gets the numbers of all."""
        return self.gather([rows])[0]

    def gather(self, rows: list[jax.Array], following: Sequence[jax.Array] = ()) -> list[jax.Array]:
        """`take` of each of `rows`; meanwhile those of `following`, with which the next call will
        come, are fetched. They are not if their first number is negative.

        What is returned depends on `rows` alone.
        """
        shapes = [jax.ShapeDtypeStruct((*r.shape, *self.shape[1:]), self.dtype) for r in rows]
        if jax.default_backend() != "cpu":
            return jax.pure_callback(
                self._read, shapes, rows, following, vmap_method="broadcast_all"
            )
        # On CPUs jax.pure_callback takes 20 times as long. It copies operands of 100 KiB in a pool
        # of threads, which may all be waiting for that: several devices came to a halt.
        write = buffer_callback(self._write, shapes, vmap_method="broadcast_all")
        return write(rows, following)

    def _write(self, context: Any, out: list[Any], rows: list[Any], following: list[Any]) -> None:
        del context
        self._read(rows, following, [np.asarray(buffer) for buffer in out])

    def _read(self, rows: list[Any], following: list[Any], out: Any = None) -> list[np.ndarray]:
        rows, following = ([np.asarray(r) for r in numbers] for numbers in (rows, following))
        with self._lock:
            future = self._fetched.pop(_key(rows), None)
            self.fetched_ahead += future is not None
        if future is None:
            found = self._fetch(rows, out)
        else:
            found = future.result()
            for buffer, block in zip(found if out is None else out, found, strict=True):
                np.copyto(buffer, block)
        # not before: it would compete with the fetch that is waited for
        if following and following[0].flat[0] >= 0:
            self._begin([np.array(r) for r in following])
        return found

    def _fetch(self, rows: list[np.ndarray], out: list[np.ndarray] | None = None) -> list:
        out = out or [np.empty((*r.shape, *self.shape[1:]), self.dtype) for r in rows]
        for r, buffer in zip(rows, out, strict=True):
            # "raise" would go through a copy
            np.take(self._array, self._order[r], axis=0, out=buffer, mode="clip")
        return out

    def _begin(self, rows: list[np.ndarray]) -> None:
        future: Future = Future()

        def fetch() -> None:
            try:
                future.set_result(self._fetch(rows))
            except BaseException as error:  # it is raised where the block is asked for
                future.set_exception(error)

        with self._lock:
            if _key(rows) in self._fetched:
                return
            # one for each device: what was announced and never asked for makes room
            while len(self._fetched) >= jax.local_device_count():
                self._fetched.popitem(last=False)
            self._fetched[_key(rows)] = future
        threading.Thread(target=fetch, daemon=True).start()


jax.tree_util.register_static(HostArray)


def _key(rows: list[np.ndarray]) -> bytes:
    return b"".join(r.tobytes() for r in rows)


def hash_rows(digest: Any, array: Any) -> Any:
    """`digest` (of hashlib) after dtype, shape and content of `array`, a part of it at a time."""
    digest.update(f"{array.dtype}{array.shape}".encode())
    for start in range(0, len(array), CHUNK):
        digest.update(np.ascontiguousarray(array[start : start + CHUNK]).tobytes())
    return digest


def _is_host(node: Any) -> bool:
    return isinstance(node, HostArray)


def host_arrays(tree: Any) -> list[HostArray]:
    """Those in a pytree, in its order; twice what is in it twice."""
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=_is_host) if _is_host(leaf)]


class _StandIn:
    """In the place of a host array while a draw is traced: notes which rows are taken, and gives
    what is `given` for them, in this order, or zeros.
    """

    def __init__(self, array: HostArray, given: list[jax.Array] | None):
        self.shape, self.dtype, self.given, self.rows = array.shape, array.dtype, given, []

    def take(self, rows: jax.Array) -> jax.Array:
        self.rows.append(rows)
        if self.given is None:
            return jnp.zeros((*rows.shape, *self.shape[1:]), self.dtype)
        return self.given[len(self.rows) - 1]


def _with_stand_ins(task: Any, given: list | None = None) -> tuple[Any, list[_StandIn]]:
    stand_ins: list[_StandIn] = []

    def replaced(node: Any) -> Any:
        if not _is_host(node):
            return node
        stand_ins.append(_StandIn(node, given[len(stand_ins)] if given else None))
        return stand_ins[-1]

    return jax.tree.map(replaced, task, is_leaf=_is_host), stand_ins


def scan_blocks(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    task: Any,
    draw: Callable[[Any, jax.Array], Any],
    keys: jax.Array,
    remat: bool = False,
) -> tuple[Any, Any]:
    """As `tasks.base.scan_steps`, the rows of a whole block of steps at a time; the number of
    blocks is the largest divisor of the number of steps up to BLOCKS.

    `draw` must take its rows outside of vmaps and loops of its own, and which it takes may depend
    on its key and on arrays of the task, not on other rows.
    """

    def rows_of(key: jax.Array) -> list[list[jax.Array]]:
        replaced, stand_ins = _with_stand_ins(task)
        draw(replaced, key)
        return [stand_in.rows for stand_in in stand_ins]

    def block(carry: Any, numbers: tuple) -> tuple[Any, Any]:
        keys, rows, following = numbers
        given = [
            array.gather(*both)
            for array, *both in zip(host_arrays(task), rows, following, strict=True)
        ]

        def one(carry: Any, numbered: tuple) -> tuple[Any, Any]:
            index, key = numbered
            # not the inputs of the scan, which would be transposed where particles are vmapped
            here = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, 0, False), given)
            return step(carry, draw(_with_stand_ins(task, here)[0], key))

        numbered = jnp.arange(len(keys)), keys
        return jax.lax.scan(jax.checkpoint(one) if remat else one, carry, numbered)

    count = max(n for n in range(1, BLOCKS + 1) if len(keys) % n == 0)
    keys = keys.reshape(count, -1)
    rows = jax.vmap(jax.vmap(_without_dead_code(rows_of, keys[0, 0])))(keys)
    following = jax.tree.map(lambda r: jnp.concatenate([r[1:], jnp.full_like(r[:1], -1)]), rows)
    carry, outputs = jax.lax.scan(block, carry, (keys, rows, following))
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)


def _without_dead_code(function: Callable, *args: Any) -> Callable:
    """`function` for arguments like `args`: of a draw that is only to tell its rows, what is made
    of them is left out.
    """
    closed, out = jax.make_jaxpr(function, return_shape=True)(*args)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, True, instantiate=True)
    live = jaxpr_as_fun(ClosedJaxpr(jaxpr, closed.consts))
    return lambda *args: jax.tree.unflatten(jax.tree.structure(out), live(*jax.tree.leaves(args)))
