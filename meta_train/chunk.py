"""How many particles a core works on at a time: as many as its cache can hold."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr

from meta_train.memory import bodies

CACHE = 2**21  # bytes of second-level cache that one core of a server has


def mapped(function: Callable, *stacked: Any) -> Any:
    """vmap of `function` over arguments [count, ...], a chunk after the other. Chunks are the
    largest equal ones whose working set stays in the cache.
    """
    count = len(jax.tree.leaves(stacked)[0])
    first = jax.eval_shape(lambda xs: jax.tree.map(lambda x: x[0], xs), stacked)
    fits = CACHE // working_set(function, *first)
    size = max(n for n in range(1, min(count, max(fits, 1)) + 1) if count % n == 0)
    if size == count > 1:
        return jax.vmap(function)(*stacked)
    if size == 1:
        # large matrix products under a vmap of one took three times as long
        return jax.lax.map(lambda xs: function(*xs), stacked)
    chunks = jax.tree.map(lambda x: x.reshape(count // size, size, *x.shape[1:]), stacked)
    found = jax.lax.map(lambda chunk: jax.vmap(function)(*chunk), chunks)
    return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), found)


def working_set(function: Callable, *args: Any) -> int:
    """About the bytes that a call touches again and again, if it loops: the state of the loop, and
    twice the largest array that an iteration computes (as one operation reads it, another writes
    the next). 1 if it does not loop.
    """
    jaxpr = jax.make_jaxpr(function)(*args)
    sizes = [1]
    for loop in (eqn for eqn in _equations(jaxpr.jaxpr) if eqn.primitive.name == "scan"):
        first = loop.params["num_consts"]
        carry = loop.invars[first : first + loop.params["num_carry"]]
        computed = [
            _bytes(v)
            for eqn in _equations(loop.params["jaxpr"].jaxpr)
            if "callback" not in eqn.primitive.name  # rows from the host come for many steps
            for v in eqn.outvars
        ]
        sizes.append(sum(map(_bytes, carry)) + 2 * max(computed, default=0))
    return max(sizes)


def _bytes(variable: Any) -> int:
    shape, dtype = variable.aval.shape, variable.aval.dtype
    return math.prod(shape) * dtype.itemsize if isinstance(dtype, np.dtype) else 0  # no keys


def _equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """All equations, those inside of calls and loops too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for body in bodies(eqn.params):
            yield from _equations(body)
