"""Learned optimizers as ordinary optax transformations.

opt = learned_opt.load("small_fc-digits", horizon=1_000)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), opt)
"""

from learned_opt.artifact import load, read, save
from learned_opt.base import LearnedOptimizer

__all__ = ["LearnedOptimizer", "load", "read", "save"]
