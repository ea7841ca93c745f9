"""Maximal-update parametrization around optimizers and rules: wide networks train as narrow ones do
(arXiv 2203.03466; for learned optimizers arXiv 2406.00153).

In a mu-parametrized network of width n all gradients that belong to the width are of order 1/n.
Multiplied by n they are of order 1, and Adam-like and learned rules answer with steps of order 1.
Those of a hidden matrix are then divided by n, as its n inputs add up; those of other tensors are
not. The product of both factors is the published rule for SGD, so they serve it as well.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from learned_opt import base, fields
from learned_opt.mup_roles import (
    Multipliers,
    Override,
    check_overrides,
    find,
    leaves,
    mup_multipliers,
)
from learned_opt.small_fc import SmallFC
from learned_opt.velo import Velo

__all__ = ["MuP", "Multipliers", "mup", "mup_multipliers"]


def mup(
    optimizer: optax.GradientTransformation,
    multipliers: Multipliers | Any | Callable[[base.Params], Multipliers],
) -> optax.GradientTransformationExtraArgs:
    """An optimizer under mu-parametrization, e.g. `mup(optax.adam(1e-3), mup_multipliers(params,
    base_params))`. Its state is that of `optimizer`.

    It holds for optimizers whose updates are of order 1 in every element (Adam, Lion, learned
    rules) or linear in the gradients (SGD). It does not for those that make them relative to a
    norm of the tensor or of the params (LAMB, LARS, Adafactor, Muon): `coordcheck` shows it. A
    weight decay within `optimizer` is multiplied as its updates are; one that should not depend on
    the width stands outside, as that of `compose.finish(mup(...), ...)` does.

    Args:
      multipliers: of `mup_multipliers`; a bare tree of numbers multiplies updates only, as was
        published; or a function that finds them for params. What is not among the params, as under
        `optax.masked`, is left out.

    Raises (at init):
      ValueError: leaves of the params have no multiplier, or one that is not a number.
    """
    inner = optax.with_extra_args_support(optimizer)

    def of(tree: base.Params) -> Multipliers:
        found = _of(multipliers, tree)
        for what, scales in zip(found._fields, found, strict=True):
            numbers = None if scales is None else leaves(scales)
            for name in leaves(tree):
                if numbers is not None and (name not in numbers or jnp.ndim(numbers[name])):
                    raise ValueError(
                        f"`multipliers` ({what}) must have a number for every leaf of the params, "
                        f"got {'an array' if name in numbers else 'none'} for {name}"
                    )
        return found

    def init(params: base.Params) -> optax.OptState:
        of(params)
        return inner.init(params)

    def update(updates, state, params=None, **extra_args):
        step, gradient = of(updates)
        updates = updates if gradient is None else _times(updates, gradient)
        updates, state = inner.update(updates, state, params, **extra_args)
        return _times(updates, step), state

    return optax.GradientTransformationExtraArgs(init, update)


def _of(multipliers: Any, tree: base.Params) -> Multipliers:
    """The forms that `mup` takes them in, as one."""
    found = multipliers(tree) if callable(multipliers) else multipliers
    return found if isinstance(found, Multipliers) else Multipliers(found)


def _times(tree: Any, scales: Any) -> Any:
    """Leaf by leaf, in the leaf's dtype."""
    numbers = leaves(scales)
    return jax.tree.structure(tree).unflatten(
        x * jnp.asarray(numbers[name], jnp.result_type(x)) for name, x in leaves(tree).items()
    )


@dataclasses.dataclass(frozen=True)
class MuP:
    """A rule under mu-parametrization, see `mup`; theta is the rule's.

    Args:
      multipliers: of the model to be trained, as `mup` takes them. None, as it is exported: those
        of `mup_multipliers(params, base_width=base_width, overrides=overrides)`, which go by the
        names of leaves.
      base_width: sizes count in units of it, so that dense layers of this width are not scaled; 1
        as published.
      overrides: as those of `mup_multipliers`, for names that say nothing.
      scale_gradients: False gives the rule the gradients as they are, as published: then constants
        such as the epsilon of its normalisation count for more, the wider a network is.

    Raises:
      ValueError: the rule makes its steps relative to its params, which shrink with the width, or
        is one of these itself.
    """

    rule: base.LearnedOptimizer
    multipliers: Any = None
    base_width: float = 1.0
    overrides: tuple[tuple[str, Override], ...] = ()
    scale_gradients: bool = True

    def __post_init__(self):
        if not isinstance(self.rule, base.LearnedOptimizer) or isinstance(self.rule, type | MuP):
            raise TypeError(f"`rule` must be a plain learned optimizer, got {self.rule!r}")
        check_overrides(self.overrides)
        fields.positive(self, "base_width")
        if getattr(self.rule, "relative_steps", False):
            raise ValueError(
                "`rule` must not make its steps relative to the size of its params, got "
                f"{self.rule}: set relative_steps=False"
            )

    def init(self, key: base.Key) -> base.Theta:
        return self.rule.init(key)

    def optimizer(
        self, theta: base.Theta, horizon: base.Horizon = None
    ) -> optax.GradientTransformationExtraArgs:
        base.check_theta(dataclasses.replace(self, multipliers=None), theta)
        overrides = check_overrides(self.overrides)

        def multipliers(tree: base.Params) -> Multipliers:
            if self.multipliers is None:
                found = find(tree, None, self.base_width, overrides)
            else:
                found = _of(self.multipliers, tree)
            return found if self.scale_gradients else Multipliers(found.step)

        optimizer = mup(self.rule.optimizer(theta, horizon), multipliers)

        def update(updates, state, params=None, **extra_args):
            base.check_update(self, params)
            return optimizer.update(updates, state, params, **extra_args)

        return optax.GradientTransformationExtraArgs(optimizer.init, update)


EXAMPLES = (MuP(SmallFC(hidden=4), base_width=2, overrides=(("", "hidden"),)),)
# of arXiv 2406.00153, but with steps and widths relative to networks of width 128
CONFIGURATIONS = {
    "mulo": MuP(SmallFC(hidden=32), base_width=128),
    "mu_velo": MuP(Velo(lstm=16, bank=8, relative_steps=False), base_width=128),
}
