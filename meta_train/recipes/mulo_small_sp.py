"""The twin of `mulo_small` under standard parametrization: the same rule, compute and seeds."""

import dataclasses

from meta_train.recipes import mulo_small

RECIPE = dataclasses.replace(mulo_small.RECIPE, rule="small_fc(hidden=32)", task="train/widths")
