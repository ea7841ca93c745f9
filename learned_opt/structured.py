"""Learned optimizers with the structure that convergence to a solution needs (arXiv 2305.18577):
an accelerated proximal step of a composite loss F = f + r, whose diagonal preconditioner P,
momentum A and mixing B an LSTM chooses, coordinate by coordinate.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from learned_opt import base, coordinate_lstm, fields
from learned_opt.coordinate_lstm import LSTMState
from learned_opt.proximal import (
    at_least_float32,
    descend,
    gradient_at,
    like,
    over_leaves,
    owned,
    told,
)

MAPS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "sigmoid": lambda z: 2 * jax.nn.sigmoid(z),
    "softplus": jax.nn.softplus,
    "exp": jnp.exp,
    "eye": lambda z: z,
}
# what is learned, by variant; the others are p = 1, b = 1, a = 0, b1 = b2 = 0
PARTS = {
    "P": ("p",),
    "A": ("a",),
    "PA": ("p", "a"),
    "PBA": ("p", "b", "a"),
    "PBA1": ("p", "b", "a", "b1"),
    "PBA2": ("p", "b", "a", "b2"),
    "PBA12": ("p", "b", "a", "b1", "b2"),
}


class Heads(NamedTuple):
    """What the network may choose, arrays like a leaf or numbers, see `StructuredLSTM`."""

    p: Any = 1.0
    b: Any = 1.0
    a: Any = 0.0
    b1: Any = 0.0
    b2: Any = 0.0


class StructuredState(NamedTuple):
    """`x`, like the params, is the solution so far: the last proximal point. The params are the
    point extrapolated from it, where gradients are taken.
    """

    x: Any
    lstm: Any


@dataclasses.dataclass(frozen=True)
class StructuredLSTM:
    """With y the params, g the gradients of f, S = p / L and all operations elementwise,

        v = b (y - S g(y)) + (1 - b) (x - S g(x)) + b1
        x' = prox(v, S),   y' = x' + a (x' - x) + b2.

    An LSTM that sees g and y gives p, b, a, b1, b2, those in `parts`. Without B, one gradient per
    step is enough; with it, that at x is wanted too, see `proximal.gradient_at`.

    Nothing is guaranteed: for p in (0, 2) and a in (0, 2) the iteration may diverge, and it does on
    problems unlike those it was trained on. `safeguard` is what makes any rule converge.

    `init` is torch's initialisation, p = a = 1 up to its noise. Needs neither loss nor horizon, but
    `prox` and `lipschitz`, see `proximal.Proximal`.

    Args:
      parts: which of P, B, A and the offsets b1, b2 are learned.
      p_map, b_map, a_map: of the network's outputs z: sigmoid is 2 / (1 + exp(-z)), softplus, exp,
        eye is z.
      offset_map: of b1 and b2; None: `b_map`, which the published code takes by mistake.
      p_scale, b_scale, a_scale, offset_scale: factors of the maps.
      hidden, layers: sizes of the LSTM.
      state_scale: deviation of its normal initial state, drawn from `seed`, alike for leaves of one
        size; the published one is 1.
    """

    parts: str = "PA"
    p_map: str = "sigmoid"
    b_map: str = "sigmoid"
    a_map: str = "sigmoid"
    offset_map: str | None = "eye"
    p_scale: float = 1.0
    b_scale: float = 1.0
    a_scale: float = 1.0
    offset_scale: float = 1.0
    hidden: int = 20
    layers: int = 2
    state_scale: float = 0.0
    seed: int = 0

    def __post_init__(self):
        fields.one_of(self, "parts", *PARTS)
        for name in ("p_map", "b_map", "a_map"):
            fields.one_of(self, name, *MAPS)
        if self.offset_map is not None:
            fields.one_of(self, "offset_map", *MAPS)
        fields.positive(self, "p_scale", "b_scale", "a_scale", "offset_scale")
        fields.at_least_one(self, "hidden", "layers")
        fields.not_negative(self, "state_scale")

    def init(self, key: base.Key) -> base.Theta:
        keys = jax.random.split(key, 3)
        return {
            "lstm": coordinate_lstm.init(keys[0], 2, self.hidden, self.layers),
            "hidden": coordinate_lstm.dense_init(keys[1], self.hidden, self.hidden),
            "heads": coordinate_lstm.dense_init(keys[2], self.hidden, len(PARTS[self.parts])),
        }

    def optimizer(
        self, theta: base.Theta, horizon: base.Horizon = None
    ) -> optax.GradientTransformationExtraArgs:
        del horizon
        base.check_theta(self, theta)
        theta = base.float32(theta)  # also where init has drawn float64

        def init(params: base.Params) -> StructuredState:
            base.check_params(params)
            start = coordinate_lstm.start(theta["lstm"], params, self.state_scale, self.seed)
            return StructuredState(owned(params), start)

        def update(updates, state, params=None, **extra_args):
            base.check_update(self, params)
            problem = told(self, extra_args)
            y, grads = at_least_float32(params), at_least_float32(updates)
            heads, lstm = over_leaves(
                2, functools.partial(self._heads, theta), y, grads, state.lstm
            )
            step = jax.tree.map(lambda s, h: h.p * s, like(problem.step, y), heads)
            v = descend(y, step, grads)
            if "b" in PARTS[self.parts]:
                other = descend(state.x, step, gradient_at(self, extra_args, state.x))
                v = jax.tree.map(lambda v, u, h: h.b * v + (1 - h.b) * u + h.b1, v, other, heads)
            x = problem.prox(v, step)
            new = jax.tree.map(lambda x, old, h: x + h.a * (x - old) + h.b2, x, state.x, heads)
            moved = optax.tree.sub(new, y)
            return base.like_params(moved, params), StructuredState(x, lstm)

        return optax.GradientTransformationExtraArgs(init, update)

    def _heads(
        self, theta: base.Theta, y: jax.Array, grad: jax.Array, state: LSTMState
    ) -> tuple[Heads, LSTMState]:
        seen = coordinate_lstm.inputs(grad, y)
        out, state = coordinate_lstm.step(theta["lstm"], seen, state)
        out = jax.nn.relu(coordinate_lstm.dense(theta["hidden"], out))
        offset = self.b_map if self.offset_map is None else self.offset_map
        maps = {
            "p": (self.p_map, self.p_scale),
            "b": (self.b_map, self.b_scale),
            "a": (self.a_map, self.a_scale),
            "b1": (offset, self.offset_scale),
            "b2": (offset, self.offset_scale),
        }
        found = {}
        names = PARTS[self.parts]
        for name, z in zip(names, coordinate_lstm.dense(theta["heads"], out), strict=True):
            function, scale = maps[name]
            found[name] = (scale * MAPS[function](z)).astype(y.dtype)
        return Heads(**found), state


EXAMPLES = (StructuredLSTM(hidden=4),)
CONFIGURATIONS = {
    "l2o_pa": StructuredLSTM(),
    "l2o_pa_logistic": StructuredLSTM(p_map="softplus", a_map="softplus", p_scale=2.0, a_scale=0.3),
    "l2o_p": StructuredLSTM(parts="P"),
    "l2o_a": StructuredLSTM(parts="A"),
    "l2o_pba": StructuredLSTM(parts="PBA"),
    "l2o_pba12": StructuredLSTM(parts="PBA12"),
}
