"""L2O-PA on LASSO problems of 50 x 100 as arXiv 2305.18577 trains it, but for a decaying learning
rate: 2,500 steps of 64 problems, minutes on two cores.
"""

from meta_train.recipes.base import Recipe

RECIPE = Recipe(
    rule="l2o_pa",
    task="side_by_side(lasso(), count=8)",
    estimator="truncated_bptt(particles=8)",
    horizon=(100, 100),
    truncation=20,
    outer_steps=2500,
    learning_rate=1e-2,
)
