"""Maximal-update parametrization: one scale for every tensor's gradients and one for its updates,
so that features move as much in a wide network as in a narrow one (arXiv 2203.03466, table 8; for
learned optimizers arXiv 2406.00153).

With n the width, mu-parametrized networks have gradients of order 1/n in every tensor that grows.
Multiplied by n they are of order 1, and so is what Adam-like and learned rules make of them. Of
that hidden matrices take 1/n, as their n inputs add up, and all others all. The product of the two
scales is what plain SGD needs, so they serve every optimizer.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from learned_opt import base, fields
from learned_opt.compose import path_name
from learned_opt.small_fc import SmallFC
from learned_opt.velo import Velo

Shape = tuple[int, ...]
Role = Literal["vector", "input", "hidden", "readout"]
ROLES = ("vector", "input", "hidden", "readout")
Overrides = Mapping[str, str | float] | Sequence[tuple[str, str | float]]

READOUT = r"(^|/)(readout|head|lm_head|logits)(/|$)"
NAMES: tuple[tuple[str, Role], ...] = (
    (r"(^|/)(bias|scale|offset|b)$", "vector"),
    (r"(^|/)(input|stem|patches|\w*embed(ding|dings)?)(/|$)", "input"),
    (READOUT, "readout"),
    (r"(^|/)(hidden|blocks?|layers?)(_?\d+)?(/|$)", "hidden"),
)
SPLITS_HEADS = re.compile(r"(^|/)(query|key|value)(/|$)")  # [inputs, heads, size of a head]
JOINS_HEADS = re.compile(r"(^|/)out(/|$)")  # [heads, size of a head, outputs]


class Multipliers(NamedTuple):
    """Trees of numbers like the params: what updates are multiplied by, and what gradients are
    (None: nothing).
    """

    step: Any
    gradient: Any = None


def mup_multipliers(
    params: base.Params,
    base_params: base.Params | None = None,
    *,
    base_width: float | None = None,
    overrides: Overrides = (),
) -> Multipliers:
    """The multipliers of a model by the widths of its tensors, whose last axis is that of outputs.

    | role | tensor | update | gradient |
    |---|---|---|---|
    | vector | bias, norm | 1 | fan-out |
    | input | embedding, first layer: only outputs grow | 1 | fan-out |
    | hidden | inputs and outputs grow | 1 / fan-in | fan-out |
    | readout | only inputs grow, and the model divides them by their number | 1 | fan-in |

    A readout whose model divides nothing takes `overrides={"head/kernel": "hidden"}`, and zeros as
    initial weights.

    Args:
      params: arrays or shapes (`jax.eval_shape`), as deep as the model to be trained.
      base_params: the same model at another width, where hyperparameters were tuned or a learned
        optimizer was meta-trained: the axes that differ grow, and sizes count relative to those
        here. None: names of leaves say the roles (`NAMES`).
      base_width: sizes count in units of this many inputs or outputs, and `base_params` only shows
        what grows. None: 1 without `base_params`, as published.
      overrides: role or update multiplier of leaves whose path a regular expression is found in,
        e.g. {"router/kernel": "hidden", "mixer": 0.25}; the first that is found counts.

    Raises:
      ValueError: `base_params` has another structure or other ranks; more than two axes grow; the
        role of a leaf is ambiguous, the message says of which; an override is neither a role nor a
        positive number, or matches no leaf.
    """
    chosen = _checked(overrides)
    if base_width is not None and not base_width > 0:
        raise ValueError(f"`base_width` must be positive, got {base_width}")
    if base_params is None and base_width is None:
        base_width = 1.0
    shapes = {name: jnp.shape(leaf) for name, leaf in _leaves(params).items()}
    bases = {} if base_params is None else _bases(shapes, base_params)
    for pattern in chosen:
        if not any(map(pattern.search, shapes)):
            raise ValueError(
                f"`overrides` {pattern.pattern!r} matches none of the paths {', '.join(shapes)}"
            )
    scales = []
    for name, shape in shapes.items():
        override = next((value for p, value in chosen.items() if p.search(name)), None)
        scales.append(_scales(name, shape, bases.get(name), base_width, override))
    unflatten = jax.tree.structure(params).unflatten
    return Multipliers(*(unflatten(scale) for scale in zip(*scales, strict=True)))


def _leaves(tree: Any) -> dict[str, Any]:
    """By path, which is the same for flax's nnx.State and the pure dict that it makes of it."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path).removesuffix("/value"): leaf for path, leaf in paths}


