"""The safeguarded rule on LASSO problems of many kinds, by the digits that each step wins: minutes
on two cores. The safeguard watches one problem, so these are not stacked.
"""

from meta_train.recipes.base import Recipe

RECIPE = Recipe(
    rule="l2o_safe",
    task="side_by_side(lasso(density=(0.03, 0.3), noise=(0, 0.3), coherence=(0, 0.9), "
    "rho=(0.02, 0.5)), count=1, merit='gap')",
    estimator="truncated_bptt(particles=64)",
    horizon=(90, 90),
    truncation=30,
    outer_steps=1000,
    learning_rate=3e-3,
)
