"""rnn_mlp: an LSTM per tensor, which sees statistics and the training and validation loss, tells an
MLP per parameter how to step (arXiv 2009.11243).
"""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.tree_util import Partial

from learned_opt import base, features, fields
from learned_opt.mlp import mlp_init, mlp_per_parameter, pass_through
from learned_opt.recurrent import (
    LSTMState,
    dense,
    dense_init,
    lstm,
    lstm_init,
    placed_as,
    whole,
)

STATISTICS = 18
TRAIN_LOSS_DECAY, VALID_LOSS_DECAY = 0.9, 0.95
CLIP_DECAY, CLIP_MULTIPLE = 0.99, 10.0
TOLD = ("lstm_to_lstm", "lstm_to_mlp")


class Losses(NamedTuple):
    """Moving averages of the losses, not corrected for their start at zero."""

    train: jax.Array
    train_variance: jax.Array
    valid: jax.Array
    valid_count: jax.Array


class RnnMlpState(NamedTuple):
    """Momenta and second moments [decays, *shape] per leaf; per tensor, in the order of the leaves,
    the LSTM's state [tensors, lstm] and what the MLP told it [tensors, from_mlp]; what the LSTMs
    told each other [from_lstm]; the moving average of the gradients' root mean square.
    """

    count: jax.Array
    momentum: Any
    rms: Any
    lstm: LSTMState
    from_mlp: jax.Array
    from_lstm: jax.Array
    losses: Losses
    gradient_size: jax.Array


