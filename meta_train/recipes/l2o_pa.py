"""L2O-PA on LASSO problems of 50 x 100, by truncated backpropagation through 20 of 100 iterations
of 64 problems, 2,500 times, as in arXiv 2305.18577: minutes on two cores. Unlike there, problems
are smaller (250 x 500 in the paper), their losses relative to F(0), the LSTM starts from zero,
particles are out of phase, the learning rate decays, and the last theta is taken.
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
