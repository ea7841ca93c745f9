"""What mu-parametrization multiplies a model's gradients and updates by: numbers for every tensor,
by the role that it plays when the width grows (arXiv 2203.03466, table 8; for learned optimizers
arXiv 2406.00153).
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey

from learned_opt.base import Params
from learned_opt.compose import check_found, compiled, path_name

Shape = tuple[int, ...]
Override = str | float | tuple[float, float]
Overrides = Mapping[str, Override] | Sequence[tuple[str, Override]]

ROLES = ("vector", "input", "hidden", "readout")
EMBEDDING = r"(^|/)\w*embed(ding|dings)?(/|$)"
NAMES = {
    "vector": r"(^|/)(bias|scale|offset|b)$",
    "input": r"(^|/)(input|stem|patches)(/|$)",
    "hidden": r"(^|/)(hidden|blocks?|layers?)(_?\d+)?(/|$)",
    "readout": r"(^|/)(readout|head|lm_head|logits)(/|$)",
}
OF_READOUT = NAMES["readout"].removesuffix("(/|$)") + r"/[^/]+$"
SPLITS_HEADS = r"(^|/)(query|key|value)(/|$)"  # [inputs, heads, size of a head]
JOINS_HEADS = r"(^|/)out(/|$)"  # [heads, size of a head, outputs]


class Multipliers(NamedTuple):
    """Trees of numbers like the params: what updates are multiplied by, and what gradients are
    (None: nothing).
    """

    step: Any
    gradient: Any = None


def mup_multipliers(
    params: Params,
    base_params: Params | None = None,
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
      overrides: for leaves whose path a regular expression is found in, e.g. {"router/kernel":
        "hidden", "mixer": 0.25, "mixed": (0.5, 4.0)}: a role, a number for updates (gradients stay
        as they are), or one for updates and one for gradients. The first that is found counts.

    Raises:
      ValueError: `base_params` has another structure or other ranks; more than two axes grow; the
        role of a leaf is ambiguous, the message says of which; an override is none of these, or
        matches no leaf.
    """
    chosen = check_overrides(overrides)
    check_found("overrides", [pattern for pattern, _ in chosen], leaves(params))
    return find(params, base_params, base_width, chosen)


def find(
    params: Params,
    base_params: Params | None,
    base_width: float | None,
    overrides: list[tuple[re.Pattern, Override]],
) -> Multipliers:
    """`mup_multipliers` of compiled overrides, which need not match a leaf."""
    if base_width is not None and not base_width > 0:
        raise ValueError(f"`base_width` must be positive, got {base_width}")
    shapes = {name: jnp.shape(leaf) for name, leaf in leaves(params).items()}
    bases = {} if base_params is None else _bases(shapes, base_params)
    if base_params is None:
        base_width = 1.0 if base_width is None else base_width
    elif base_width is not None and bases == shapes:
        raise ValueError(
            "`base_params` must be of another width than `params` to show what grows, where sizes "
            f"count in units of `base_width` {base_width}"
        )
    steps, gradients = [], []
    for name, shape in shapes.items():
        override = next((value for pattern, value in overrides if pattern.search(name)), None)
        if isinstance(override, tuple):
            step, gradient = override
        elif override is not None and not isinstance(override, str):
            step, gradient = override, 1.0
        else:
            step, gradient = _scales(name, shape, bases.get(name), base_width, override)
        steps.append(float(step))
        gradients.append(float(gradient))
    unflatten = jax.tree.structure(params).unflatten
    return Multipliers(unflatten(steps), unflatten(gradients))


def leaves(tree: Any) -> dict[str, Any]:
    """By path, which is the same for flax's nnx.State and the pure dict that it makes of it.

    Raises:
      ValueError: two leaves have the same path.
    """
    found = jax.tree_util.tree_leaves_with_path(tree)
    # the arrays of nnx's variables are their attribute `value`
    in_variable = lambda path: path and path[-1] == GetAttrKey("value")  # noqa: E731
    paths = [path_name(path[:-1] if in_variable(path) else path) for path, _ in found]
    if len({*paths}) < len(paths):
        raise ValueError(f"`params` has leaves of equal path: {', '.join(sorted(paths))}")
    return dict(zip(paths, (leaf for _, leaf in found), strict=True))


def check_overrides(overrides: Overrides) -> list[tuple[re.Pattern, Override]]:
    """Compiled.

    Raises:
      ValueError: a regular expression is malformed, or an override is none.
    """
    pairs = list(overrides.items() if isinstance(overrides, Mapping) else overrides)

    def positive(value: Any) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and 0 < value < math.inf

    for pattern, value in pairs:
        pair = isinstance(value, tuple) and len(value) == 2 and all(map(positive, value))
        if not (pair or positive(value) or value in ROLES):
            raise ValueError(
                f"`overrides` of {pattern!r} must be a positive number, a pair of them or one of "
                f"{', '.join(ROLES)}, got {value!r}"
            )
    patterns = compiled("overrides", [pattern for pattern, _ in pairs])
    return list(zip(patterns, (value for _, value in pairs), strict=True))


