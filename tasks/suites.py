"""Named sets of families. Held-out sets share neither rows nor architecture with training ones."""

from collections.abc import Callable

from tasks.base import TaskFamily
from tasks.conv_net import ConvNet
from tasks.data import unknown_name
from tasks.dynamic import Dynamic
from tasks.haiku_mlp import HaikuMLP
from tasks.image_mlp import ImageMLP


def _train_quick() -> dict[str, TaskFamily]:
    return {
        "digits_mlp": ImageMLP(
            data="digits/meta_train", hidden=(32,), dynamic=Dynamic(init_scale=(0.3, 3.0))
        )
    }


def _heldout_quick() -> dict[str, TaskFamily]:
    return {
        "digits_conv": ConvNet(data="digits/held_out", channels=(8, 16)),
        "digits_mlp": HaikuMLP(data="digits/held_out", hidden=(48, 24), activation="tanh"),
        "breast_cancer_mlp": HaikuMLP(data="breast_cancer", hidden=(16, 16), activation="relu"),
    }


# Functions, so that listing the names loads no data.
SUITES: dict[str, Callable[[], dict[str, TaskFamily]]] = {
    "train/quick": _train_quick,
    "heldout/quick": _heldout_quick,
}


def suite(name: str) -> dict[str, TaskFamily]:
    """Families by name, e.g. `suite("heldout/quick")["digits_conv"]`.

    Raises:
      ValueError: no such suite; the message lists those that exist.
    """
    if name not in SUITES:
        raise ValueError(unknown_name("suite", name, SUITES))
    return SUITES[name]()
