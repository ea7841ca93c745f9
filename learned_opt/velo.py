"""VeLO: an LSTM per tensor that watches the whole run mixes, out of a bank of tiny MLPs, the one
that steps the tensor's elements (arXiv 2211.09760).
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from learned_opt import base, features, fields, scheduler
from learned_opt.mlp import Shape, Weights, mlp_init, mlp_per_parameter, pass_through, sum_last
from learned_opt.recurrent import placed_as, whole

DECAYS = (0.9, 0.99, 0.999)
RMS_DECAY = (0.999,)
MLP = (30, 4, 4, 3)
# of features.NAMES the momentum of decay 0.9 over its root mean square: behind four groups of one
# and three momenta
MOMENTUM = 7
RANKS = 5
STATISTICS = 1 + RANKS + 2 * len(DECAYS)
MOMENTS = 2 + 2 * len(DECAYS)


def accumulators_init(params: base.Params) -> features.Accumulators:
    n = len(DECAYS)
    return features.accumulators_init(params, n, len(RMS_DECAY), n)


def accumulators_update(
    old: features.Accumulators, grads: base.Params, clip: float
) -> features.Accumulators:
    decays, rms_decay = jnp.asarray(DECAYS), jnp.asarray(RMS_DECAY)
    return features.accumulators_update(decays, rms_decay, decays, old, grads, clip)


def mlp_step(mlp: Weights, magnitude_scale: float, clip: float, g, p, m, v, row, col) -> jax.Array:
    """The MLP on one tensor: its first output times exp(magnitude_scale * the second); the third
    does nothing.
    """
    known = features.tensor_features(g, p, m, v, row, col, clip=clip)
    direction, magnitude, _ = mlp_per_parameter(
        mlp, [known[name] for name in features.NAMES], jnp.zeros((0,)), shape=g.shape, epsilon=1e-5
    )
    return direction * jnp.exp(magnitude_scale * magnitude)


def mean_square(p: jax.Array) -> jax.Array:
    # a barrier, or XLA would share the squares with the statistics of the MLP, and store them
    return jnp.mean(jnp.square(lax.optimization_barrier(p)))


def parameter_scale(mean_square: jax.Array) -> jax.Array:
    """The size of a tensor that its steps are relative to."""
    return jnp.sqrt(mean_square + 1e-9)


def moments(old: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
    """[8]: the mean of `v` and of its square, of every momentum the mean and the variance.

    One pass, so there are no means to subtract yet: those of `old`, these moments one step before,
    do as well against cancellation.
    """
    if v.ndim == 1:
        m, v = m[:, None], v[:, None]
    pivots = old[2 : 2 + len(m)]
    shifted = [x - pivot for x, pivot in zip(m, pivots, strict=True)]
    sums = jnp.stack(sum_last((v[0], v[0] * v[0], *shifted, *(x * x for x in shifted))))
    means = jnp.mean(sums, axis=tuple(range(1, sums.ndim))) / v.shape[-1]
    of_v, shift, square = jnp.split(means, (2, 2 + len(m)))
    return jnp.concatenate([of_v, pivots + shift, jnp.maximum(0.0, square - shift * shift)])


def statistics(mean_squares: jax.Array, moments: jax.Array, shapes: list[Shape]) -> jax.Array:
    """What the LSTM sees of the tensors, [tensors, 12]: the sizes of their second moments and how
    much their momenta and second moments vary, relative to the parameters, and their ranks.

    The second moment is compared with the means of the momenta: a quirk of the published rule.
    """
    scale = features.safe_rsqrt(mean_squares)[:, None]
    mean_v, mean_v2, mean_m, var_m = jnp.split(moments, (1, 2, 5), axis=1)
    var_v = mean_v2 - 2.0 * mean_v * mean_m + mean_m**2
    logarithm = lambda x: 0.5 * jnp.clip(jnp.log(1e-8 + jnp.abs(10.0 * x)), -5.0, 5.0)  # noqa: E731
    ranks = [sum(n > 1 for n in shape) for shape in shapes]
    one_hot = jax.nn.one_hot(jnp.asarray(ranks, jnp.int32), RANKS)
    return jnp.concatenate(
        [
            logarithm(scale * mean_v), one_hot,
            logarithm(scale**2 * var_m), logarithm(scale**2 * var_v),
        ],
        axis=1,
    )  # fmt: skip


class VeloState(NamedTuple):
    """The LSTM and `moments` have a row per tensor, in the order of jax.tree.leaves.

    `moments` [tensors, 8] describe the accumulators: the LSTM sees those of the step before.
    """

    count: jax.typing.ArrayLike
    scheduler: scheduler.SchedulerState
    accumulators: features.Accumulators
    moments: jax.Array


@dataclasses.dataclass(frozen=True)
class Velo:
    """update = -step_size * multiplier * rms(params) * direction * exp(magnitude_scale * magnitude)

    Direction and magnitude are outputs of an MLP of 30 normalised inputs. Its weights are, for
    every tensor, interpolation * mean_k(control_k * bank_k); controls and multiplier are linear
    heads of the LSTM. Needs the loss and the horizon. NaN losses after the first are harmless.

    Args:
      lstm: size of the LSTM.
      bank: number of MLPs to mix.
      interpolation: at the published 100, meta-training of small rules was found to be unstable.
      gradient_clip: gradients are clipped to plus or minus this, element by element.
      relative_steps: False leaves rms(params) out, as mu-parametrization needs it.
      clip_param_scale: rms(params) is cut off at this times the root of the number of elements.
      short_loss_buffer: published quirk of old weights ("bugged loss features"): the loss is
        averaged as in a run of 10 steps, whatever the horizon.
      stateless_lstm: published quirk of old weights ("bugged next LSTM state"): every step starts
        from the first LSTM state.
      initial: where meta-training starts: "momentum" steps step_size * rms(params) along the
        momentum over its root mean square; "random" is the published start.
    """

    lstm: int = 64
    bank: int = 16
    interpolation: float = 1.0
    step_size: float = 1e-3
    magnitude_scale: float = 1e-3
    gradient_clip: float = 1000.0
    relative_steps: bool = True
    clip_param_scale: float | None = None
    short_loss_buffer: bool = False
    stateless_lstm: bool = False
    initial: Literal["momentum", "random"] = "momentum"

    def __post_init__(self):
        fields.at_least_one(self, "lstm", "bank")
        fields.positive(self, "interpolation", "gradient_clip", "clip_param_scale")
        fields.one_of(self, "initial", "momentum", "random")

    @classmethod
    def published(cls) -> "Velo":
        """The rule of the released weights."""
        return cls(lstm=512, bank=256, interpolation=100.0, initial="random")

    def init(self, key: base.Key) -> base.Theta:
        """{"bank": {w0 [bank, 30, 4], b0 [bank, 4], w1, b1, w2 [bank, 4, 3], b2}, "scheduler":
        {"mix_all", "mix_own", "lstm", "controls", "step_size", each {w, b}, "initial": {hidden,
        cell}}}.
        """
        keys = jax.random.split(key)
        bank = jax.vmap(lambda key: mlp_init(key, MLP))(jax.random.split(keys[0], self.bank))
        heads = {"controls": self.bank, "step_size": 1}
        plan = scheduler.scheduler_init(
            keys[1], scheduler.RUN_FEATURES + STATISTICS, self.lstm, heads
        )
        if self.initial == "momentum":
            bank = jax.vmap(lambda mlp: pass_through(mlp, MOMENTUM))(bank)
            controls = scheduler.head_at(plan["controls"], 1.0)
            plan["controls"] = jax.tree.map(lambda x: x / self.interpolation, controls)
            plan["step_size"] = scheduler.head_at(plan["step_size"], 1.0)
        return {"bank": bank, "scheduler": plan}

    def optimizer(
        self, theta: base.Theta, horizon: base.Horizon = None
    ) -> optax.GradientTransformationExtraArgs:
        base.check_theta(self, theta)
        horizon = base.require_horizon(self, horizon)

        def init(params: base.Params) -> VeloState:
            base.check_params(params)
            tensors = len(jax.tree.leaves(params))
            averaged = 10 if self.short_loss_buffer else horizon
            return VeloState(
                jnp.zeros((), jnp.int32),
                scheduler.scheduler_state(theta["scheduler"], tensors, averaged),
                accumulators_init(params),
                jnp.zeros((tensors, MOMENTS)),
            )

        def update(updates, state, params=None, **extra_args):
            base.check_update(self, params)
            updates = jax.tree.map(jnp.asarray, updates)
            loss = base.require_value(self, extra_args)
            clip, single = self.gradient_clip, base.float32(params)
            tensors, treedef = jax.tree.flatten(single)
            leaves = lambda *trees: zip(*map(treedef.flatten_up_to, trees), strict=True)  # noqa: E731

            mlps, factors, watched = self._plan(theta, horizon, loss, state, tensors)
            accumulators = accumulators_update(state.accumulators, updates, clip)
            steps = [
                factor * mlp_step(mlp, self.magnitude_scale, clip, *leaf)
                for mlp, factor, leaf in zip(
                    mlps, factors, leaves(updates, single, *accumulators), strict=True
                )
            ]
            updates = base.like_params(treedef.unflatten(steps), params)
            found = [
                moments(old, *leaf)
                for old, leaf in zip(
                    whole(state.moments),
                    leaves(accumulators.momentum, accumulators.rms),
                    strict=True,
                )
            ]
            found = jnp.asarray(found).reshape(len(tensors), MOMENTS)
            found = placed_as(found, state.moments)
            count = optax.safe_increment(state.count)
            return updates, VeloState(count, watched, accumulators, found)

        return optax.GradientTransformationExtraArgs(init, update)

    def _plan(self, theta, horizon, loss, state: VeloState, tensors: list[jax.Array]):
        """For every tensor the weights of its MLP and the factor of its steps; the new state of the
        scheduler.
        """
        plan, n = theta["scheduler"], len(tensors)
        old, old_moments = whole((state.scheduler, state.moments))
        squares = jnp.asarray([mean_square(p) for p in tensors])
        of_tensors = statistics(squares, old_moments, [p.shape for p in tensors])
        of_run, losses = scheduler.run_features(old.losses, loss, state.count, horizon)
        x = jnp.concatenate([jnp.tile(of_run, (n, 1)), of_tensors], axis=1)
        lstm = scheduler.mixed_lstm(plan, x, old.lstm)

        controls = scheduler.dense_rows(plan["controls"], lstm.hidden)
        controls *= self.interpolation / self.bank
        mixed = jax.tree.map(lambda w: jnp.tensordot(controls, w, 1), theta["bank"])
        scales = parameter_scale(squares) if self.relative_steps else jnp.ones(n)
        if self.clip_param_scale is not None:
            sizes = jnp.asarray([p.size for p in tensors], jnp.float32)
            scales = jnp.minimum(scales, self.clip_param_scale * jnp.sqrt(sizes))
        multipliers = scheduler.dense_rows(plan["step_size"], lstm.hidden)[:, 0]

        mlps = [{name: w[i] for name, w in mixed.items()} for i in range(n)]
        new = scheduler.SchedulerState(losses, old.lstm if self.stateless_lstm else lstm)
        factors = list(-self.step_size * multipliers * scales)
        return mlps, factors, placed_as(new, state.scheduler)


EXAMPLES = (Velo(lstm=8, bank=4),)
