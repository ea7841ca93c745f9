"""Steered: Adam's direction and its orthogonalisation (Muon's, as in Celo2, arXiv 2602.19142); a
linear map steers their mixture and the step size, tensor by tensor, by how the run and the
gradients have gone so far (as VeLO's network does, arXiv 2211.09760).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from learned_opt import base, scheduler
from learned_opt.celo2 import orthogonalise, unit_rms
from learned_opt.recurrent import placed_as, whole

MOMENTA = 3
AVERAGES = 2  # of the alignment, over a short and a long time
WARM_UP = 10.0  # steps
# what is known of the run, of a tensor, and the mean of the latter over all tensors
OF_TENSOR = 3 + MOMENTA + 2 + AVERAGES * MOMENTA
INPUTS = scheduler.RUN_FEATURES + 1 + 2 * OF_TENSOR
# drift, step, share of the orthogonalised direction, weights of the gradient and the momenta
OUTPUTS = 3 + 1 + MOMENTA


class Watched(NamedTuple):
    """What is known of every tensor, in the order of jax.tree.leaves, and of the run.

    `alignment` [tensors, 2, 3]: averages of the cosine between gradient and momenta; `log_step`
    [tensors]: how far the step size has drifted; `scale` [tensors]: what steps are relative to, the
    `_size` of the initial params.
    """

    losses: scheduler.LossBuffer
    alignment: jax.Array
    log_step: jax.Array
    scale: jax.Array


class SteeredState(NamedTuple):
    """Momenta [3, *shape] and second moments [*shape] in float32, not corrected for their start."""

    count: jax.typing.ArrayLike
    momentum: base.Params
    second_moment: base.Params
    watched: Watched


class Tensor(NamedTuple):
    """One tensor in one step: the gradient [*shape], the new accumulators, and what the map is
    told, [3] each: cosines of the gradient with the momenta before it, and logarithms of these
    momenta's root mean squares (signal to noise); all over the root of the second moment.
    """

    gradient: jax.Array
    momentum: jax.Array
    second_moment: jax.Array
    cosines: jax.Array
    strengths: jax.Array


@dataclasses.dataclass(frozen=True)
class Steered:
    """update = -anneal * scale * exp(base + log_step + step) * direction

    `anneal` falls linearly, behind a warm-up of ten steps, to a thousandth at the horizon, where it
    stays. `direction` is (1 - share) * d + share * orthogonalised(d) for matrices (the last two
    axes) and d for vectors, both parts of root mean square 1; d is a mixture of the gradient and
    three momenta, over the root of one second moment. In long runs two of the momenta and the
    second moment average over a 50th and a tenth of the horizon. A linear map of what is known of
    the run, of the tensor, and of all tensors in the mean gives `step`, `share`, the mixture, and
    the rate at which `log_step` drifts: few numbers, so that evolution strategies find them in
    minutes.

    Needs the loss and the horizon. NaN losses after the first are harmless, and entries of the
    gradient that are not finite count as zero. The updates do not depend on the scale of the
    gradients, nor, but for sums of tiny differences, on that of the loss.

    Args:
      orthogonalise: False takes the share for 0, and spares the matrix products.
    """

    orthogonalise: bool = True

    def init(self, key: base.Key) -> base.Theta:
        """{"steer" {w [47, 7], b [7]}, "base" [2]}; base: logarithms of the steps of matrices and
        of the rest. It starts, whatever the key, as Muon, with steps that grow while gradients
        agree with the fastest momentum.
        """
        del key
        w = jnp.zeros((INPUTS, OUTPUTS))
        alignments = slice(-AVERAGES * MOMENTA, None, MOMENTA)
        bias = jnp.asarray([0.0, 0.0, 2.0, -1.0, 1.0, 0.0, -1.0])
        return {
            "steer": {"w": w.at[alignments, 0].set(1.0), "b": bias},
            "base": jnp.log(jnp.asarray([0.01, 0.03])),
        }

    def optimizer(
        self, theta: base.Theta, horizon: base.Horizon = None
    ) -> optax.GradientTransformationExtraArgs:
        base.check_theta(self, theta)
        horizon = base.require_horizon(self, horizon)
        steps = jnp.asarray(horizon, jnp.float32)
        decays = _decay(10.0, jnp.maximum(20.0, steps / 50.0), jnp.maximum(40.0, steps / 10.0))
        (rms_decay,) = _decay(jnp.maximum(30.0, steps / 50.0))
        averages = _decay(10.0, jnp.maximum(20.0, steps / 20.0))

        def init(params: base.Params) -> SteeredState:
            base.check_params(params)
            single = base.float32(params)
            scales = [_size(p) for p in jax.tree.leaves(single)]
            watched = Watched(
                scheduler.loss_buffer(horizon),
                jnp.zeros((len(scales), AVERAGES, MOMENTA), jnp.float32),
                jnp.zeros(len(scales), jnp.float32),
                jnp.asarray(scales, jnp.float32),
            )
            momentum = jax.tree.map(lambda p: jnp.zeros((MOMENTA, *p.shape), jnp.float32), single)
            second_moment = jax.tree.map(jnp.zeros_like, single)
            return SteeredState(jnp.zeros((), jnp.int32), momentum, second_moment, watched)

        def update(updates, state, params=None, **extra_args):
            base.check_update(self, params)
            loss = base.require_value(self, extra_args)
            count = jnp.asarray(state.count, jnp.float32)
            params_in, treedef = jax.tree.flatten(base.float32(params))
            trees = (updates, state.momentum, state.second_moment)
            tensors = [
                _tensor(count, decays, rms_decay, *leaves)
                for leaves in zip(*map(treedef.flatten_up_to, trees), strict=True)
            ]
            out, watched = _steer(
                theta, whole(state.watched), averages, loss, count, steps, params_in, tensors
            )
            corrections = 1.0 - jnp.append(decays, rms_decay) ** (count + 1.0)
            new = [
                -size * self._direction(tensor, corrections, share, weights)
                for tensor, size, share, weights in zip(tensors, *out, strict=True)
            ]
            updates = base.like_params(treedef.unflatten(new), params)
            return updates, SteeredState(
                optax.safe_increment(state.count),
                treedef.unflatten([tensor.momentum for tensor in tensors]),
                treedef.unflatten([tensor.second_moment for tensor in tensors]),
                placed_as(watched, state.watched),
            )

        return optax.GradientTransformationExtraArgs(init, update)

    def _direction(
        self, tensor: Tensor, corrections: jax.Array, share: jax.Array, weights: jax.Array
    ) -> jax.Array:
        """`corrections` [4]: of the momenta and of the second moment, for their start at zero."""
        # a barrier, or XLA would store what it shares with the statistics
        g, m, v = lax.optimization_barrier((tensor.gradient, tensor.momentum, tensor.second_moment))
        d = weights[0] * _finite(g) + jnp.tensordot(weights[1:] / corrections[:-1], m, 1)
        d = d * _precondition(v / corrections[-1])
        d = d * lax.rsqrt(jnp.mean(d * d) + 1e-12)
        if not (self.orthogonalise and _is_matrix(d)):
            return d
        return (1.0 - share) * d + share * unit_rms(orthogonalise(d))


def _tensor(count, decays, rms_decay, g, m, v) -> Tensor:
    raw, g = g, _finite(g)
    d = lax.expand_dims(decays, range(1, m.ndim))
    v = rms_decay * v + (1.0 - rms_decay) * g * g
    precondition = _precondition(v / (1.0 - rms_decay ** (count + 1.0)))[None]
    now = g[None] * precondition
    before = m / jnp.where(count == 0, 1.0, 1.0 - d**count) * precondition
    axes = tuple(range(1, m.ndim))
    squares = jnp.sum(before * before, axes)
    products = jnp.sum(now * before, axes)
    return Tensor(
        gradient=jnp.asarray(raw),
        momentum=d * m + (1.0 - d) * g[None],
        second_moment=v,
        cosines=products * lax.rsqrt(squares * jnp.sum(now * now) + 1e-20),
        strengths=0.5 * jnp.log(squares / g.size + 1e-8),
    )


def _steer(
    theta, old: Watched, averages, loss, count, steps, params, tensors: list[Tensor]
) -> tuple[Any, Watched]:
    """For every tensor the size of its step, the share of the orthogonalised direction and the
    weights of the mixture; and what is known then.
    """
    n = len(tensors)
    stacked = lambda values, *shape: jnp.asarray(values, jnp.float32).reshape(n, *shape)  # noqa: E731
    decays = lax.expand_dims(averages, (0, 2))
    cosines = stacked([tensor.cosines for tensor in tensors], 1, MOMENTA)
    alignment = decays * old.alignment + (1.0 - decays) * cosines
    of_run, losses = scheduler.run_features(old.losses, loss, count, steps)
    shapes = [(p.ndim == 0, _is_matrix(p), math.log10(p.size) / 2.0 - 1.0) for p in params]
    sizes = stacked([_size(p) for p in params], 1)
    of_tensors = jnp.concatenate(
        [
            stacked(shapes, 3),
            stacked([tensor.strengths for tensor in tensors], MOMENTA) / 3.0 + 0.5,
            old.log_step[:, None] / 3.0,
            # clipped, so that a tensor that is lost does not take the others with it
            jnp.clip(jnp.nan_to_num(jnp.log(sizes / old.scale[:, None])), -10.0, 10.0),
            (alignment / (1.0 - decays ** (count + 1.0))).reshape(n, AVERAGES * MOMENTA),
        ],
        axis=1,
    )
    of_all = jnp.concatenate(
        [of_run, jnp.log10(steps)[None] / 2.0 - 1.5, jnp.mean(of_tensors, axis=0)]
    )
    w_all, w_own = jnp.split(theta["steer"]["w"], (INPUTS - OF_TENSOR,))
    out = of_tensors @ w_own + (of_all @ w_all + theta["steer"]["b"])[None]
    # slow enough for a run, however long it is
    rate = jnp.clip(3.0 / steps, 3e-4, 0.03)
    log_step = jnp.clip(old.log_step + rate * jnp.clip(out[:, 0], -10.0, 10.0), -8.0, 5.0)
    kinds = jnp.asarray([0 if _is_matrix(p) else 1 for p in params], jnp.int32)
    anneal = jnp.maximum(1.0 - count / steps, 1e-3) * jnp.minimum(1.0, (count + 1.0) / WARM_UP)
    relative = jnp.exp(theta["base"][kinds] + log_step + jnp.clip(out[:, 1], -5.0, 5.0))
    steered = (
        anneal * old.scale * relative, jax.nn.sigmoid(out[:, 2]), jax.nn.softmax(out[:, 3:])
    )  # fmt: skip
    return steered, Watched(losses, alignment, log_step, old.scale)


def _decay(*windows) -> jax.Array:
    """Of averages over so many steps."""
    decays = jnp.exp(-1.0 / jnp.stack([jnp.asarray(window, jnp.float32) for window in windows]))
    # an average of decay 1 would never move
    return jnp.minimum(decays, 1.0 - 2.0**-24)


def _is_matrix(p: jax.Array) -> bool:
    return p.ndim > 1 and min(p.shape[-2:]) > 1


def _size(p: jax.Array) -> jax.Array:
    """The root mean square, and for params that start at zero a share of what others of their kind
    start at: sqrt(mean square + (0.3 * usual)^2), usual being 1 / sqrt(inputs) for matrices, 1 for
    the rest.
    """
    usual = 1.0 / math.sqrt(p.shape[-2]) if _is_matrix(p) else 1.0
    return jnp.sqrt(jnp.mean(p * p) + (0.3 * usual) ** 2)


def _finite(g: jax.Array) -> jax.Array:
    """In float32, zero where it is not finite, small enough to be squared and summed."""
    g = jnp.asarray(g, jnp.float32)
    return jnp.clip(jnp.where(jnp.isfinite(g), g, 0.0), -1e15, 1e15)


def _precondition(mean_square: jax.Array) -> jax.Array:
    """What is small beside the rest of its tensor is not blown up."""
    return lax.rsqrt(mean_square + 1e-8 * jnp.mean(mean_square) + 1e-30)


EXAMPLES = (Steered(),)
