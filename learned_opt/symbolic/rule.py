"""A program as an optimizer whose numbers are learned: found by search, tuned by meta-training."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from learned_opt import base, discovery, fields
from learned_opt.symbolic import execution
from learned_opt.symbolic.analysis import dataflow, live, read, simplified
from learned_opt.symbolic.program import Program, ProgramError, constants
from learned_opt.symbolic.programs import LION, PROGRAMS


class SymbolicState(NamedTuple):
    """States that do not matter for the updates are (), so are not kept."""

    count: jax.Array
    m: Any
    v: Any


@dataclasses.dataclass(frozen=True)
class Symbolic:
    """update = -(what the program returns); the states are float32 like the params.

    Args:
      program: its text, see `symbolic.program`, or the name of a known one: adamw, lion,
        lion_as_found, sgd_momentum.
      schedule: of the input `lr`: "constant" at 1, or "cosine" from 1 to 0, which needs the
        horizon.

    Raises:
      ProgramError: the text is no program, or an ill-typed one; the message names the line.
    """

    program: str = LION
    schedule: str = "constant"

    def __post_init__(self):
        fields.one_of(self, "schedule", "constant", "cosine")
        self.parsed()

    def parsed(self) -> Program:
        if self.program in PROGRAMS:
            return PROGRAMS[self.program]
        if self.program.isidentifier():
            raise ProgramError(discovery.unknown("program", self.program, list(PROGRAMS)))
        return read(self.program, "`program`")

    def init(self, key: base.Key) -> base.Theta:
        """{"moved": zeros [constants]}: how far every constant that matters, in the order of the
        text, is moved from what the text says: the logarithm of a factor, or of what multiplies
        c / (1 - c) where it is a third argument of interpolate between 0 and 1. At zero it is
        exactly what the text says.

        Tuned by evolution strategies: derivatives of some programs are not finite where a gradient
        is zero, as that of sqrt.
        """
        del key
        count = len(execution.places(simplified(self.parsed())))
        return {"moved": jnp.zeros((count,), jnp.float32)}

    def constants(self, theta: base.Theta) -> jax.Array:
        """[constants] float32."""
        program = simplified(self.parsed())
        written = jnp.asarray(execution.places(program), jnp.float32)
        decays = np.array(
            [
                program.statements[i].operator == "interpolate" and position == 2 and 0.0 < x < 1.0
                for i, position, x in constants(program)
            ],
            bool,
        )
        # 0.5 where there is no decay, so that no branch divides by zero
        decay = jnp.where(decays, written, 0.5)
        moved_decay = decay / (decay + (1.0 - decay) * jnp.exp(-theta["moved"]))
        return jnp.where(decays, moved_decay, written * jnp.exp(theta["moved"]))

    def optimizer(
        self, theta: base.Theta, horizon: base.Horizon = None
    ) -> optax.GradientTransformationExtraArgs:
        base.check_theta(self, theta)
        program = simplified(self.parsed())
        needed = live(dataflow(program))[1]
        numbers = list(self.constants(theta))
        schedule = cosine(base.require_horizon(self, horizon)) if self.schedule == "cosine" else one

        def init(params: base.Params) -> SymbolicState:
            base.check_params(params)
            zeros = lambda: jax.tree.map(lambda p: jnp.zeros(jnp.shape(p), jnp.float32), params)  # noqa: E731
            states = (zeros() if name in needed else () for name in ("m", "v"))
            return SymbolicState(jnp.zeros((), jnp.int32), *states)

        def update(updates, state, params=None, **extra_args):
            del extra_args
            base.check_update(self, params)
            treedef = jax.tree.structure(updates)
            if not treedef.num_leaves:
                return updates, state
            trees = {"w": params, "g": updates, "m": state.m, "v": state.v}
            inputs: dict[str, Any] = {
                name: jax.tree.leaves(base.float32(tree)) for name, tree in trees.items()
            }
            inputs["lr"] = schedule(state.count)
            outputs = execution.run(program, execution.Tree(), inputs, numbers)
            steps = treedef.unflatten([-u for u in outputs["update"]])
            states = (treedef.unflatten(outputs[s]) if s in needed else () for s in ("m", "v"))
            return base.like_params(steps, params), SymbolicState(state.count + 1, *states)

        return optax.GradientTransformationExtraArgs(init, update)


def one(count: jax.typing.ArrayLike) -> jax.Array:
    """The constant schedule."""
    del count
    return jnp.float32(1.0)


def cosine(horizon: int | jax.Array) -> optax.Schedule:
    """From 1 to 0 in `horizon` steps, 0 afterwards."""
    return lambda count: 0.5 * (1.0 + jnp.cos(math.pi * jnp.clip(count / horizon, 0.0, 1.0)))


EXAMPLES = (Symbolic(),)
