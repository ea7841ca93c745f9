"""Every optimizer of optax is tuned or excluded, and takes in a grid the steps it takes alone."""

import dataclasses
import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from evaluation import baselines, benchmark
from evaluation.baselines import BASELINES, EXCLUDED, Baseline, Scheduled
from evaluation.curve import Curve, envelope, eval_steps, train_curves
from evaluation.lines import Job, longest_first
from evaluation.task_cost import TaskCost
from tasks.base import relative_loss, train_step

STEPS = 6
KEY = jax.random.key(3)


@partial(jax.tree_util.register_dataclass, data_fields=["x"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Regression:
    """A linear model on noisy targets; every batch has noise of its own."""

    x: jax.Array

    def __call__(self, key):
        del key
        return self

    def init(self, key):
        return {"b": jnp.array([0.3, -0.2]), "w": 0.5 * jax.random.normal(key, (3, 2))}

    def batch(self, key, split):
        offset = {"train": 0.0, "valid": 0.1, "test": 0.2}[split]
        return self.x @ jnp.arange(1.0, 7.0).reshape(3, 2) + jax.random.normal(key, (8, 2)) + offset

    def loss(self, params, batch):
        return 0.5 * jnp.mean((self.x @ params["w"] + params["b"][None] - batch) ** 2)

    def normalize(self, loss):
        return relative_loss(loss, 10.0)


FAMILY = Regression(jax.random.normal(jax.random.key(1), (8, 3)))


# How the optimizers are called whose optax function is not simply given a schedule and a decay.
def double_speed(schedule):
    return lambda count: schedule(2 * count)


def without_value(optimizer):
    return optax.GradientTransformation(*optimizer)


def relative_to(rate, schedule):
    return lambda count: schedule(count) / rate


SPECIAL = {
    "cocob": lambda rate, s, wd: contrib.cocob(relative_to(rate, s), alpha=100 / rate),
    "mechanize": lambda rate, s, wd: contrib.mechanize(optax.adam(s), weight_decay=wd),
    "noisy_sgd": lambda rate, s, wd: optax.noisy_sgd(s, key=0),
    "polyak_sgd": lambda rate, s, wd: optax.polyak_sgd(rate, relative_to(rate, s)),
    "rmsprop_momentum": lambda rate, s, wd: optax.rmsprop(s, momentum=0.9),
    "rprop": lambda rate, s, wd: optax.chain(
        optax.rprop(rate), optax.scale_by_schedule(relative_to(rate, s))
    ),
    "sam": lambda rate, s, wd: without_value(
        contrib.sam(
            optax.sgd(double_speed(s), momentum=0.9),
            optax.chain(contrib.normalize(), optax.sgd(0.05)),
        )
    ),
    "sgd_momentum": lambda rate, s, wd: optax.sgd(s, momentum=0.9),
    "sgd_nesterov": lambda rate, s, wd: optax.sgd(s, momentum=0.9, nesterov=True),
    "sm3": lambda rate, s, wd: optax.chain(
        optax.sm3(-1.0), optax.scale_by_schedule(lambda count: -s(count))
    ),
}
QUICK = ("adamw", "cocob", "polyak_sgd", "schedule_free_adamw")


def alone(baseline, rate, schedule, decay):
    """The optimizer as one would write it, with Python numbers."""
    if baseline.name in SPECIAL:
        return SPECIAL[baseline.name](rate, schedule, decay)
    function = getattr(optax, baseline.name, None) or getattr(contrib, baseline.name)
    decays = "weight_decay" in inspect.signature(function).parameters
    return function(schedule, **({"weight_decay": decay} if decays else {}))


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in BASELINES],
)
def test_a_grid_program_takes_the_steps_of_the_optimizer_alone(name):
    baseline = BASELINES[name]
    hypers = baseline.grid()
    make = Scheduled(baseline.make, STEPS, baseline.evaluated)
    grid = train_curves(FAMILY, make, hypers, steps=STEPS, seeds=1, evals=3, key=KEY)

    # a middling learning rate with the most that the grid has of schedule and weight decay
    rate = baseline.learning_rates[len(baseline.learning_rates) // 2]
    index = int(
        np.flatnonzero(
            (hypers["learning_rate"] == np.float32(rate))
            & (hypers["cosine"] == max(hypers["cosine"]))
            & (hypers["weight_decay"] == max(hypers["weight_decay"]))
        )[0]
    )
    cosine = baseline.schedules[-1] == "cosine"
    schedule = optax.cosine_decay_schedule(rate, STEPS) if cosine else lambda count: rate
    optimizer = alone(baseline, rate, schedule, baseline.weight_decays[-1])
    evaluated = baseline.evaluated or (lambda state, params: params)

    _, init_key, batch_key, eval_key = jax.random.split(jax.random.fold_in(KEY, 0), 4)
    valid_keys = jax.random.split(jax.random.fold_in(eval_key, 0), 4)
    valid_batches = [FAMILY.batch(k, "valid") for k in valid_keys]
    params = FAMILY.init(init_key)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, batch):
        params, state, loss = train_step(FAMILY, optimizer, params, state, batch)
        return params, state, loss, evaluated(state, params)

    train, valid = [], []
    for t in range(STEPS):
        batch = FAMILY.batch(jax.random.fold_in(batch_key, t), "train")
        params, state, loss, judged = step(params, state, batch)
        train.append(loss)
        if t + 1 in eval_steps(STEPS, 3):
            valid.append(np.mean([FAMILY.loss(judged, b) for b in valid_batches]))
    # float32, whose rounding a few steps amplify a little
    np.testing.assert_allclose(grid.train[index, 0], train, rtol=1e-4)
    np.testing.assert_allclose(grid.valid[index, 0], valid, rtol=1e-4)
    assert np.ptp(grid.train[:, 0, -1]) > 0  # the hyperparameters do something


