"""muLO on a small scale (arXiv 2406.00153): small_fc under mu-parametrization, on MLPs of three
widths. `mulo_small_sp` is the same without it.
"""

from meta_train.recipes.base import Recipe

RECIPE = Recipe(
    rule="mulo",
    task="train/mup_widths",
    estimator="nres(particles=2, sigma=0.01)",
    horizon=(100, 1000),
    truncation=50,
    outer_steps=500,
    learning_rate=3e-3,
    warmup=20,
)
