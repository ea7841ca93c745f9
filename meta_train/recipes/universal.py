"""The shipped `universal`: needs no learning rate and no schedule. The second of two phases: longer
runs, whose late losses count more.
"""

import dataclasses

from meta_train.recipes import universal_first

RECIPE = dataclasses.replace(
    universal_first.RECIPE,
    start="universal_first",
    objective="late",
    horizon=(500, 4000),
    estimator="nres(particles=8, sigma=0.05, clip_difference=0.5)",
    learning_rate=5e-4,
)