def optimizers_of(module):
    """Public functions that take a learning rate or an optimizer, beside parts of optimizers."""
    found = set()
    for name, function in inspect.getmembers(module):
        callable_here = inspect.isfunction(function) or isinstance(function, partial)
        if name.startswith(("_", "scale_by_")) or not callable_here:
            continue
        parameters = inspect.signature(function).parameters
        if any("learning_rate" in p or p.endswith("optimizer") for p in parameters):
            found.add(name)
    return found


def test_every_optimizer_of_optax_is_a_baseline_or_excluded_for_a_reason():
    exist = optimizers_of(optax) | optimizers_of(contrib)
    assert len(exist) > 45
    assert exist - set(BASELINES) == set(EXCLUDED), "tune what is new, or say why not"
    assert all(EXCLUDED.values())
    variants = set(BASELINES) - exist
    assert variants == {"sgd_momentum", "sgd_nesterov", "rmsprop_momentum"}


def test_grids_are_wide_and_fine():
    assert [b.name for b in baselines.find("baselines/full")] == list(BASELINES)
    for baseline in BASELINES.values():
        assert len(baseline.learning_rates) >= 9
        steps = np.diff(np.log10(baseline.learning_rates))
        np.testing.assert_allclose(steps, 0.5, atol=2e-3)  # half decades
        constant_only = baseline.name.startswith("schedule_free")
        assert baseline.schedules == (("constant",) if constant_only else ("constant", "cosine"))
    assert len(BASELINES["adamw"].weight_decays) >= 2
    hyper = BASELINES["lion"].grid()
    assert len({tuple(entry) for entry in np.stack(list(hyper.values()), axis=1)}) == 40


def test_equal_baselines_share_a_program():
    assert BASELINES["adam"].make == BASELINES["adamw"].make
    assert BASELINES["adamw"].make != BASELINES["nadamw"].make
    makes = {baseline.make for baseline in BASELINES.values()}
    assert len(makes) == len(BASELINES) - 3  # adam, adamax and nadam with and without decay


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_schedule_free_is_evaluated_at_the_average_of_the_published_recursion(decay):
    """arXiv:2405.15682, with b1 0.9: y = (1 - b1) z + b1 x, z -= rate * (grad(y) + decay * y), and
    at a constant rate x is the plain average of all z.
    """
    centre, rate = jnp.array([1.0, -2.0]), 0.3
    optimizer = BASELINES["schedule_free_sgd"].make(lambda count: rate, decay)
    # within a chain, as behind a task that alters its gradients
    optimizer = optax.chain(optax.identity(), optimizer)
    y = jnp.array([3.0, 1.0])
    state = optimizer.init(y)
    update = jax.jit(optimizer.update)
    z = x = reference_y = np.asarray(y, np.float64)
    for t in range(8):
        updates, state = update(y - centre, state, y)
        y = optax.apply_updates(y, updates)
        z = z - rate * (reference_y - np.asarray(centre) + decay * reference_y)
        x = (1 - 1 / (t + 1)) * x + z / (t + 1)
        reference_y = 0.1 * z + 0.9 * x
        np.testing.assert_allclose(y, reference_y, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            BASELINES["schedule_free_sgd"].evaluated(state, y), x, rtol=1e-5, atol=1e-5
        )
        assert t == 0 or not np.allclose(x, reference_y, atol=1e-3)


def test_sam_is_evaluated_where_it_stands_and_not_where_it_climbs():
    baseline = BASELINES["sam"]
    optimizer = baseline.make(lambda count: 0.1, 0.0)
    params = jnp.array([3.0, 4.0])
    state = optimizer.init(params)
    stood = params
    for t in range(4):
        updates, state = optimizer.update(params, state, params)  # the gradient of half |x|^2
        params = optax.apply_updates(params, updates)
        judged = baseline.evaluated(state, params)
        if t % 2 == 0:
            np.testing.assert_allclose(judged, stood, rtol=1e-6)
            np.testing.assert_allclose(params, stood * (1 + 0.05 / jnp.linalg.norm(stood)))
        else:
            np.testing.assert_allclose(judged, params, rtol=1e-6)
            assert (judged < stood).all()
            stood = params


