"""Rows of numbers from generators with a known truth."""

import numpy as np

Table = tuple[np.ndarray, np.ndarray]  # inputs [rows, features] float32, targets [rows]


def teacher(
    seed: int, rows: int = 4000, features: int = 24, hidden: int = 8, classes: int = 8
) -> Table:
    """Normal inputs whose covariance has deviations from 1 to 1/20 along random directions, and the
    largest output of a random tanh network with one hidden layer. Noise of a tenth of the outputs'
    deviation changes every eighth of them.
    """
    random = np.random.default_rng(seed)
    deviations = np.geomspace(1, 0.05, features)
    directions = np.linalg.qr(random.standard_normal((features, features)))[0]
    inputs = (deviations * random.standard_normal((rows, features))) @ directions
    first = random.standard_normal((features, hidden)) * 4 / np.linalg.norm(deviations)
    outputs = np.tanh(inputs @ first + 0.5 * random.standard_normal(hidden))
    outputs = outputs @ random.standard_normal((hidden, classes))
    outputs = (outputs - outputs.mean(axis=0)) / outputs.std(axis=0)  # classes of similar size
    noisy = outputs + 0.1 * random.standard_normal(outputs.shape)
    return inputs.astype(np.float32), noisy.argmax(axis=1)


def friedman_mean(inputs: np.ndarray) -> np.ndarray:
    """Friedman's first function, of five of the features (Annals of Statistics 19, 1991)."""
    x = inputs.T
    return 10 * np.sin(np.pi * x[0] * x[1]) + 20 * (x[2] - 0.5) ** 2 + 10 * x[3] + 5 * x[4]


def friedman(seed: int, rows: int = 3000, features: int = 10) -> Table:
    """Uniform inputs; a real target, `friedman_mean` and normal noise."""
    random = np.random.default_rng(seed)
    inputs = random.uniform(size=(rows, features))
    targets = friedman_mean(inputs) + random.standard_normal(rows)
    return inputs.astype(np.float32), targets


def spirals(seed: int, rows: int = 3000, arms: int = 3, turns: float = 1.25) -> Table:
    """Arms of a spiral in the plane, seen in eight directions with noise; the target is the arm."""
    random = np.random.default_rng(seed)
    targets = np.arange(rows) % arms
    radius = np.sqrt(random.uniform(0.02, 1, rows))
    angle = 2 * np.pi * (turns * radius + targets / arms)
    plane = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    seen = plane @ random.standard_normal((2, 8))
    return (seen + 0.1 * random.standard_normal(seen.shape)).astype(np.float32), targets


def waves() -> np.ndarray:
    """[3, 21] the triangles of Breiman's waveform recognition (Classification and Regression Trees,
    1984, section 2.6.2).
    """
    place = np.arange(1, 22)
    return np.stack([np.maximum(6 - np.abs(place - middle), 0) for middle in (11, 15, 7)])


def waveform(seed: int, rows: int = 4000) -> Table:
    """A random point between two of the `waves`, and normal noise; the target is which two, 0 and
    1, 0 and 2 or 1 and 2. No classifier is right more often than 86 % of the time.
    """
    random = np.random.default_rng(seed)
    targets = random.integers(3, size=rows)
    first, second = waves()[np.array([[0, 1], [0, 2], [1, 2]])[targets].T]
    share = random.uniform(size=(rows, 1))
    inputs = share * first + (1 - share) * second + random.standard_normal(first.shape)
    return inputs.astype(np.float32), targets