@dataclasses.dataclass(frozen=True)
class RnnMlp:
    """update = -step_size * direction * exp(magnitude_scale * magnitude), both outputs of an MLP of
    54 inputs: 23 normalised features of the parameter, 11 embed the time, 3 sizes, 17 of the LSTM.

    The LSTM of a tensor sees 18 statistics, the mean over tensors of what the LSTMs put out one
    step before, and the mean over the tensor of what the MLP did. Gradients are clipped to ten
    times their usual size. No horizon is needed; the training loss is, as optax's `value=`. The
    validation loss is the optional keyword `valid_value=`.

    Args:
      lstm, hidden: sizes of the LSTM and the MLP.
      from_lstm, from_mlp, to_mlp: numbers from LSTM to LSTM, MLP to LSTM, LSTM to MLP.
      decays: of momenta and second moments.
      separate_validation: as published, a validation loss is a step of its own: it advances the
        time, and a step without one leaves the average of them as it is (zero, as long as there is
        none). Otherwise a missing `valid_value` is taken to be `value`.
      initial: where meta-training starts: "momentum" steps along the momentum of decay nearest to
        0.9 over the root of its second moment; "random" is the published start.
    """

    lstm: int = 64
    hidden: int = 32
    from_lstm: int = 18
    from_mlp: int = 16
    to_mlp: int = 17
    step_size: float = 1e-3
    magnitude_scale: float = 1e-3
    decays: tuple[float, ...] = (0.5, 0.9, 0.99, 0.999, 0.9999)
    separate_validation: bool = False
    initial: Literal["momentum", "random"] = "momentum"

    def __post_init__(self):
        fields.at_least_one(self, "lstm", "hidden", "from_lstm", "from_mlp", "to_mlp")
        fields.decays("`decays`", self.decays)
        fields.momentum_or_random(self)

    @classmethod
    def published(cls) -> "RnnMlp":
        """The rule as it was published."""
        return cls(separate_validation=True, initial="random")

    def init(self, key: base.Key) -> base.Theta:
        """{"lstm", "lstm_to_lstm", "lstm_to_mlp": {w, b} each, "mlp": {w0 [54, hidden], b0, w1, b1,
        w2 [hidden, 2 + from_mlp], b2}, "initial": {hidden [lstm], cell [lstm], from_lstm
        [from_lstm], from_mlp [from_mlp]}}.
        """
        keys = jax.random.split(key, 6)
        n = len(self.decays)
        inputs = 6 + 4 * n + len(features.TIME_SCALES) + self.to_mlp
        mlp = mlp_init(keys[0], (inputs, self.hidden, self.hidden, 2 + self.from_mlp))
        if self.initial == "momentum":
            nearest = min(self.decays, key=lambda b: abs(b - 0.9))
            # behind g, p, log|p|, momenta and second moments
            mlp = pass_through(mlp, channel=3 + 2 * n + self.decays.index(nearest))
        told = lambda key, n: jax.random.truncated_normal(key, -2, 2, (n,)) / np.sqrt(n)  # noqa: E731
        return {
            "lstm": lstm_init(keys[1], STATISTICS + self.from_lstm + self.from_mlp, self.lstm),
            "lstm_to_lstm": dense_init(keys[2], self.lstm, self.from_lstm),
            "lstm_to_mlp": dense_init(keys[3], self.lstm, self.to_mlp),
            "mlp": mlp,
            "initial": {
                "hidden": jnp.zeros((self.lstm,)),
                "cell": jnp.zeros((self.lstm,)),
                "from_lstm": told(keys[4], self.from_lstm),
                "from_mlp": told(keys[5], self.from_mlp),
            },
        }

    def optimizer(
        self, theta: base.Theta, horizon: base.Horizon = None
    ) -> optax.GradientTransformationExtraArgs:
        del horizon
        base.check_theta(self, theta)
        initial, decays = theta["initial"], jnp.asarray(self.decays, jnp.float32)

        def init(params: base.Params) -> RnnMlpState:
            base.check_params(params)
            tensors = len(jax.tree.leaves(params))
            repeat = lambda x: jnp.tile(x[None], (tensors, 1))  # noqa: E731
            zero = lambda dtype=jnp.float32: jnp.zeros((), dtype)  # noqa: E731
            return RnnMlpState(
                count=zero(jnp.int32),
                momentum=features.moments_init(params, len(self.decays)),
                rms=features.moments_init(params, len(self.decays)),
                lstm=LSTMState(repeat(initial["hidden"]), repeat(initial["cell"])),
                from_mlp=repeat(initial["from_mlp"]),
                from_lstm=jnp.array(initial["from_lstm"]),
                losses=Losses(zero(), zero(), zero(), zero(jnp.int32)),
                # as if a gradient of size 1 had been seen
                gradient_size=jnp.asarray(1.0 - CLIP_DECAY, jnp.float32),
            )

        def update(updates, state, params=None, **extra_args):
            base.check_update(self, params)
            value = base.require_value(self, extra_args)
            treedef = jax.tree.structure(updates)
            if not treedef.num_leaves:
                return updates, state
            count = jnp.asarray(optax.safe_increment(state.count))
            losses = _seen(state.losses, value, self._validation(value, extra_args))
            seen = _loss_features(count, losses, value)
            gradient_size, grads = _clipped(count, state.gradient_size, base.float32(updates))
            momentum = jax.tree.map(lambda m, g: features.ema(decays, m, g), state.momentum, grads)
            rms = jax.tree.map(lambda v, g: features.ema(decays, v, g * g), state.rms, grads)
            trees = (grads, params, momentum, rms)
            tensors = list(zip(*map(treedef.flatten_up_to, trees), strict=True))

            messages = (state.from_lstm, state.from_mlp, state.lstm)
            from_lstm, from_mlp, lstm_state = jax.tree.map(whole, messages)

            def watch(statistics: jax.Array, from_mlp: jax.Array, lstm_state: LSTMState):
                inputs = jnp.concatenate([from_lstm, from_mlp, statistics])
                lstm_state = lstm(theta["lstm"], inputs, lstm_state)
                told = [dense(theta[name], lstm_state.hidden) for name in TOLD]
                return lstm_state, *told

            statistics = jnp.stack([_statistics(seen, *tensor) for tensor in tensors])
            lstm_state, to_lstm, to_mlp = jax.vmap(watch)(statistics, from_mlp, lstm_state)
            time = state.count + (losses.valid_count if self.separate_validation else 0)
            step = functools.partial(self._leaf_update, theta["mlp"], time, len(tensors))
            steps, from_mlp = zip(
                *(step(row, *tensor) for tensor, row in zip(tensors, to_mlp, strict=True)),
                strict=True,
            )
            new = (jnp.mean(to_lstm, axis=0), jnp.stack(from_mlp), lstm_state)
            from_lstm, from_mlp, lstm_state = jax.tree.map(placed_as, new, messages)
            return jax.tree.unflatten(treedef, steps), RnnMlpState(
                count=count,
                momentum=momentum,
                rms=rms,
                lstm=lstm_state,
                from_mlp=from_mlp,
                from_lstm=from_lstm,
                losses=losses,
                gradient_size=gradient_size,
            )

        return optax.GradientTransformationExtraArgs(init, update)

    def _validation(self, value: jax.Array, extra_args: dict[str, Any]) -> jax.Array | None:
        """The validation loss of this step, if it has one."""
        valid = extra_args.get("valid_value")
        if valid is None:
            return None if self.separate_validation else value
        if jnp.ndim(valid):
            raise ValueError(
                "`valid_value` of RnnMlp must be the scalar validation loss, got shape "
                f"{jnp.shape(valid)}"
            )
        return jnp.asarray(valid, jnp.float32)

    def _leaf_update(self, mlp, time, tensors: int, told, g, p, m, v):
        """The update of a tensor and what its MLP tells the LSTM, [from_mlp]."""
        p = jnp.asarray(p)
        dtype, p = p.dtype, p.astype(jnp.float32)
        rsqrt, p = Partial(_rsqrt, v), p[None]
        inputs = [(g[None],), (p,), (Partial(_log_abs, p),), (m,), (v,), (m, rsqrt), (rsqrt,)]
        sizes = [math.log(tensors) - 1.0, jnp.log(_norm(p) + 1e-8), math.log(p.size)]
        shared = jnp.concatenate([_time_embedding(time), jnp.stack(sizes), told])
        direction, magnitude, *means = mlp_per_parameter(
            mlp, inputs, shared=shared, shape=g.shape, epsilon=1e-5, pooled=self.from_mlp
        )
        step = self.step_size * direction * jnp.exp(self.magnitude_scale * magnitude)
        return -step.astype(dtype), jnp.stack(means)


