"""What the fields of rules have in common to be checked for. Every function raises ValueError that
names the field and what was got.
"""

import math
from typing import Any


def at_least_one(rule: Any, *names: str) -> None:
    """Sizes."""
    for name in names:
        if getattr(rule, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(rule, name)}")


def positive(rule: Any, *names: str) -> None:
    """Bounds and scales; None is none of them."""
    for name in names:
        value = getattr(rule, name)
        if value is not None and not value > 0:
            raise ValueError(f"`{name}` must be positive, got {value}")


def one_of(rule: Any, name: str, *known: str) -> None:
    """A choice of two."""
    if getattr(rule, name) not in known:
        raise ValueError(
            f"`{name}` must be {' or '.join(map(repr, known))}, got {getattr(rule, name)!r}"
        )


def momentum_or_random(rule: Any) -> None:
    """`initial`: `mlp.pass_through` needs two of the `hidden` units for the momentum."""
    one_of(rule, "initial", "momentum", "random")
    if rule.initial == "momentum" and rule.hidden < 2:
        raise ValueError(
            f"`hidden` must be at least 2 for initial='momentum', got {rule.hidden}; "
            "set initial='random'"
        )


def equal_channels(rule: Any) -> None:
    """Momenta and factored second moments are preconditioned channel by channel."""
    if len(rule.momentum_decays) != len(rule.factored_decays):
        raise ValueError(
            "`momentum_decays` and `factored_decays` must be of equal length, got "
            f"{len(rule.momentum_decays)} and {len(rule.factored_decays)}"
        )


def decays(name: str, values: tuple[float, ...]) -> None:
    """At least one, each in [0, 1)."""
    if not values or not all(0.0 <= value < 1.0 for value in values):
        raise ValueError(f"{name} must be numbers in [0, 1), got {values}")


def accumulator_decays(rule: Any) -> None:
    """Of momenta, second moments and factored second moments that are not learned."""
    equal_channels(rule)
    every = (*rule.momentum_decays, rule.rms_decay, *rule.factored_decays)
    decays("decays", every if rule.momentum_decays else ())


def not_negative(rule: Any, *names: str) -> None:
    """Deviations and weights of penalties."""
    for name in names:
        if not 0 <= getattr(rule, name) < math.inf:
            raise ValueError(f"`{name}` must be finite and not negative, got {getattr(rule, name)}")
