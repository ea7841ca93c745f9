"""Gray patches of photographs, and dictionaries for them, as pytrees with a name that loads them
again.
"""

import dataclasses
import functools
import warnings

import jax
import numpy as np

from tasks.data import unknown_name
from tasks.sources import PATCH, photograph, prototypes

PICTURES = ("china", "flower", "synthetic")
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
FITTED = 1000  # patches that the dictionary is learned from, as many as arXiv:2305.18577 has


# Compared by identity, as `tasks.data.Dataset`: `load_patches` returns the same object each time.
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Patches:
    """Patches of a picture, and a dictionary for them. Its `repr` is that of the picture's name."""

    targets: np.ndarray | jax.Array  # float32 [P, 64], rows of mean 0
    dictionary: np.ndarray | jax.Array  # float32 [64, atoms], columns of norm 1
    lipschitz: np.ndarray | jax.Array  # scalar, the square of the dictionary's spectral norm
    name: str = dataclasses.field(metadata={"static": True})
    atoms: int = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        return repr(self.name)


@functools.cache
def load_patches(picture: str, atoms: int) -> Patches:
    """The 8x8 patches of one of `PICTURES` as (patch - min) / (max - min + 1e-3) minus its mean,
    without those of a single brightness, and a dictionary that scikit-learn learns from them, which
    takes seconds.

    "synthetic" are noisy images of a generator instead, with some of them as dictionary: for tests,
    and without scikit-learn.

    Raises:
      ValueError: no such picture; the message lists what exists.
    """
    if picture not in PICTURES:
        raise ValueError(unknown_name("picture", picture, PICTURES))
    if picture == "synthetic":
        gray = prototypes(3, (PATCH, PATCH), 4 * atoms, 0).inputs.astype(np.float64)
    else:
        gray = photograph(picture).inputs / 255 @ LUMA
    gray = gray.reshape(-1, PATCH**2)
    low, high = gray.min(axis=1, keepdims=True), gray.max(axis=1, keepdims=True)
    targets = ((gray - low) / (high - low + 1e-3))[(high > low)[:, 0]]
    targets -= targets.mean(axis=1, keepdims=True)
    order = np.random.default_rng(0).permutation(len(targets))
    if picture == "synthetic":
        dictionary = targets[order[:atoms]].T
    else:
        dictionary = _learned(targets[order[:FITTED]], atoms)
    dictionary = dictionary / np.linalg.norm(dictionary, axis=0, keepdims=True)
    dictionary = dictionary.astype(np.float32)
    # rounded up, to stay a bound
    lipschitz = np.linalg.norm(dictionary.astype(np.float64), 2) ** 2 * (1 + 1e-6)
    return Patches(
        targets.astype(np.float32), dictionary, np.asarray(lipschitz, np.float32), picture, atoms
    )


def _learned(targets: np.ndarray, atoms: int) -> np.ndarray:
    """[64, atoms], from targets [P, 64]."""
    from sklearn.decomposition import MiniBatchDictionaryLearning
    from sklearn.exceptions import ConvergenceWarning

    learner = MiniBatchDictionaryLearning(
        atoms,
        alpha=0.5,  # pyright: ignore[reportArgumentType]
        max_iter=5,
        batch_size=100,
        fit_algorithm="cd",
        random_state=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return learner.fit(targets).components_.T
