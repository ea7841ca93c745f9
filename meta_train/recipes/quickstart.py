"""The quickstart: small_fc on 8x8 digits, minutes on two cores."""

from meta_train.recipes.base import Recipe

RECIPE = Recipe(
    rule="small_fc(hidden=4)",
    task="image_mlp(data='digits/meta_train', dynamic=dynamic(init_scale=(0.3, 3.0)))",
    estimator="nres(particles=32, sigma=0.01)",
    horizon=(200, 1000),
    truncation=50,
    outer_steps=600,
    learning_rate=1e-2,
)
