"""What is known before work starts: programs whose memory is countable by hand, predictions against
what XLA takes, and one sentence for what cannot be.
"""

import dataclasses
import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax

from learned_opt.hyperparams import Hyperparams
from meta_train import memory, preflight
from meta_train.estimators.bptt import TruncatedBPTT
from meta_train.estimators.dodge import DODGE
from meta_train.estimators.nres import NRES
from meta_train.unroll import Training
from tasks.base import relative_loss
from tasks.quadratic import Quadratic

KEY = jax.random.key(0)
VECTOR, MATRIX = jax.ShapeDtypeStruct((100,), jnp.float32), jax.ShapeDtypeStruct((100, 100), "f4")


def scanned(x):
    """Ten steps whose carry is written over."""
    return lax.scan(lambda x, _: (jnp.sin(2.0 * x), None), x, length=10)[0]


@pytest.mark.parametrize(
    ("function", "arguments", "floats"),
    [
        (lambda x: jnp.tanh(jnp.exp(x) * 2.0) + 1.0, [VECTOR], 100 + 100),
        (lambda a, b: a @ b, [MATRIX, MATRIX], 3 * 10_000),
        # the first product is needed by the second alone, and lives while that is computed
        (lambda a: (a @ a) @ a, [MATRIX], 10_000 + 2 * 10_000),
        (lambda a: jnp.sum(jnp.square(a)), [MATRIX], 10_000 + 1),
        (lambda x: jax.jit(jnp.sin)(jax.jit(jnp.sin)(x)), [VECTOR], 100 + 100),
        # the larger branch
        (lambda a: lax.cond(a[0, 0] > 0, lambda a: (a @ a) @ a, jnp.sin, a), [MATRIX], 40_002),
    ],
    ids=["fused", "product", "two_products", "reduction", "calls", "branches"],
)
def test_memory_by_hand(function, arguments, floats):
    assert memory.predicted_bytes(function, *arguments) == pytest.approx(4 * floats, abs=16)


def test_backpropagation_stores_every_step_of_a_scan():
    plain = memory.predicted_bytes(scanned, VECTOR)
    assert plain <= 4 * 300
    stored = memory.predicted_bytes(jax.grad(lambda x: jnp.sum(scanned(x))), VECTOR)
    assert 4 * 10 * 100 <= stored <= 4 * (10 * 100 + 500)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Identity:
    """A matrix is to become the identity; as a family, this one task."""

    def __call__(self, key):
        return self

    def init(self, key):
        return jax.random.normal(key, (32, 32))

    def batch(self, key, split):
        return jax.random.normal(key, (16, 32))

    def loss(self, params, batch):
        return jnp.mean(jnp.square(batch @ params - batch))

    def normalize(self, loss):
        return relative_loss(loss, 32.0)


@pytest.mark.parametrize(
    "example", [NRES(particles=6), TruncatedBPTT(particles=6)], ids=["es", "bptt"]
)
def test_predictions_are_near_what_xla_takes(example):
    rule = Hyperparams(knots=2)
    problem = Training(Identity(), rule, 12, 4, example.backpropagates)
    estimator = dataclasses.replace(example, problem=problem)
    theta = jax.eval_shape(rule.init, KEY)
    state = jax.eval_shape(estimator.init, theta, KEY)
    program = jax.jit(lambda e, t, s, k: e.estimate(t, s, k)).lower(estimator, theta, state, KEY)
    found = program.compile().memory_analysis()
    taken = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
    assert taken / 3 < preflight.predicted_bytes(estimator, theta) < 1.5 * taken


def quadratic(rule, horizon=4):
    return Training(Quadratic(dimension=2), rule, horizon, 2)


@pytest.mark.parametrize(
    ("estimator", "message"),
    [
        (
            NRES(particles=10**5),
            r"^`particles` 100000 need about \S+ GiB of memory, 0.5 GiB are available: "
            r"choose fewer `particles`$",
        ),
        (
            TruncatedBPTT(particles=10**5),
            r"^`particles` 100000 with `truncation` 2 need .* a shorter `truncation`, or .* nres",
        ),
    ],
    ids=["es", "bptt"],
)
def test_particles_that_need_more_memory_than_there_is_are_refused(estimator, message):
    rule = Hyperparams(knots=2)
    problem = Training(Quadratic(dimension=1000), rule, 4, 2, estimator.backpropagates)
    estimator = dataclasses.replace(estimator, problem=problem)
    with pytest.raises(ValueError, match=message):
        preflight.check(estimator, rule, available=2**29)
    preflight.check(estimator, rule, available=None)
    preflight.check(dataclasses.replace(estimator, particles=4), rule, available=2**28)


def test_available_memory_is_the_accelerators_limit_or_what_is_free():
    def device(platform, stats):
        return SimpleNamespace(platform=platform, memory_stats=lambda: stats)

    assert memory.available_bytes([device("gpu", {"bytes_limit": 123})] * 2) == 246
    assert memory.available_bytes([device("gpu", None), device("gpu", {"bytes_limit": 1})]) is None
    free = memory.available_bytes(jax.devices("cpu"))
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert free is None or 2**20 < free <= installed


@dataclasses.dataclass(frozen=True)
class Signs:
    """A rule of signs."""

    differentiable = False

    def init(self, key):
        return {"log_learning_rate": jnp.zeros(())}

    def optimizer(self, theta, horizon=None):
        return optax.scale_by_sign()


@dataclasses.dataclass(frozen=True)
class Searching:
    """A rule that halves its step until that is small enough: a loop of unknown length."""

    def init(self, key):
        return {"step": jnp.ones(())}

    def optimizer(self, theta, horizon=None):
        def update(updates, state, params=None, **extra_args):
            size = optax.tree.norm(updates)
            step = lax.while_loop(lambda s: s * size > 1.0, lambda s: s / 2, theta["step"])
            return jax.tree.map(lambda u: -step * u, updates), state

        return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (Signs(), "it declares that its gradients vanish"),
        (Searching(), "Reverse-mode .* lax.while_loop"),
    ],
)
def test_rules_that_cannot_be_differentiated_are_refused(rule, reason):
    name = type(rule).__name__.lower()
    problem = quadratic(rule)
    message = (
        rf"^`estimator` truncated_bptt differentiates through the rule, and {name} is not "
        rf"differentiable \({reason}.*\): use an evolution-strategies estimator such as nres$"
    )
    with pytest.raises(ValueError, match=message):
        preflight.check(TruncatedBPTT(problem, particles=2), rule)
    preflight.check(NRES(problem, particles=2), rule)


def test_forward_mode_differentiates_where_it_says_so():
    class ForwardMode(DODGE):
        differentiates = True

    with pytest.raises(ValueError, match="`estimator` forward_mode differentiates"):
        preflight.check(ForwardMode(quadratic(Signs()), particles=2), Signs())
    preflight.check(DODGE(quadratic(Searching()), particles=2), Searching())


@dataclasses.dataclass(frozen=True)
class Picky(Signs):
    """A rule that only some tasks can serve."""

    def optimizer(self, theta, horizon=None):
        def update(updates, state, params=None, **extra_args):
            return updates, extra_args["smoothness"]

        return optax.GradientTransformationExtraArgs(lambda params: (), update)


def test_a_task_and_a_rule_that_do_not_fit_fail_as_they_are():
    for estimator in (NRES(quadratic(Picky()), 2), TruncatedBPTT(quadratic(Picky()), 2)):
        with pytest.raises(KeyError, match="smoothness"):
            preflight.check(estimator, Picky())