def _checked(overrides: Overrides) -> dict[re.Pattern, str | float]:
    pairs = overrides.items() if isinstance(overrides, Mapping) else overrides
    for pattern, value in pairs:
        known = value in ROLES if isinstance(value, str) else 0 < value < math.inf
        if not known:
            raise ValueError(
                f"`overrides` of {pattern!r} must be a positive number or one of "
                f"{', '.join(ROLES)}, got {value!r}"
            )
    return {re.compile(pattern): value for pattern, value in pairs}


def _bases(shapes: dict[str, Shape], base_params: base.Params) -> dict[str, Shape]:
    bases = {name: jnp.shape(leaf) for name, leaf in _leaves(base_params).items()}
    if differ := bases.keys() ^ shapes.keys():
        raise ValueError(
            "`base_params` must be of the same model at another width, as deep as `params`; "
            f"only one of them has {', '.join(sorted(differ))}"
        )
    for name, shape in shapes.items():
        if len(shape) != len(bases[name]):
            raise ValueError(f"`base_params` {name} is {list(bases[name])}, `params` {list(shape)}")
    return bases


def _named(name: str) -> Role | None:
    return next((role for pattern, role in NAMES if re.search(pattern, name)), None)


def _ambiguous(name: str, shape: Shape, why: str, say: str) -> ValueError:
    return ValueError(
        f"`params` {name} {list(shape)} has an ambiguous role: {why}. "
        f"Say it: overrides={{{name!r}: {say}}}"
    )


def _scales(
    name: str,
    shape: Shape,
    at_base: Shape | None,
    base_width: float | None,
    override: str | float | None,
) -> tuple[float, float]:
    """Multipliers of a leaf's updates and gradients."""
    if at_base is None:
        role = override or ("vector" if len(shape) < 2 else _named(name))
        if role == "vector" and re.search(READOUT, name):  # of as many outputs at every width
            return 1.0, 1.0
        if role is None:
            why = "its name says nothing, and there are no `base_params`"
            raise _ambiguous(name, shape, why, " or ".join(map(repr, ROLES)))
    else:
        role = override or _role_by_growth(name, shape, at_base)
    if base_width is None or shape == at_base:
        assert at_base is not None
        fan_in, fan_out = _growth(shape, at_base)
    else:
        fan_in, fan_out = _sizes(name, shape, role, base_width)
    if not isinstance(role, str):
        return float(role), fan_out
    if role == "readout":
        return 1.0, fan_in
    if role == "vector":  # the bias of several heads may grow in any of its axes
        return 1.0, fan_in * fan_out
    return (1.0 / fan_in if role == "hidden" else 1.0), fan_out


def _axes(shape: Shape, at_base: Shape) -> list[int]:
    return [axis for axis, n in enumerate(shape) if n != at_base[axis]]


def _growth(shape: Shape, at_base: Shape) -> tuple[float, float]:
    """How much the inputs and the outputs grow, 1 for what does not."""
    axes = _axes(shape, at_base)
    if not axes:
        return 1.0, 1.0
    first, last = (shape[axis] / at_base[axis] for axis in (axes[0], axes[-1]))
    if len(axes) == 1:
        return (1.0, last) if axes[0] == len(shape) - 1 else (first, 1.0)
    return first, last


def _role_by_growth(name: str, shape: Shape, at_base: Shape) -> Role:
    """The role by the axes that differ."""
    growing, named = _axes(shape, at_base), _named(name)
    if len(growing) > 2:
        raise ValueError(
            f"`params` {name} {list(shape)} grows in {len(growing)} axes from {list(at_base)}, "
            "which has no rule: let two grow, e.g. the number of heads or their size, not both; "
            f"or give the multiplier of its updates, overrides={{{name!r}: 0.5}}"
        )
    if len(growing) == 2:
        first, second = (shape[axis] / at_base[axis] for axis in growing)
        if first != second and named != "hidden":
            why = f"its axes grow {first:g} and {second:g} times, and which holds its inputs?"
            raise _ambiguous(name, shape, why, f"'hidden' for the first, or {1 / second:g}")
        return "hidden"
    if not growing or named == "vector" or len(shape) < 2:
        return "vector"
    if growing[0] == len(shape) - 1:
        return "input"
    if named == "readout":
        return "readout"
    why = "only its inputs grow; does the model divide them by their number?"
    raise _ambiguous(name, shape, why, "'readout' if it does, 'hidden' if not")


def _sizes(name: str, shape: Shape, role: str | float, unit: float) -> tuple[float, float]:
    """Numbers of inputs and outputs in units of `unit`. Axes before the last are inputs: the window
    of a convolution and heads that are joined count in full.
    """
    if role == "vector" or len(shape) < 2:
        return 1.0, math.prod(shape) / unit
    if len(shape) == 3 and role == "hidden":
        if SPLITS_HEADS.search(name):
            return shape[0] / unit, math.prod(shape[1:]) / unit
        if not JOINS_HEADS.search(name):
            why = "its middle axis may be of its inputs or of its outputs"
            joined, split = unit / math.prod(shape[:-1]), unit / shape[0]
            raise _ambiguous(name, shape, why, f"{joined:g} if of its inputs, else {split:g}")
    return math.prod(shape[:-1]) / unit, shape[-1] / unit