def _rsqrt(v: jax.Array) -> jax.Array:
    return lax.rsqrt(v + 1e-6)


def _log_abs(p: jax.Array) -> jax.Array:
    return jnp.log(jnp.abs(p) + 1e-8)


def _time_embedding(count: jax.Array) -> jax.Array:
    """Sines of eleven frequencies, [11]."""
    return jnp.sin(count / (jnp.asarray(features.TIME_SCALES, jnp.float32) * np.pi))


def _norm(x: jax.Array) -> jax.Array:
    """The Euclidean norm, whose gradient at zero is zero."""
    square = jnp.sum(x * x)
    return jnp.where(square == 0.0, 0.0, jnp.sqrt(jnp.where(square == 0.0, 1.0, square)))


def _log_magnitude(x: jax.Array) -> jax.Array:
    return jnp.clip(jnp.log(1e-8 + jnp.abs(x)), -5.0, 5.0)


def _clipped(count, size, grads) -> tuple[jax.Array, Any]:
    """The gradients' usual size after this step, and they, clipped by what it was before."""
    bound = CLIP_MULTIPLE * size / (1.0 - CLIP_DECAY ** count.astype(jnp.float32))
    grads = jax.tree.map(lambda g: jnp.clip(g, -bound, bound), grads)
    squares = jnp.stack([jnp.mean(g * g) for g in jax.tree.leaves(grads)])
    seen = jnp.sqrt(jnp.mean(squares) + 1e-8)
    return CLIP_DECAY * size + (1.0 - CLIP_DECAY) * seen, grads


def _seen(losses: Losses, value: jax.Array, valid: jax.Array | None) -> Losses:
    """The averages after one more training loss and, maybe, validation loss."""
    b = TRAIN_LOSS_DECAY
    train = b * losses.train + (1.0 - b) * value
    variance = b * losses.train_variance + (1.0 - b) * jnp.square(train - value)
    losses = losses._replace(train=train, train_variance=variance)
    if valid is None:
        return losses
    b = VALID_LOSS_DECAY
    average = b * losses.valid + (1.0 - b) * valid
    return losses._replace(valid=average, valid_count=optax.safe_increment(losses.valid_count))


def _loss_features(count: jax.Array, losses: Losses, value: jax.Array) -> jax.Array:
    """The training loss and the average validation loss, each less the average training loss and
    over its standard deviation, [2].
    """
    seen = 1.0 - TRAIN_LOSS_DECAY ** count.astype(jnp.float32)
    seen_valid = 1.0 - VALID_LOSS_DECAY ** losses.valid_count.astype(jnp.float32)
    # without any validation loss the average is zero, not 0 / 0
    valid = losses.valid / jnp.maximum(seen_valid, 1e-8)
    scale = lax.rsqrt(losses.train_variance / seen + 1e-8)
    return jnp.clip((jnp.stack([value, valid]) - losses.train / seen) * scale, -5.0, 5.0)


def _statistics(loss_features: jax.Array, g, p, m, v) -> jax.Array:
    """What the LSTM sees of a tensor and the losses, [18], in the published order."""
    p = jnp.asarray(p, jnp.float32)
    means = [jnp.mean(x) for x in (m, v, p)]
    signed = [f(mean) for mean in means for f in (_log_magnitude, jnp.sign)]
    spreads = [
        _log_magnitude(jnp.mean(jnp.square(x - mean)))
        for x, mean in zip((m, v, p), means, strict=True)
    ]
    # the first four axes
    shape = [math.log(n) - 1.0 for n in (*p.shape, 1, 1, 1, 1)[:4]]
    scalar = 1.0 if p.ndim == 0 else -1.0
    norms = [_log_magnitude(_norm(x)) for x in (g, p)]
    return jnp.stack([norms[0], scalar, *signed, norms[1], *shape, *loss_features, *spreads])


EXAMPLES = (RnnMlp(lstm=8, hidden=8),)
