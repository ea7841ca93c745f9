"""The shipped `direction`: Celo2 (arXiv 2602.19142), whose users supply learning rate, schedule and
weight decay. Meta-trained at one learning rate, it states the direction itself.
"""

from meta_train.recipes.base import Recipe

RECIPE = Recipe(
    rule="celo2(step_size=0.003, vector_multiplier=3.0)",
    exported_rule="celo2(step_size=1.0, vector_multiplier=3.0)",
    task="train/diverse",
    without=("digits_vae",),
    estimator="nres(particles=6, sigma=0.02, clip_difference=0.5)",
    horizon=(100, 2000),
    truncation=50,
    outer_steps=500,
    learning_rate=1e-3,
    warmup=20,
    select_on="metaval/small",
)
