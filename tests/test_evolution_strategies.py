"""What the estimators by evolution strategies do with their fields, and the diagnostics, against
values computed by hand. That they are unbiased is in test_estimators.py.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_system import LinearSystem
from scipy.stats import rankdata
from test_estimators import run

import meta_train.estimators
from learned_opt import discovery
from meta_train.estimators import antithetic
from meta_train.estimators.base import Estimate, diagnostics, mean_estimate, partition
from meta_train.estimators.bptt import TruncatedBPTT
from meta_train.estimators.full_es import FullES
from meta_train.estimators.gpes import GPES
from meta_train.estimators.guided_es import GuidedES, direction
from meta_train.estimators.nres import NRES
from meta_train.estimators.pes import PES
from meta_train.estimators.truncated_es import TruncatedES

KEY, THETA = jax.random.key(1), jnp.array([0.5, -1.0])
ONE_WINDOW = LinearSystem(4, 4, size=2)
MEMBERS = discovery.members(meta_train.estimators)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Named:
    """The system for a theta with named leaves."""

    system: LinearSystem

    windows = property(lambda self: self.system.windows)

    def reset(self, theta, key, episode=0, stagger=False):
        return self.system.reset(as_vector(theta), key, episode, stagger)

    def unroll(self, theta, state, key):
        return self.system.unroll(as_vector(theta), state, key)


NAMED = Named(LinearSystem(4, 4, size=3))


def as_vector(theta):
    return jnp.concatenate([theta["mlp"]["b"], theta["mlp"]["w"], theta["rest"]], axis=-1)


def named(values):
    return {"mlp": {"b": values[:1], "w": values[1:2]}, "rest": values[2:]}


def first(estimator, theta=THETA):
    """The first estimate, and the state after it."""
    return run(estimator, theta, estimator.init(theta, KEY), KEY)


def build(spec):
    return discovery.build("estimator", spec, MEMBERS)


# --- sigma ---


def test_every_leaf_has_the_noise_of_the_longest_prefix_and_is_divided_by_its_square():
    sigma = {"mlp": 0.1, "": 0.02, "mlp.w": 0.5}
    estimator = NRES(NAMED, particles=2000, sigma=sigma)
    estimate, state = first(estimator, named(jnp.array([0.5, -1.0, 0.2])))
    noise = np.asarray(as_vector(state.noise), np.float64)
    each = np.array([0.1, 0.5, 0.02])
    assert np.all(np.abs(noise.std(axis=0) / each - 1) < 4 / np.sqrt(2 * 2000))
    difference = 2 * noise @ NAMED.system.gradient(truncated=False)
    expected = np.mean(noise * difference[:, None], axis=0) / (2 * each**2)
    np.testing.assert_allclose(as_vector(estimate.grad), expected, rtol=2e-3)


def test_prefixes_are_whole_names():
    theta = {"mlp": {"w": jnp.ones(2)}, "mlp2": {"w": jnp.ones(2)}, "m": jnp.ones(1)}
    assert antithetic.sigmas(theta, (("", 1.0), ("mlp", 2.0), ("mlp2.w", 3.0))) == {
        "mlp": {"w": 2.0},
        "mlp2": {"w": 3.0},
        "m": 1.0,
    }
    assert antithetic.sigmas(jnp.ones(3), (("", 4.0),)) == 4.0


def test_specs_of_sigma():
    assert build("nres(particles=32, sigma=0.02)").sigma == 0.02
    pairs = build("nres(sigma=(('mlp', 0.01), ('', 0.003)))")
    named_ = build("nres(sigma={'mlp': 0.01, '': 0.003})")
    assert pairs == named_
    assert hash(named_) == hash(NRES(sigma=(("mlp", 0.01), ("", 0.003))))


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        ({"mlp": 0.1}, r"`sigma` has none for the leaf 'rest', got .*\('', number\)"),
        ({"": 0.1, "mpl": 0.1}, r"`sigma` names 'mpl', where theta .* 'mlp.b', 'mlp.w', 'rest'"),
        ({"": 0.0}, "`sigma` must be positive"),
        ({}, "`sigma` must be positive"),
        (math.inf, "`sigma` must be positive, got inf"),
        ("0.1", "`sigma` must be positive, got 0.1"),
        ((0.1, 0.2), "`sigma` must be pairs of prefix and number"),
    ],
)
def test_impossible_sigmas_are_refused(sigma, message):
    with pytest.raises(ValueError, match=message):
        first(NRES(NAMED, sigma=sigma), named(jnp.ones(3)))


# --- what counts of a difference ---


def ranks(differences):
    return np.sign(differences) * rankdata(np.abs(differences)) / len(differences)


def clipped(differences):
    return np.clip(differences, -0.5, 0.5)


@pytest.mark.parametrize(
    ("cls", "fields", "counts"),
    [
        (NRES, {"shaping": "sign"}, np.sign),
        (NRES, {"shaping": "rank"}, ranks),
        (NRES, {"clip_difference": 0.5}, clipped),
        *(
            (cls, {"shaping": "rank", "clip_difference": 0.5}, lambda d: ranks(clipped(d)))
            for cls in (NRES, PES, GPES, TruncatedES, FullES)
        ),
    ],
)
def test_what_counts_of_the_differences(cls, fields, counts):
    """On one window of a linear system the difference is 2 gradient.noise; the noise is the same
    for all, and known from the state of one.
    """
    _, state = first(NRES(ONE_WINDOW, particles=9, sigma=0.03))
    noise = np.asarray(state.noise, np.float64)
    differences = 2 * noise @ ONE_WINDOW.gradient(truncated=False)
    assert 0 < np.sum(np.abs(differences) > 0.5) < 9
    estimate, _ = first(cls(ONE_WINDOW, particles=9, sigma=0.03, **fields))
    expected = np.mean(noise * counts(differences)[:, None], axis=0) / (2 * 0.03**2)
    np.testing.assert_allclose(estimate.grad, expected, rtol=1e-3)
    np.testing.assert_allclose(
        estimate.info["squared_difference"], np.mean(differences**2), rtol=1e-4
    )


def test_ranks_of_equal_and_of_no_differences():
    difference = jnp.array([0.5, -0.5, 2.0, 0.0, -1.0, 0.5, jnp.nan])
    got = antithetic.shaped(NRES(shaping="rank"), difference)
    np.testing.assert_allclose(got, np.array([3, -3, 6, 0, -5, 3, np.nan]) / 7)


def test_ranks_need_all_particles_in_one_place():
    estimator = NRES(particles=4, shaping="rank")
    assert partition(estimator, 1) == [estimator]
    with pytest.raises(
        ValueError, match=r"`shaping`='rank' .* needs `workers` of at most 1, got 2"
    ):
        partition(estimator, 2)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nres(shaping='ranks')", "`shaping` must be one of 'none', 'sign', 'rank', got 'ranks'"),
        ("pes(clip_difference=0)", "`clip_difference` must be positive, got 0"),
        ("gpes(reuse=0)", "`reuse` must be an integer of at least 1, got 0"),
        ("gpes(reuse=1.5)", "`reuse` must be an integer of at least 1, got 1.5"),
        ("guided_es(alpha=1.5)", "`alpha` must be between 0 and 1, got 1.5"),
        ("guided_es(beta=0)", "`beta` must be positive, got 0"),
    ],
)
def test_impossible_fields_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        build(spec)


# --- noise that is reused for some windows ---


@pytest.mark.parametrize(("reuse", "other"), [(1, PES), (4, NRES), (9, NRES)])
def test_the_ends_of_the_family(reuse, other):
    """Bit-equal but for how a compiler orders sums: equal up to rounding."""
    problem = LinearSystem(8, 2, size=2)
    general = GPES(problem, particles=5, sigma=0.1, reuse=reuse)
    special = other(problem, particles=5, sigma=0.1)
    states = [general.init(THETA, KEY), special.init(THETA, KEY)]
    for i in range(10):
        key = jax.random.fold_in(KEY, i)
        got, states[0] = run(general, THETA, states[0], key)
        expected, states[1] = run(special, THETA, states[1], key)
        np.testing.assert_allclose(got.grad, expected.grad, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(states[0].noise.total, states[1].noise, rtol=1e-6)


def test_a_window_answers_for_each_noise_since_the_reset_once():
    estimator = GPES(LinearSystem(10, 2, size=2), particles=3, reuse=2)
    state, drawn = estimator.init(THETA, KEY), [[] for _ in range(3)]
    for i in range(12):
        windows = np.asarray(state.window)
        _, state = run(estimator, THETA, state, jax.random.fold_in(KEY, i))
        for p, window in enumerate(windows):
            current, total = np.asarray(state.noise.current)[p], np.asarray(state.noise.total)[p]
            if window % 2 == 0:
                drawn[p] = [*(drawn[p] if window else []), current]
            np.testing.assert_array_equal(current, drawn[p][-1])
            assert len(drawn[p]) == window // 2 + 1
            np.testing.assert_allclose(total, np.sum(drawn[p], axis=0), rtol=1e-5)
    assert len({*windows}) > 1, "particles are out of phase"


# --- noise along a surrogate gradient ---


def covariance(guide, alpha, size):
    return alpha / size * np.eye(size) + (1 - alpha) * np.outer(guide, guide)


def test_the_noise_is_stretched_along_the_guide():
    """Measured in units of a leaf's sigma; without a guide it is isotropic."""
    sigma, scale = {"mlp": 0.1, "": 0.5}, np.array([0.1, 0.1, 0.5])
    estimator, surrogate = GuidedES(sigma=sigma, alpha=0.3), np.array([3.0, 0.0, -0.8])
    theta, keys = named(jnp.zeros(3)), jax.random.split(KEY, 40_000)

    @jax.jit
    def noises(surrogate):
        return jax.vmap(lambda k: as_vector(estimator.noise(k, theta, named(surrogate))))(keys)

    guide = scale * surrogate / np.linalg.norm(scale * surrogate)
    for given, u in [
        (surrogate, guide),
        (1e30 * surrogate, guide),
        (1e-35 * surrogate, guide),
        (np.zeros(3), np.zeros(3)),
        (np.array([1.0, np.nan, 0.0]), np.zeros(3)),
        (np.array([1.0, np.inf, 0.0]), np.zeros(3)),
    ]:
        got = np.asarray(noises(jnp.asarray(given, jnp.float32)), np.float64) / scale
        np.testing.assert_allclose(np.mean(got, axis=0), 0.0, atol=0.02)
        np.testing.assert_allclose(np.cov(got.T), covariance(u, 0.3, 3), atol=0.02)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cliff:
    """A system whose loss has no finite derivative: that of the root of zero is not."""

    system: LinearSystem

    windows = property(lambda self: self.system.windows)
    reset = property(lambda self: self.system.reset)

    def unroll(self, theta, state, key):
        rollout, state = self.system.unroll(theta, state, key)
        nothing = 0.0 * theta[0]
        nothing = jnp.where(nothing == 0, 0.0, jnp.sqrt(nothing))
        return rollout._replace(losses=rollout.losses + nothing), state


