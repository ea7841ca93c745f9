"""Celo2: an MLP per parameter gives matrices a direction, which is orthogonalised and brought to
unit root mean square; vectors take Adam's. Learning rate and schedule are the user's (arXiv
2602.19142).
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from learned_opt import base, features, fields
from learned_opt.mlp import mlp_init, mlp_per_parameter, pass_through

VECTOR_INPUTS = features.NAMES[:9]  # a vector has no rows and columns
AXES = (-2, -1)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalise(x: jax.Array) -> jax.Array:
    """Matrices [..., n, m] with the singular vectors kept and the singular values, unless minute,
    brought near 1 (0.7 to 1.2). A zero matrix stays zero.
    """
    sharding, iterate = jax.typeof(x).sharding, _newton_schulz
    if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types:
        # how the products are split over devices is left to the compiler
        iterate = jax.sharding.auto_axes(_newton_schulz, out_sharding=sharding)
    return iterate(x)  # pyright: ignore[reportReturnType]


def _newton_schulz(x: jax.Array) -> jax.Array:
    """The quintic iteration of Muon, on the smaller of the two Gram matrices."""
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[-2] > x.shape[-1]
    # not a norm, whose gradient at zero is not a number
    x = x * lax.rsqrt(jnp.sum(x * x, AXES, keepdims=True) + 1e-16)
    for _ in range(NEWTON_SCHULZ_STEPS):
        # the same polynomial from the side that is small
        gram = jnp.matrix_transpose(x) @ x if tall else x @ jnp.matrix_transpose(x)
        polynomial = b * gram + c * (gram @ gram)
        x = a * x + (x @ polynomial if tall else polynomial @ x)
    return x


def unit_rms(x: jax.Array) -> jax.Array:
    """`x` over its root mean square, taken over the last two axes (those it has)."""
    axes = AXES[-x.ndim :] if x.ndim else ()
    return x * lax.rsqrt(jnp.mean(x * x, axes, keepdims=True) + 1e-9)


class Celo2State(NamedTuple):
    count: jax.typing.ArrayLike
    accumulators: features.Accumulators


@dataclasses.dataclass(frozen=True)
class Celo2:
    """update = -step_size * direction, the direction of every matrix of root mean square 1.

    A leaf's last two axes are the matrix; axes before them count single matrices (layers, experts,
    the window of a convolution). Needs neither the loss nor a horizon. `learned_opt.compose.split`
    gives embeddings to another optimizer, as the published recipe does.

    Args:
      hidden: width of the MLP.
      orthogonalise: False is "Celo2-base".
      vectors: what leaves of rank 0 and 1 do: "adam" steps vector_multiplier * step_size along
        Adam's direction, of this rule's first momentum and second moment; "mlp" gives them to the
        MLP, without the inputs of rows and columns.
      bias_correction: of that Adam.
      initial: where meta-training starts: "momentum" steps along the momentum over its root mean
        square; "random" is the published start.
    """

    hidden: int = 8
    orthogonalise: bool = True
    step_size: float = 1e-3
    momentum_decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    rms_decay: float = 0.95
    factored_decays: tuple[float, ...] = (0.9, 0.99, 0.999)
    gradient_clip: float = 1000.0
    vectors: Literal["adam", "mlp"] = "adam"
    vector_multiplier: float = 20.0
    bias_correction: bool = True
    initial: Literal["momentum", "random"] = "momentum"

    def __post_init__(self):
        fields.at_least_one(self, "hidden")
        fields.accumulator_decays(self)
        fields.positive(self, "gradient_clip")
        fields.one_of(self, "vectors", "adam", "mlp")
        fields.momentum_or_random(self)

    @classmethod
    def published(cls) -> "Celo2":
        """The rule as it was published: the learning rate multiplies the direction itself."""
        return cls(step_size=1.0, bias_correction=False, initial="random")

    def init(self, key: base.Key) -> base.Theta:
        """Weights of the MLP, {"mlp": {w0 [30, hidden], b0, w1, b1, w2 [hidden, 3], b2}}; of its
        three outputs, the published ones, the first is the direction and the others do nothing.
        """
        n = len(self.momentum_decays)
        mlp = mlp_init(key, (6 + 8 * n, self.hidden, self.hidden, 3))
        if self.initial == "momentum":
            # the first momentum over its root mean square: behind g twice, p, n momenta and the rms
            mlp = pass_through(mlp, channel=4 + n)
        return {"mlp": mlp}

    def optimizer(
        self, theta: base.Theta, horizon: base.Horizon = None
    ) -> optax.GradientTransformationExtraArgs:
        del horizon
        base.check_theta(self, theta)
        channels = len(self.momentum_decays)
        decays = (
            jnp.asarray(self.momentum_decays, jnp.float32),
            jnp.asarray((self.rms_decay,), jnp.float32),
            jnp.asarray(self.factored_decays, jnp.float32),
        )
        mlp = theta["mlp"] | {"w2": theta["mlp"]["w2"][:, :1], "b2": theta["mlp"]["b2"][:1]}

        def init(params: base.Params) -> Celo2State:
            base.check_params(params)
            accumulators = features.accumulators_init(params, channels, 1, channels)
            return Celo2State(jnp.zeros((), jnp.int32), accumulators)

        def update(updates, state, params=None, **extra_args):
            del extra_args
            base.check_update(self, params)
            updates = jax.tree.map(jnp.asarray, updates)
            accumulators = features.accumulators_update(
                *decays, state.accumulators, updates, self.gradient_clip
            )
            count = optax.safe_increment(state.count)

            def leaf_update(g, p, m, v, row, col):
                if g.ndim < 2 and self.vectors == "adam":
                    direction = self.vector_multiplier * self._adam(count, m[0], v[0])
                else:
                    direction = self._direction(mlp, g, p, m, v, row, col)
                return (-self.step_size * direction).astype(jnp.result_type(p))

            updates = jax.tree.map(leaf_update, updates, params, *accumulators)
            return updates, Celo2State(count, accumulators)

        return optax.GradientTransformationExtraArgs(init, update)

    def _adam(self, count, m, v) -> jax.Array:
        if self.bias_correction:
            m = m / (1.0 - self.momentum_decays[0] ** count)
            v = v / (1.0 - self.rms_decay**count)
        return m * lax.rsqrt(v + 1e-8)

    def _direction(self, mlp, g, p, m, v, row, col) -> jax.Array:
        known = features.tensor_features(
            g, p, m, v, row, col, rms_epsilon=1e-8, clip=self.gradient_clip
        )
        names = features.NAMES if g.ndim > 1 else VECTOR_INPUTS
        if g.ndim < 2:
            mlp = mlp | {"w0": mlp["w0"][: 6 + 3 * len(m)]}
        (direction,) = mlp_per_parameter(
            mlp,
            [known[name] for name in names],
            shared=jnp.zeros((0,)),
            shape=g.shape,
            epsilon=1e-9,
            axes=AXES,
            stored=True,
        )
        if self.orthogonalise and g.ndim > 1:
            direction = orthogonalise(direction)
        return unit_rms(direction)


EXAMPLES = (Celo2(hidden=4),)
CONFIGURATIONS = {
    "celo2_base": Celo2(orthogonalise=False),
    # ELO-Celo2 of PyLO (arXiv 2506.10315), whose theta was meta-trained with expert trajectories
    "elo_celo2": Celo2(step_size=1.0, initial="random"),
}
