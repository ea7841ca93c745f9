"""Variational autoencoders (arXiv:1312.6114) in flax nnx, a family of VeLO's (arXiv:2211.09760)."""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tasks.autoencoder import MLP
from tasks.base import Key
from tasks.data import Batch, Dataset, load_field, synthetic
from tasks.dynamic import Dynamic
from tasks.fields import positive_integers
from tasks.images import image_shape
from tasks.network import NetworkTask, Objective, drawn_task
from tasks.nnx_network import nnx_network


class Posterior(NamedTuple):
    mean: jax.Array  # [B, latent]
    log_variance: jax.Array  # [B, latent]
    logits: jax.Array  # [B, pixels], of one sample


class Network(nnx.Module):
    """Images and standard normal noise [B, latent] to the Gaussian posterior, and to the pixels'
    logits at the sample that the noise makes of it.
    """

    def __init__(self, pixels: int, hidden: tuple[int, ...], latent: int, rngs: nnx.Rngs):
        self.encoder = MLP((pixels, *hidden, 2 * latent), rngs)
        self.decoder = MLP((latent, *reversed(hidden), pixels), rngs)

    def __call__(
        self,
        inputs: tuple[jax.Array, jax.Array],
        activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
    ) -> Posterior:
        images, noise = inputs
        mean, log_variance = jnp.split(self.encoder(images, activation), 2, axis=-1)
        sample = mean + jnp.exp(0.5 * log_variance) * noise
        return Posterior(mean, log_variance, self.decoder(sample, activation))


def negative_elbo(posterior: Posterior, batch: Batch) -> jax.Array:
    """[B], in nats per pixel; pixels are chances of Bernoulli variables."""
    mean, log_variance, logits = posterior
    pixels = batch.inputs[0].reshape(logits.shape)
    reconstruction = jnp.sum(jax.nn.softplus(logits) - pixels * logits, axis=-1)
    variance = jnp.exp(log_variance)
    divergence = 0.5 * jnp.sum(jnp.square(mean) + variance - log_variance - 1, axis=-1)
    return (reconstruction + divergence) / logits.shape[-1]


@dataclasses.dataclass(frozen=True)
class Noisy:
    """Inputs become (images, standard normal noise [B, latent])."""

    latent: int

    def __call__(self, key: Key, batch: Batch) -> Batch:
        # `key` itself has drawn the rows
        noise = jax.random.normal(jax.random.fold_in(key, 1), (len(batch.inputs), self.latent))
        return batch._replace(inputs=(batch.inputs, noise))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VAE:
    """VAEs of images in [0, 1], with a Gaussian encoder of `hidden` units per layer and a Bernoulli
    decoder of the same in reverse. Untrained is what the pixels' means cost, the posterior being
    the prior. The loss of real-valued pixels does not reach 0: their own entropy as chances
    remains.
    """

    data: Dataset | str = "digits/meta_train"
    hidden: tuple[int, ...] = dataclasses.field(default=(32,), metadata={"static": True})
    latent: int = dataclasses.field(default=4, metadata={"static": True})
    batch_size: int = dataclasses.field(default=64, metadata={"static": True})
    dynamic: Dynamic = dataclasses.field(default=Dynamic(), metadata={"static": True})

    def __post_init__(self) -> None:
        load_field(self)
        positive_integers(self, "hidden", "latent")

    def __call__(self, key: Key) -> NetworkTask:
        assert isinstance(self.data, Dataset)
        pixels = math.prod(image_shape(self.data))
        return drawn_task(
            self,
            nnx_network(Network, pixels, self.hidden, self.latent),
            Objective(negative_elbo, self.data.statistics.entropy, Noisy(self.latent)),
            key,
        )


# mostly noise, these images leave little to learn but from large initial weights
EXAMPLES = (
    VAE(
        data=synthetic(),
        hidden=(8,),
        latent=2,
        batch_size=16,
        dynamic=Dynamic(init_scale=(2.0, 2.0)),
    ),
)