def test_a_surrogate_that_is_not_finite_costs_only_the_guidance():
    estimator = GuidedES(Cliff(ONE_WINDOW), particles=20_000)
    estimate, _ = first(estimator)
    expected = 2.0 * 0.5 / 2 * ONE_WINDOW.gradient(truncated=False)
    np.testing.assert_allclose(estimate.grad, expected, atol=0.03 * np.abs(expected).max())


def test_the_mean_with_a_sigma_per_leaf():
    """beta D^-1 C D gradient, D the diagonal of the sigmas."""
    problem = Named(LinearSystem(8, 4, size=3))
    estimator = GuidedES(problem, particles=50_000, sigma={"mlp": 0.1, "": 0.3})
    estimate, _ = first(estimator, named(jnp.zeros(3)))
    scale = np.array([0.1, 0.1, 0.3])
    guide = scale * problem.system.gradient(truncated=True)
    c = covariance(guide / np.linalg.norm(guide), 0.5, 3)
    expected = 2.0 * (c @ (scale * problem.system.gradient(truncated=False))) / scale
    np.testing.assert_allclose(
        as_vector(estimate.grad), expected, atol=0.02 * np.abs(expected).max()
    )


def test_directions():
    np.testing.assert_allclose(direction({"a": jnp.array([3.0, -4.0])})["a"], [0.6, -0.8])
    np.testing.assert_array_equal(direction(jnp.zeros(2)), 0.0)


