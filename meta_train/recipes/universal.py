"""The shipped `universal`: needs no learning rate and no schedule. Two cores make it in a quarter
of an hour, behind the tuning of Adam on metaval/small, which is done once.
"""

from meta_train.recipes.base import Recipe

RECIPE = Recipe(
    rule="steered",
    task="train/diverse",
    # rescaled parameter by parameter it diverges with any step size of a tensor's own
    without=("digits_vae",),
    # differences of lost runs would outweigh all others
    estimator="nres(particles=6, sigma=0.05, clip_difference=0.5)",
    horizon=(100, 2000),
    truncation=50,
    outer_steps=1000,
    learning_rate=1e-3,
    warmup=20,
    select_on="metaval/small",
)