def _times(tree: Any, scales: Any) -> Any:
    """Leaf by leaf, in the leaf's dtype."""
    numbers = _leaves(scales)
    return jax.tree.structure(tree).unflatten(
        x * jnp.asarray(numbers[name], jnp.result_type(x)) for name, x in _leaves(tree).items()
    )


def mup(
    optimizer: optax.GradientTransformation,
    multipliers: Multipliers | Any | Callable[[base.Params], Multipliers],
) -> optax.GradientTransformationExtraArgs:
    """Any optimizer under mu-parametrization, e.g. `mup(optax.adam(1e-3), mup_multipliers(params,
    base_params))`. Its state is that of `optimizer`. A weight decay within `optimizer` is
    multiplied as its updates are; one that should not depend on the width stands outside, as that
    of `compose.finish(mup(...), ...)` does.

    Args:
      multipliers: of `mup_multipliers`; a bare tree of numbers multiplies updates only, as was
        published; or a function that finds them for params.

    Raises (at init):
      ValueError: leaves of the params have no multiplier.
    """
    inner = optax.with_extra_args_support(optimizer)

    def of(tree: base.Params) -> Multipliers:
        found = multipliers(tree) if callable(multipliers) else multipliers
        found = found if isinstance(found, Multipliers) else Multipliers(found)
        for name, scales in zip(found._fields, found, strict=True):
            # more than there are is fine: optax.masked and optax.partition hand over some leaves
            missing = {} if scales is None else _leaves(tree).keys() - _leaves(scales).keys()
            if missing:
                raise ValueError(
                    f"`multipliers` ({name}) must have a number for every leaf of the params, "
                    f"got none for {', '.join(sorted(missing))}"
                )
        return found

    def init(params: base.Params) -> optax.OptState:
        of(params)
        return inner.init(params)

    def update(updates, state, params=None, **extra_args):
        step, gradient = of(updates)
        if gradient is not None:
            updates = _times(updates, gradient)
        updates, state = inner.update(updates, state, params, **extra_args)
        return _times(updates, step), state

    return optax.GradientTransformationExtraArgs(init, update)


@dataclasses.dataclass(frozen=True)
class MuP:
    """Any rule under mu-parametrization, see `mup`; theta is the rule's.

    Args:
      multipliers: of the model to be trained, as `mup` takes them. None, as it is exported: those
        of `mup_multipliers(params, base_width=base_width, overrides=overrides)`, which go by the
        names of leaves.
      base_width: that of meta-training, where nothing is scaled; 1 as published.
      overrides: (regular expression, role or multiplier) for names that say nothing.
      scale_gradients: False gives the rule the gradients as they are, as published: then constants
        such as the epsilon of its normalisation count for more, the wider a network is.

    Raises:
      ValueError: the rule makes its steps relative to its params, which shrink with the width.
    """

    rule: base.LearnedOptimizer
    multipliers: Any = dataclasses.field(default=None, hash=False)
    base_width: float = 1.0
    overrides: tuple[tuple[str, str | float], ...] = ()
    scale_gradients: bool = True

    def __post_init__(self):
        if not isinstance(self.rule, base.LearnedOptimizer) or isinstance(self.rule, type):
            raise TypeError(f"`rule` must be a learned optimizer, got {self.rule!r}")
        _checked(self.overrides)
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
        def by_name(tree: base.Params) -> Multipliers:
            step, gradient = mup_multipliers(
                tree, base_width=self.base_width, overrides=self.overrides
            )
            return Multipliers(step, gradient if self.scale_gradients else None)

        base.check_theta(self, theta)
        multipliers = by_name if self.multipliers is None else self.multipliers
        optimizer = mup(self.rule.optimizer(theta, horizon), multipliers)

        def update(updates, state, params=None, **extra_args):
            base.check_update(self, params)
            return optimizer.update(updates, state, params, **extra_args)

        return optax.GradientTransformationExtraArgs(optimizer.init, update)


EXAMPLES = (MuP(SmallFC(hidden=4), base_width=2, overrides=(("", "hidden"),)),)
# of arXiv 2406.00153, but with steps and widths relative to networks of width 128
CONFIGURATIONS = {
    "mulo": MuP(SmallFC(hidden=32), base_width=128),
    "mu_velo": MuP(Velo(lstm=16, bank=8, step_size=1e-2, relative_steps=False), base_width=128),
}