# --- diagnostics ---


@pytest.mark.parametrize(
    "example", [NRES(sigma=0.1), TruncatedBPTT(), GuidedES()], ids=["nres", "bptt", "guided"]
)
def test_the_diagnostics_are_those_of_the_particles_gradients(example):
    """Each particle's gradient is that of an estimator of it alone."""
    problem = LinearSystem(8, 4, size=2, curvature=1.0, noise=2.0)
    whole = dataclasses.replace(example, problem=problem, particles=5)
    estimate, _ = first(whole)
    estimates = [first(part)[0] for part in partition(whole, 5)]
    grads = np.array([e.grad for e in estimates], np.float64)
    mean, got = grads.mean(axis=0), diagnostics(estimate, 5)
    np.testing.assert_allclose(
        estimate.info["squared_norm"], np.mean(np.sum(grads**2, axis=1)), rtol=1e-3
    )
    variance = np.sum(grads.var(axis=0, ddof=1)) / 5
    np.testing.assert_allclose(got["gradient_snr"], mean @ mean / variance, rtol=1e-2)
    assert got["diverged"] == 0.0
    if isinstance(example, TruncatedBPTT):
        assert "effective_sample_size" not in got
    else:
        squares = np.array([e.info["squared_difference"] for e in estimates], np.float64)
        size = np.sum(squares) ** 2 / np.sum(squares**2)
        assert 1 < size < 5
        np.testing.assert_allclose(got["effective_sample_size"], size, rtol=1e-3)
    alone = diagnostics(estimates[0], 1)
    assert alone["gradient_snr"] is None
    assert alone.get("effective_sample_size", 1.0) == pytest.approx(1.0)


