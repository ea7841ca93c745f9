"""REPLAY (arXiv 2503.13751): the exact gradient of a whole episode from logarithmically many stored
states. The episode is a tree of windows; what a node needs is computed again when it is its turn.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from learned_opt.base import Theta
from meta_train.estimators import base
from meta_train.estimators.bptt import whole_episodes
from meta_train.unroll import InnerProblem, Walk


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Replay:
    """What `FullBPTT` computes, for long episodes of few particles.

    An episode of W windows is a tree of about log_arity(W) levels, whose nodes have at most `arity`
    children. Backpropagation holds the children's start states of one node per level, so at most
    arity * log_arity(W) inner states and the steps of one window, and runs the episode once per
    level and once more. Reverse-mode differentiation is exact, and as chaotic as the episode.
    The state is the number of episodes, int32 [particles].
    """

    truncated: ClassVar[bool] = False
    backpropagates: ClassVar[bool] = True
    problem: InnerProblem = base.UNBOUND
    particles: int = base.static(16)
    arity: int = base.static(4)
    first_particle: int | jax.Array = 0

    def __post_init__(self):
        base.check_particles(self)
        if not isinstance(self.arity, int) or self.arity < 2:
            raise ValueError(f"`arity` must be an integer of at least 2, got {self.arity!r}")

    @property
    def unrolls(self) -> int:
        return self.problem.windows

    init = base.no_episodes

    def estimate(
        self, theta: Theta, state: jax.Array, key: base.Key
    ) -> tuple[base.Estimate, jax.Array]:
        return whole_episodes(self, theta, state, key, tree(self.arity))


def tree(arity: int) -> Walk:
    """Takes the windows in their order, as the leaves of a tree."""

    def walk(step: Callable[[Any, base.Key], Any], carry: Any, keys: jax.Array) -> Any:
        windows = len(keys)
        shape = levels(windows, arity)
        slots = jnp.arange(math.prod(shape))

        def window(carry, slot):
            index, key = slot
            if len(slots) == windows:
                return step(carry, key), None
            # the same for all particles, so it stays a branch when they are vmapped
            return lax.cond(index < windows, step, lambda carry, key: carry, carry, key), None

        def node(child, carry, children):
            # stores the carry before each child, and nothing of what happens inside of it
            return lax.scan(jax.checkpoint(child, prevent_cse=False), carry, children)[0], None

        root: Callable[[Any, Any], Any] = window
        for _ in shape:
            root = functools.partial(node, root)
        of_slot = keys[jnp.minimum(slots, windows - 1)]
        return root(carry, jax.tree.map(lambda x: x.reshape(shape), (slots, of_slot)))[0]

    return walk


def levels(windows: int, arity: int) -> tuple[int, ...]:
    """How many children the nodes of each level have, from the root: the fewest levels of at most
    `arity` that hold all windows, and these as even as can be.
    """
    depth = 1
    while arity**depth < windows:
        depth += 1
    shape = []
    for below in range(depth, 0, -1):
        children = next(n for n in itertools.count(1) if n**below >= windows)
        shape.append(children)
        windows = -(-windows // children)
    return tuple(shape)


EXAMPLES = (Replay(particles=4, arity=2),)