LADDER = (1e-3, 0.1, 1.0)


def ladder(family, make_optimizer, hypers, keys, *, steps, evals, eval_batches):
    """In place of training: a loss of learning rate + 1 / t, and 1 more with weight decay."""
    del family, make_optimizer, eval_batches
    level = hypers["learning_rate"] + 1.0 * (hypers["weight_decay"] > 0)
    train = level[:, None, None] + 1 / np.arange(1.0, steps + 1)[None, None, :]
    train = np.repeat(train, len(keys), axis=1)
    held_out = train[:, :, eval_steps(steps, evals) - 1]
    return Curve(
        train, held_out, held_out, held_out, eval_steps(steps, evals), envelope(train),
        np.float32(np.nan), np.float32(np.nan), np.float32(8.0),
    )  # fmt: skip


@pytest.fixture
def untimed(monkeypatch):
    monkeypatch.setattr("evaluation.tuning.compile_steps", lambda *_: None)
    monkeypatch.setattr("evaluation.tuning.step_seconds", lambda *_: (2e-4, 1e-4))


def evaluate(cache_dir, train, names=("sgd_momentum", "sign_sgd"), **options):
    return benchmark.evaluate(
        {}, {"one": FAMILY, "two": dataclasses.replace(FAMILY, x=2 * FAMILY.x)}, steps=20, seeds=2,
        evals=4, baselines=names, cache_dir=cache_dir, workers=1, train=train, **options,
    )  # fmt: skip


def test_an_interrupted_evaluation_goes_on_where_it_was(tmp_path, untimed):
    trained = []

    def counted(limit):
        def train(family, make_optimizer, *arguments, **budget):
            if len(trained) == limit:
                raise KeyboardInterrupt
            hypers, keys = arguments
            size = (len(hypers["learning_rate"]), len(keys))
            trained.append((float(family.x[0, 0]), make_optimizer, size))
            return ladder(family, make_optimizer, hypers, keys, **budget)

        return train

    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path / "ended", counted(4))
    shares = []
    resumed = evaluate(
        tmp_path / "ended", counted(None), progress=lambda what, share: shares.append(share)
    )
    # nothing twice: of 2 tasks Adam in one piece and two more in two
    assert len(trained) == len(set(trained)) == 10
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    undisturbed = evaluate(tmp_path / "whole", ladder)
    assert resumed.scores == undisturbed.scores
    assert resumed.rows == undisturbed.rows
    from_cache = evaluate(tmp_path / "whole", None)  # trains nothing
    assert from_cache.scores == undisturbed.scores


def test_what_takes_longest_goes_first(monkeypatch):
    """Of a task that was never measured, the typical cost is taken."""
    costs = {"cheap": TaskCost(9, 1.0, 1e-3, 1e-4), "dear": TaskCost(9, 1.0, 1e-2, 1e-3)}
    monkeypatch.setattr("evaluation.lines.known", costs.get)
    runs = {"cheap": (50, 60), "dear": (10, 20), "new": (15,)}
    work = [[Job(task, f"{n}", n, dict)] for task, several in runs.items() for n in several]
    pair = [Job("cheap", "a", 30, dict), Job("cheap", "b", 270, dict)]
    suite = {task: task for task in runs}
    ordered = longest_first([*work, pair], suite)
    # in ms: 5 and 6, 10 and 20, 15 times 0.55, and 30 of the pair
    assert [line[0].name for line in ordered] == ["a", "20", "10", "15", "60", "50"]


def test_the_envelope_and_the_choice_are_over_weight_decays_too(tmp_path, untimed):
    """In the ladder the least rate without decay is best, at every step: the envelope is its."""
    decays = Baseline("adam", baselines.ADAM, LADDER, ("constant",), weight_decays=(0.1, 0.0))
    tuned = benchmark.tune(
        decays, FAMILY, steps=20, seeds=2, key=KEY, evals=4, cache_dir=tmp_path, train=ladder
    )
    assert tuned.chosen == {"learning_rate": 1e-3, "cosine": 0.0, "weight_decay": 0.0}
    assert tuned.at_edge
    best = 1e-3 + 1 / np.arange(1.0, 21)
    np.testing.assert_allclose(tuned.curve.train, np.stack([best, best]), rtol=1e-6)
    # a curve of 20 steps is not smoothed
    np.testing.assert_allclose(tuned.curve.envelope, best[None], rtol=1e-6)
    assert tuned.grid is not None
    assert not np.shares_memory(tuned.curve.train, tuned.grid.train)  # the grid can go
