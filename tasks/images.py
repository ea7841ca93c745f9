"""Images as rows of matrix products: where particles are vmapped, a convolution with a kernel per
particle takes XLA's slow path on CPUs, two to four times the time.
"""

from typing import Any

import jax
import jax.numpy as jnp


def image_shape(data: Any) -> tuple[int, int, int]:
    """(height, width, channels) of a `tasks.data.Dataset`; [N, H, W] images have one channel.

    Raises:
      ValueError: `data` is a table.
    """
    if len(data.shape) not in (2, 3):
        raise ValueError(
            f"`data` must hold images, got rows of shape {data.shape} in {data!r}: "
            "name a dataset of images, e.g. digits"
        )
    return data.shape if len(data.shape) == 3 else (*data.shape, 1)


def with_channels(images: jax.Array) -> jax.Array:
    """[B, H, W, C]."""
    return images if images.ndim == 4 else images[..., None]


def windows(images: jax.Array, stride: int) -> jax.Array:
    """The 3x3 windows of [B, H, W, C] images, zeros outside: [B, ceil(H / stride), ceil(W /
    stride), 9 * C], channels last.
    """
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = [
        padded[:, i : i + height : stride, j : j + width : stride]
        for i in range(3)
        for j in range(3)
    ]
    return jnp.concatenate(shifts, axis=-1)


def tiles(images: jax.Array, size: int) -> jax.Array:
    """[B, H, W, C] images cut into squares: [B, H / size * W / size, size * size * C], row by
    row.
    """
    batch, height, width, channels = images.shape
    rows, columns = height // size, width // size
    squares = images.reshape(batch, rows, size, columns, size, channels).swapaxes(2, 3)
    return squares.reshape(batch, rows * columns, size * size * channels)
