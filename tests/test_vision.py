"""The networks on images against convolutions of lax and float64 in numpy; what their losses are
worth by closed forms.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tasks.autoencoder import Autoencoder
from tasks.conv_net import ConvNet
from tasks.data import Batch, synthetic
from tasks.dynamic import Dynamic
from tasks.images import tiles, windows
from tasks.resnet import Resnet
from tasks.transformer import Attention, Block
from tasks.vae import VAE
from tasks.vit import Vit

KEY = jax.random.key(7)
FAMILIES = {
    "conv_net": (ConvNet, {"channels": (3, 5)}),
    "resnet": (Resnet, {"width": 3, "blocks": (1, 2)}),
    "vit": (Vit, {"patch": 2, "width": 6, "depth": 2, "heads": 2}),
    "autoencoder": (Autoencoder, {"hidden": (6, 3)}),
    "vae": (VAE, {"hidden": (6, 5), "latent": 2}),
}


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def relu(x):
    return np.maximum(x, 0)


def silu(x):
    return x / (1 + np.exp(-x))


def linear(params, x):
    return x @ params["kernel"] + params.get("bias", np.zeros(1))


def convolution(params, x, stride, side=3):
    kernel = params["kernel"].reshape(side, side, x.shape[-1], -1)
    pads = ((side // 2, side // 2),) * 2
    y = jax.lax.conv_general_dilated(
        jnp.asarray(x, jnp.float32),
        jnp.asarray(kernel, jnp.float32),
        (stride, stride),
        pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return np.asarray(y, np.float64) + params.get("bias", np.zeros(1))


def norm(params, x):
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + 1e-6)
    return centred / deviation * params["scale"] + params["bias"]


def with_channels(x):
    return x.reshape(*x.shape[:3], -1)


def conv_net(params, x, activation=relu):
    x = with_channels(x)
    for i in range(len(params["layers"])):
        x = activation(convolution(params["layers"][i], x, 2))
    return linear(params["head"], x.mean(axis=(1, 2)))


def resnet(params, x, activation=relu):
    x = convolution(params["stem"], with_channels(x), 2)
    for i, stride in enumerate((1, 2, 1)):
        p = params["blocks"][i]
        y = activation(norm(p["norms"][0], x))
        if stride == 2:
            x = convolution(p["projection"], y, 2, side=1)
        y = convolution(p["convolutions"][0], y, stride)
        x = x + convolution(p["convolutions"][1], activation(norm(p["norms"][1], y)), 1)
    return linear(params["head"], activation(norm(params["norm"], x)).mean(axis=(1, 2)))


def attention(params, x, heads, causal):
    """One query at a time."""
    query, key, value = (linear(params[name], x) for name in ("query", "key", "value"))
    size, mixed = x.shape[-1] // heads, np.zeros_like(x)
    for b, t, h in np.ndindex(*x.shape[:2], heads):
        seen, part = slice(0, t + 1 if causal else None), slice(h * size, (h + 1) * size)
        weights = np.exp(key[b, seen, part] @ query[b, t, part] / math.sqrt(size))
        mixed[b, t, part] = weights @ value[b, seen, part] / weights.sum()
    return linear(params["out"], mixed)


def vit(params, x, activation=gelu):
    corners = [(i, j) for i in (0, 2) for j in (0, 2)]
    patches = np.stack([x[:, i : i + 2, j : j + 2].reshape(len(x), -1) for i, j in corners], 1)
    x = linear(params["patches"], patches) + params["position_embedding"]
    for i in range(len(params["blocks"])):
        p = params["blocks"][i]
        x = x + attention(p["attention"], norm(p["attention_norm"], x), 2, causal=False)
        x = x + linear(p["down"], activation(linear(p["up"], norm(p["mlp_norm"], x))))
    return linear(params["head"], norm(params["norm"], x).mean(axis=1))


def mlp(params, x, activation=relu):
    x = x.reshape(len(x), -1)
    for i in range(len(params["layers"])):
        x = linear(params["layers"][i], activation(x) if i else x)
    return x


def cross_entropy(network):
    def loss(params, batch, *activation):
        logits = network(params, batch.inputs, *activation)
        log_chances = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        return -log_chances[np.arange(len(logits)), batch.targets.astype(int)].mean()

    return loss


def squared_error(params, batch, *activation):
    images = batch.inputs.reshape(len(batch.inputs), -1)
    return np.square(mlp(params, images, *activation) - images).mean()


def negative_elbo(params, batch, *activation):
    images, noise = batch.inputs
    code = mlp(params["encoder"], images, *activation)
    mean, deviation = code[:, :2], np.exp(code[:, 2:] / 2)
    chances = 1 / (1 + np.exp(-mlp(params["decoder"], mean + deviation * noise, *activation)))
    pixels = images.reshape(chances.shape)
    likelihood = pixels * np.log(chances) + (1 - pixels) * np.log(1 - chances)
    # of a Gaussian from the standard one
    divergence = np.log(1 / deviation) + (deviation**2 + mean**2) / 2 - 1 / 2
    return (divergence.sum(axis=1) - likelihood.sum(axis=1)).mean() / pixels.shape[1]


LOSSES = {
    "conv_net": cross_entropy(conv_net),
    "resnet": cross_entropy(resnet),
    "vit": cross_entropy(vit),
    "autoencoder": squared_error,
    "vae": negative_elbo,
}


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def filled(task, value):
    """Params that no generator was compiled for."""
    return jax.tree.map(value, jax.eval_shape(task.init, KEY))


def random_batch(name, shape):
    random = np.random.default_rng(0)
    images = random.uniform(size=(8, *shape)).astype(np.float32)
    noise = random.standard_normal((8, 2)).astype(np.float32)
    return Batch((images, noise) if name == "vae" else images, random.integers(3, size=8))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("shape", "activations"), [((4, 4, 2), {}), ((4, 4), {"silu": silu, "tanh": np.tanh})]
)
def test_the_loss_is_that_written_out_and_equal_families_share_one_program(
    name, shape, activations
):
    random = np.random.default_rng(1)
    dynamic = Dynamic(activation=tuple(activations))
    family, fields = FAMILIES[name]
    tasks = [family(**fields, data=synthetic(shape=shape), dynamic=dynamic)(KEY) for _ in range(2)]
    params = filled(tasks[0], lambda p: random.normal(0, 0.5, p.shape).astype(np.float32))
    batch = random_batch(name, shape)
    compiled = jax.jit(lambda task, params, batch: task.loss(params, batch))
    losses = [compiled(task, params, batch) for task in tasks]
    assert compiled._cache_size() == 1
    drawn = list(activations.values())[int(tasks[0].drawn.activation) :][:1]
    expected = LOSSES[name](float64(params), float64(batch), *drawn)
    # float32 sums of tens of terms, in a few layers
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize(("side", "stride"), [(4, 1), (5, 1), (4, 2), (5, 2)])
def test_windows_make_a_convolution(side, stride):
    images = jax.random.normal(KEY, (2, side, side + 1, 3))
    kernel = jax.random.normal(jax.random.key(1), (27, 4))
    expected = convolution({"kernel": kernel}, images, stride)
    np.testing.assert_allclose(windows(images, stride) @ kernel, expected, atol=1e-5)


def test_tiles_are_squares_row_by_row():
    images = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    cut = tiles(images, 2)
    assert cut.shape == (2, 6, 12)
    np.testing.assert_array_equal(cut[1, 4], images[1, 2:4, 2:4].reshape(-1))


def test_causal_attention_is_a_softmax_over_the_past():
    module = Attention(6, 3, True, 1.0, nnx.Rngs(0))
    x = jax.random.normal(KEY, (2, 5, 6))
    expected = attention(float64(nnx.to_pure_dict(nnx.state(module))), float64(x), 3, causal=True)
    np.testing.assert_allclose(module(x), expected, atol=1e-6)


def test_a_causal_block_does_not_look_ahead():
    block = Block(6, 3, True, 1.0, nnx.Rngs(0))
    x = jax.random.normal(KEY, (2, 5, 6))
    difference = np.abs(block(x.at[:, 3].multiply(-1)) - block(x)).max(axis=(0, 2))
    np.testing.assert_array_equal(difference[:3], 0)
    assert (difference[3:] > 1e-3).all()


def test_only_its_position_embedding_tells_a_vit_where_a_patch_is():
    task = Vit(data=synthetic(), patch=2, width=6, depth=1, heads=2)(KEY)
    random = np.random.default_rng(2)
    params = filled(task, lambda p: random.normal(0, 0.5, p.shape).astype(np.float32))
    images = random_batch("vit", (4, 4)).inputs
    swapped = np.roll(images, 2, axis=2)  # the left patches for the right ones
    logits = jax.jit(task.network.apply)
    moved = np.abs(logits(params, images) - logits(params, swapped)).max()
    params["position_embedding"] *= 0
    np.testing.assert_allclose(logits(params, images), logits(params, swapped), atol=1e-5)
    assert moved > 1e-2


@pytest.mark.parametrize("shape", [(4, 4), (5,)])
def test_the_mean_row_is_worth_one_to_an_autoencoder(shape):
    data = synthetic(shape=shape)
    task = Autoencoder(data=data, hidden=(3,))(KEY)
    params = filled(task, lambda p: np.zeros(p.shape, np.float32))
    train = data.take(jnp.arange(*data.splits[0]))
    params["layers"][1]["bias"] = jnp.mean(train.inputs, axis=0).reshape(-1)
    np.testing.assert_allclose(task.normalize(task.loss(params, train)), 1, rtol=1e-5)


def test_the_mean_image_is_worth_one_to_a_vae_whose_posterior_is_the_prior():
    data = synthetic()
    task = VAE(data=data, hidden=(3,), latent=2)(KEY)
    params = filled(task, lambda p: np.zeros(p.shape, np.float32))
    train = data.take(jnp.arange(*data.splits[0]))
    mean = jnp.mean(train.inputs, axis=0).reshape(-1)
    params["decoder"]["layers"][1]["bias"] = jnp.log(mean / (1 - mean))
    loss = task.loss(params, task.objective.prepare(KEY, train))
    np.testing.assert_allclose(task.normalize(loss), 1, rtol=1e-5)


def test_the_noise_of_a_vae_is_standard_normal_and_rides_in_the_batch():
    task = VAE(data=synthetic(), latent=2, batch_size=5000)(KEY)
    batch = jax.jit(task.batch, static_argnums=1)
    (images, noise), (_, other) = (batch(jax.random.key(i), "train").inputs for i in (0, 1))
    np.testing.assert_array_equal(images, task.data.batch(jax.random.key(0), "train", 5000).inputs)
    # four deviations of the estimates from 5000 draws, the larger of which is 1 / sqrt(5000)
    np.testing.assert_allclose(np.mean(noise, axis=0), 0, atol=4 / math.sqrt(5000))
    np.testing.assert_allclose(np.cov(noise.T), np.eye(2), atol=4 * math.sqrt(2 / 5000))
    assert abs(np.corrcoef(noise.reshape(-1), other.reshape(-1))[0, 1]) < 4 / math.sqrt(10_000)


@pytest.mark.parametrize("family", [ConvNet, Resnet, Vit, VAE])
def test_tables_are_refused(family):
    with pytest.raises(ValueError, match=r"`data` must hold images, got rows of shape \(5,\)"):
        family(data=synthetic(shape=(5,)))(KEY)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        (ConvNet, {"channels": (8, 0)}, r"`channels` must be a tuple of positive .* \(8, 0\)"),
        (ConvNet, {"batch_size": 0}, "`batch_size` must be a positive integer, got 0"),
        (Resnet, {"width": -1}, "`width` must be a positive integer, got -1"),
        (Resnet, {"blocks": (1.5,)}, r"`blocks` must be a tuple of positive .* \(1.5,\)"),
        (Vit, {"depth": (2,)}, r"`depth` must be a positive integer, got \(2,\)"),
        (Vit, {"width": 8, "heads": 3}, "`width` must be a multiple of `heads`, got 8 and 3"),
        (Autoencoder, {"hidden": (0,)}, r"`hidden` must be a tuple of positive .* \(0,\)"),
        (Autoencoder, {"hidden": 8}, "`hidden` must be a tuple of positive integers, got 8"),
        (VAE, {"latent": 0}, "`latent` must be a positive integer, got 0"),
    ],
)
def test_fields_that_cannot_be_are_refused(family, fields, message):
    with pytest.raises(ValueError, match=message):
        family(data=synthetic(), **fields)


def test_patches_divide_the_image():
    with pytest.raises(ValueError, match=r"`patch` must divide the height .* got 3 for 4x4"):
        Vit(data=synthetic(), patch=3)(KEY)