def test_equal_differences_are_worth_all_their_particles():
    moments = {"squared_norm": 3.0, "squared_difference": 0.01, "fourth_difference": 0.0001}
    got = diagnostics(Estimate(jnp.ones(2), jnp.ones(()), moments), 8)
    assert got["effective_sample_size"] == pytest.approx(8)
    assert got["gradient_snr"] == pytest.approx(2 / ((3 - 2) / 7))


def test_what_cannot_be_told_is_none():
    zero = {"squared_norm": 0.0, "squared_difference": 0.0, "fourth_difference": 0.0}
    windows = {"loss_by_window": np.array([0.5, 0.0]), "share_by_window": np.array([0.25, 0.0])}
    info = zero | windows | {"diverged": np.nan, "distance": np.float32(2.0)}
    assert diagnostics(Estimate(np.zeros(2), np.zeros(()), info), 4) == {
        "gradient_snr": None,
        "effective_sample_size": None,
        "loss_by_window": [2.0, None],
        "diverged": None,
        "distance": 2.0,
    }
    assert diagnostics(Estimate(np.zeros(2), np.zeros(()), {}), 4) == {}


def test_gradients_that_all_agree_have_a_large_finite_ratio():
    estimate, _ = first(TruncatedBPTT(ONE_WINDOW, particles=4))
    assert 1e6 < diagnostics(estimate, 4)["gradient_snr"] < math.inf


def test_a_lost_particle_is_told_though_its_gradient_counts_as_zero():
    grads = jnp.array([[3.0, 4.0], [jnp.nan, 1.0]])
    info = {"diverged": jnp.array([0.0, 1.0]), "distance": jnp.array([4.0, jnp.inf])}
    mean = mean_estimate(Estimate(grads, jnp.array([1.0, 2.0]), info))
    np.testing.assert_allclose(mean.grad, [1.5, 2.0])
    assert {name: float(value) for name, value in mean.info.items()} == {
        "diverged": 0.5,
        "distance": 2.0,
        "squared_norm": 12.5,
    }


def test_a_leaf_of_no_elements_has_a_norm_of_zero():
    grads = {"a": jnp.ones((2, 3)), "none": jnp.ones((2, 0))}
    mean = mean_estimate(Estimate(grads, jnp.ones(2), {}))
    assert mean.info["squared_norm"] == 3.0
    assert mean.grad["none"].shape == (0,)