def _bases(shapes: dict[str, Shape], base_params: Params) -> dict[str, Shape]:
    bases = {name: jnp.shape(leaf) for name, leaf in leaves(base_params).items()}
    if differ := bases.keys() ^ shapes.keys():
        raise ValueError(
            "`base_params` must be of the same model at another width, as deep as `params`; "
            f"only one of them has {', '.join(sorted(differ))}"
        )
    for name, shape in shapes.items():
        if len(shape) != len(bases[name]):
            raise ValueError(f"`base_params` {name} is {list(bases[name])}, `params` {list(shape)}")
    return bases


def _scales(
    name: str, shape: Shape, at_base: Shape | None, base_width: float | None, role: str | None
) -> tuple[float, float]:
    """Multipliers of a leaf's updates and gradients; `role` if it is said."""
    if at_base is not None:
        grows = [axis for axis, n in enumerate(shape) if n != at_base[axis]]
        if len(grows) > 2:
            raise ValueError(
                f"`params` {name} {list(shape)} grows in {len(grows)} axes from {list(at_base)}, "
                "which has no rule: let two grow, e.g. the number of heads or their size, not "
                "both; or say what to multiply its updates and gradients by, "
                f"overrides={{{_exactly(name)!r}: (0.25, 4.0)}}"
            )
        role = role or _role_by_growth(name, shape, at_base, grows)
        if base_width is None or not grows:
            fan_in, fan_out = _growth(shape, at_base, grows)
        else:
            fan_in, fan_out = _sizes(name, shape, role, base_width)
    else:
        assert base_width is not None
        role = role or _role_by_name(name, shape)
        if role == "vector" and re.search(OF_READOUT, name):
            return 1.0, 1.0  # of as many outputs at every width
        fan_in, fan_out = _sizes(name, shape, role, base_width)
    if role == "vector":  # the bias of several heads may grow in any of its axes
        return 1.0, fan_in * fan_out
    if role == "readout":
        return 1.0, fan_in
    return (1.0 / fan_in if role == "hidden" else 1.0), fan_out


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}$"


def _ambiguous(name: str, shape: Shape, why: str, say: str) -> ValueError:
    return ValueError(
        f"`params` {name} {list(shape)} has an ambiguous role: {why}. "
        f"Say it: overrides={{{_exactly(name)!r}: {say}}}"
    )


def _role_by_name(name: str, shape: Shape) -> str:
    if len(shape) < 2 or re.search(NAMES["vector"], name):
        return "vector"
    if re.search(EMBEDDING, name):
        return "input"
    found = [role for role, pattern in NAMES.items() if re.search(pattern, name)]
    if len(found) != 1:
        why = f"its name says {' and '.join(found)}" if found else "its name says nothing"
        say = f"{' or '.join(map(repr, ROLES))}; or give base params (`base_params`)"
        raise _ambiguous(name, shape, why, say)
    return found[0]


def _role_by_growth(name: str, shape: Shape, at_base: Shape, grows: list[int]) -> str:
    """The role by the axes that differ; names are asked where they do not tell."""
    if not grows or len(shape) < 2 or re.search(NAMES["vector"], name):
        return "vector"
    if len(grows) == 2:
        first, second = (shape[axis] / at_base[axis] for axis in grows)
        if first != second and not re.search(NAMES["hidden"], name):
            why = f"its axes grow {first:g} and {second:g} times, and which holds its inputs?"
            say = f"'hidden' if the first, else ({1 / second:g}, {first:g})"
            raise _ambiguous(name, shape, why, say)
        return "hidden"
    if grows[0] == len(shape) - 1:
        return "input"
    if re.search(NAMES["readout"], name):
        return "readout"
    why = "only its inputs grow; does the model divide them by their number?"
    raise _ambiguous(name, shape, why, "'readout' if it does, 'hidden' if not")


def _growth(shape: Shape, at_base: Shape, grows: list[int]) -> tuple[float, float]:
    """How much the inputs and the outputs grow, 1 for what does not."""
    if not grows:
        return 1.0, 1.0
    first, last = (shape[axis] / at_base[axis] for axis in (grows[0], grows[-1]))
    if len(grows) == 1:
        return (1.0, last) if grows[0] == len(shape) - 1 else (first, 1.0)
    return first, last


def _sizes(name: str, shape: Shape, role: str, unit: float) -> tuple[float, float]:
    """Numbers of inputs and outputs in units of `unit`. Axes before the last are inputs: the window
    of a convolution and heads that are joined count in full.
    """
    if len(shape) == 0:
        return 1.0, 1.0
    if role == "vector" or len(shape) == 1:
        return 1.0, math.prod(shape) / unit
    if role == "hidden":
        splits, joins = re.search(SPLITS_HEADS, name), re.search(JOINS_HEADS, name)
        if len(shape) == 3 and splits:
            return shape[0] / unit, math.prod(shape[1:]) / unit
        if (len(shape) == 3 and not joins) or (len(shape) > 3 and (splits or joins)):
            why = "which of its axes are of inputs, which of outputs, which count layers?"
            raise _ambiguous(name, shape, why, "(1 / fan-in, fan-out)")
    return math.prod(shape[:-1]) / unit, shape[-1] / unit
