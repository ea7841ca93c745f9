"""A learned optimizer by what people call it: a rule's spec, or an artifact's name or file."""

from collections.abc import Sequence
from pathlib import Path

import jax

import learned_opt
from learned_opt import artifact, discovery
from learned_opt.base import LearnedOptimizer, Theta


def find(name: str, baselines: Sequence[str] = ()) -> tuple[LearnedOptimizer, Theta]:
    """The rule and its theta: that of an artifact, or the rule's first.

    Args:
      baselines: names that were possible, too, to be listed in the error.

    Raises:
      ValueError: there is neither such a rule nor such an artifact, or it cannot be read.
    """
    rules = discovery.members(learned_opt)
    if name.partition("(")[0].strip() in rules:
        rule = discovery.build("rule", name, rules)
        return rule, rule.init(jax.random.key(0))
    if Path(name).is_file() or name in artifact.pretrained():
        return artifact.read(name)[:2]
    known = [*rules, *artifact.pretrained(), *baselines]
    kind = "rule, artifact or baseline" if baselines else "rule or artifact"
    raise ValueError(discovery.unknown(kind, name, known))
