"""Curves against a plain loop, tuning against a known optimum, the cache, a whole evaluation."""

import dataclasses
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from evaluation import baselines, curve, plots, report, timing
from evaluation.baselines import Baseline
from evaluation.benchmark import DEFAULT, ORACLE, evaluate
from evaluation.cache import cached, content_hash
from evaluation.curve import train_curves
from evaluation.results import load, save
from evaluation.tuning import tune, untuned
from tasks.base import classes, relative_loss, train_step

STEPS, SEEDS = 12, 2
KEY = jax.random.key(5)


@partial(jax.tree_util.register_dataclass, data_fields=["centres", "noise"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Bowl:
    """0.5 |x - centre|^2, the centre being data: gradient descent needs one step of 1."""

    centres: jax.Array
    noise: float = 0.0

    def __call__(self, key):
        del key
        return self

    def init(self, key):
        return {"x": 2.0 + jax.random.normal(key, (3,))}

    def batch(self, key, split):
        offset = {"train": 0.0, "valid": 0.1, "test": 0.2}[split]
        return self.centres[0] + self.noise * (offset + jax.random.normal(key, (3,)))

    def loss(self, params, batch):
        return 0.5 * jnp.sum((params["x"] - batch) ** 2)

    def normalize(self, loss):
        return relative_loss(loss, 6.0)


def plain_sgd(learning_rate, weight_decay):
    del weight_decay
    return optax.sgd(learning_rate)


def sgd_of(hyper):
    return optax.sgd(hyper)


QUIET = Bowl(jnp.zeros((4, 3)))
NOISY = Bowl(jnp.ones((4, 3)), noise=0.3)
SGD = Baseline("plain_sgd", plain_sgd, (0.01, 0.1, 1.0, 3.0), ("constant", "cosine"))


def curves(family, hypers, **options):
    budget = {"steps": STEPS, "seeds": SEEDS, "evals": 4, "key": KEY, **options}
    return train_curves(family, sgd_of, jnp.asarray(hypers), **budget)


def test_train_curves_equals_a_plain_loop():
    got = curves(NOISY, [0.1, 0.5])
    assert got.train.shape == (2, SEEDS, STEPS)
    np.testing.assert_array_equal(got.eval_steps, [3, 6, 9, 12])
    for g, rate in enumerate([0.1, 0.5]):
        for seed in range(SEEDS):
            key = jax.random.fold_in(KEY, seed)
            _, init_key, batch_key, eval_key = jax.random.split(key, 4)
            optimizer, params = optax.sgd(rate), NOISY.init(init_key)
            state, train, valid, test = optimizer.init(params), [], [], []
            for t in range(STEPS):
                batch = NOISY.batch(jax.random.fold_in(batch_key, t), "train")
                params, state, loss = train_step(NOISY, optimizer, params, state, batch)
                train.append(loss)
                if t + 1 in got.eval_steps:
                    for index, (split, losses) in enumerate([("valid", valid), ("test", test)]):
                        keys = jax.random.split(jax.random.fold_in(eval_key, index), 4)
                        batches = [NOISY.batch(k, split) for k in keys]
                        losses.append(np.mean([NOISY.loss(params, b) for b in batches]))
            np.testing.assert_allclose(got.train[g, seed], train, rtol=1e-5)
            np.testing.assert_allclose(got.valid[g, seed], valid, rtol=1e-5)
            np.testing.assert_allclose(got.test[g, seed], test, rtol=1e-5)
            np.testing.assert_allclose(
                got.valid_normalized[g, seed], np.array(valid) / 6, rtol=1e-5
            )


@pytest.mark.parametrize("parallel", [1, 4])
def test_grid_chunks_and_single_runs_agree(parallel):
    rates = [0.1, 0.3, 0.5, 0.7]
    grid = curves(NOISY, rates, parallel=parallel)
    for g in (0, 3):
        np.testing.assert_allclose(grid.train[g], curves(NOISY, [rates[g]]).train[0], rtol=1e-5)


def test_divergence_is_data():
    got = curves(QUIET, [1e30]).pick(0)
    assert np.isfinite(got.train[:, 0]).all()
    assert not np.isfinite(got.train[:, -1]).any()
    np.testing.assert_array_equal(got.valid_normalized[:, -1], 2.0)


def test_family_data_is_an_argument_of_the_program():
    family = Bowl(jnp.zeros((4, 3)), noise=0.3)
    program = curve._program(jax.default_backend(), classes(family), sgd_of)
    first = curves(family, [0.2])
    count = program._cache_size()
    second = curves(Bowl(jnp.ones((4, 3)), noise=0.3), [0.2])
    assert program._cache_size() == count
    assert not np.allclose(first.train, second.train)


@partial(jax.tree_util.register_dataclass, data_fields=["centres", "noise"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Twin(Bowl):
    """A family with the fields of Bowl: jax (0.10) takes their structures for equal."""


def test_families_of_equal_fields_have_programs_of_their_own():
    one, other = Bowl(jnp.zeros((4, 3)), noise=0.3), Twin(jnp.zeros((4, 3)), noise=0.3)
    assert classes(one) == (Bowl, *[()] * len(dataclasses.fields(Bowl))) != classes(other)
    backend = jax.default_backend()
    programs = [curve._program(backend, classes(family), sgd_of) for family in (one, other)]
    assert programs[0] is not programs[1]
    assert classes(dataclasses.replace(one, centres=other)) != classes(one)  # also inside


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match=r"`family` must be a pytree of arrays.*function"):
        curves(lambda key: QUIET, [0.1])
    with pytest.raises(ValueError, match="`evals` must be in"):
        curves(QUIET, [0.1], evals=99)
    with pytest.raises(ValueError, match="`seeds` must be at least 1"):
        curves(QUIET, [0.1], seeds=0)
    with pytest.raises(ValueError, match=r"no 'adm'; there are adam, .*baselines/quick"):
        baselines.find("adm")
    with pytest.raises(ValueError, match="`criterion` must be"):
        tune(SGD, QUIET, steps=4, seeds=1, key=KEY, criterion="best")


def test_schedule_is_constant_or_cosine():
    rates = []

    def record(learning_rate, weight_decay):
        rates.append([float(learning_rate(t)) for t in (0, 5, 10)])
        return optax.identity()

    for cosine in (0.0, 1.0):
        make = baselines.Scheduled(record, steps=10)
        make({"learning_rate": 0.2, "cosine": cosine, "weight_decay": 0.0})
    np.testing.assert_allclose(rates, [[0.2, 0.2, 0.2], [0.2, 0.1, 0.0]], atol=1e-7)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def tuned(cache_dir, **options):
    budget = {"steps": STEPS, "seeds": SEEDS, "evals": 4, "key": KEY, **options}
    return tune(SGD, QUIET, cache_dir=cache_dir, **budget)


def test_tuning_finds_the_learning_rate_that_solves_the_bowl_in_one_step(cache_dir):
    found = tuned(cache_dir)
    assert found.chosen == {"learning_rate": 1.0, "cosine": 0.0, "weight_decay": 0.0}
    assert not found.at_edge
    np.testing.assert_allclose(found.curve.train[:, 1:], 0.0, atol=1e-10)
    # Judged on the seeds that every other optimizer gets, which are not those it was tuned on.
    np.testing.assert_allclose(found.curve.train, curves(QUIET, [1.0]).train[0], atol=1e-10)
    np.testing.assert_allclose(found.scores[4], 0.0, atol=1e-10)
    slow = untuned(found, learning_rate=0.1, cosine=0.0)
    np.testing.assert_allclose(slow.train[:, 1], 0.81 * slow.train[:, 0], rtol=1e-5)
    assert found.grid is not None
    assert (found.curve.envelope <= found.grid.train[4].mean(axis=0) + 1e-6).all()


def test_cache_hit_is_identical_and_a_damaged_file_is_recomputed(tmp_path):
    first = tuned(tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()

    hit = partial(tuned, tmp_path, train=None)  # a hit trains nothing
    jax.tree.map(np.testing.assert_array_equal, hit()._asdict(), first._asdict())
    for criterion in ("final", "train"):  # other choices from the same runs
        assert hit(criterion=criterion).chosen["learning_rate"] == 1.0
    with pytest.raises(TypeError):
        hit(steps=STEPS - 4)  # another budget is no hit

    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :]
    for damaged in (b"", b"not a zip file", whole[:middle], flipped):
        path.write_bytes(damaged)
        again = tuned(tmp_path)
        jax.tree.map(np.testing.assert_array_equal, again._asdict(), first._asdict())
        assert path.read_bytes() != damaged
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("criterion", ["mean", "final", "train"])
def test_what_is_chosen_alone_is_what_the_whole_grid_gives(criterion, tmp_path):
    """Of noisy losses, whose order depends on the seeds."""
    wide = dataclasses.replace(SGD, learning_rates=(0.03, 0.1, 0.3, 1.0, 3.0))
    budget = {"steps": STEPS, "seeds": 3, "evals": 4, "key": KEY, "criterion": criterion}
    budget |= {"cache_dir": tmp_path, "tuning_seeds": 2}
    whole = tune(wide, NOISY, **budget)
    alone = tune(wide, NOISY, whole_grid=False, **budget)
    assert alone.chosen == whole.chosen
    assert alone.at_edge == whole.at_edge
    np.testing.assert_allclose(alone.scores, whole.scores, rtol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, alone.hypers, whole.hypers)
    for name in ("train", "valid", "test", "valid_normalized", "eval_steps"):
        ours, theirs = getattr(alone.curve, name), getattr(whole.curve, name)
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert alone.curve.envelope.shape == (3, STEPS)  # its own, seed by seed
    assert alone.grid is None
    with pytest.raises(ValueError, match="`tuned` holds only what was chosen"):
        untuned(alone, learning_rate=0.1)


def test_pieces_of_a_cheaper_tuning_are_kept_apart(tmp_path):
    trained = []

    def counted(family, make_optimizer, hypers, keys, **budget):
        if len(trained) == limit:
            raise KeyboardInterrupt
        trained.append((len(hypers["learning_rate"]), len(keys)))
        return curve.train_from(family, make_optimizer, hypers, keys, **budget)

    cheap = partial(tuned, tmp_path, whole_grid=False, tuning_seeds=1)
    limit = 1
    with pytest.raises(KeyboardInterrupt):
        cheap(train=counted)
    limit = None
    first = cheap(train=counted)
    assert trained == [(8, 1), (1, SEEDS)]  # the grid once, though it was interrupted
    assert {path.name[:17] for path in tmp_path.iterdir()} == {
        "plain_sgd-tuning-", "plain_sgd-chosen-",
    }  # fmt: skip
    hit = cheap(train=None)
    jax.tree.map(np.testing.assert_array_equal, hit._asdict(), first._asdict())
    cheap(train=counted, seeds=SEEDS + 1)
    assert trained[2:] == [(1, SEEDS + 1)]
    cheap(train=counted, tuning_seeds=2)
    assert trained[3:] == [(8, 2)]  # which chooses the same


def test_the_whole_grid_is_where_it_always_was(tmp_path):
    tuned(tmp_path, tuning_seeds=3)
    key_bytes = np.asarray(jax.random.key_data(KEY)).tobytes()
    name = content_hash(QUIET, SGD, (SEEDS, 3, STEPS, 4, 4), key_bytes)
    assert [path.name for path in tmp_path.iterdir()] == [f"plain_sgd-{name[:32]}.npz"]
    tuned(tmp_path / "nothing", keep=False)
    assert not (tmp_path / "nothing").exists()


def test_cache_key_sees_data_fields_and_not_addresses():
    base = content_hash(QUIET, SGD, 3)
    assert base == content_hash(Bowl(jnp.zeros((4, 3))), dataclasses.replace(SGD), 3)
    others = [
        content_hash(Bowl(jnp.ones((4, 3))), SGD, 3),
        content_hash(Bowl(jnp.zeros((4, 3)), noise=0.1), SGD, 3),
        content_hash(QUIET, dataclasses.replace(SGD, learning_rates=(0.1,)), 3),
        content_hash(QUIET, SGD, 4),
    ]
    assert len({base, *others}) == 5


def test_cache_key_sees_the_body_of_a_baseline_and_the_arrays_it_closes_over():
    def scaled(scale):
        def make(learning_rate, weight_decay):
            del weight_decay
            return optax.chain(optax.stateless(times), optax.sgd(learning_rate))

        # Within jit, where jax's own text of the program shows no more than the shape.
        times = jax.jit(lambda grads, params: {"x": grads["x"] * scale})
        return dataclasses.replace(SGD, make=make)

    one, again, other = (scaled(jnp.array([1.0, 2.0, last])) for last in (3.0, 3.0, 4.0))
    assert repr(one).split(" at ")[0] == repr(other).split(" at ")[0]
    assert content_hash(QUIET, one) == content_hash(QUIET, again)
    assert len({content_hash(QUIET, b) for b in (one, other, scaled(3.0), SGD)}) == 4


def test_a_result_that_cannot_be_stored_leaves_no_file(tmp_path):
    bad = {"a": np.ones(1000), "b": np.array([object()])}
    with pytest.raises(ValueError, match="allow_pickle"):
        cached(tmp_path / "x.npz", ("a", "b"), lambda: bad)
    assert list(tmp_path.iterdir()) == []


MODEL_HASH = """
import haiku as hk, jax.numpy as jnp
from evaluation.baselines import BASELINES
from evaluation.cache import content_hash
from tasks.adapters import from_haiku
from tasks.data import synthetic

def model_hash(width, power):
    model = hk.transform(lambda x: hk.nets.MLP([width, 3])(x.reshape(len(x), -1)))
    loss = lambda out, y: jnp.abs(out) ** power
    return content_hash(from_haiku(model, loss, synthetic()), BASELINES["adam"], 3)
"""


def test_cache_key_sees_functions_and_is_the_same_in_every_process():
    """Functions in static fields have no lasting name: their programs tell them apart."""
    names = {}
    exec(MODEL_HASH, names)
    base = names["model_hash"](4, 2)
    assert base == names["model_hash"](4, 2)
    assert len({base, names["model_hash"](5, 2), names["model_hash"](4, 3)}) == 3
    code = MODEL_HASH + "print(model_hash(4, 2))"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == base


def test_step_seconds_tells_slow_from_fast():
    def burn(_):
        def update(updates, state, params=None):
            wasted = jax.lax.fori_loop(0, 3000, lambda i, x: jnp.sin(x), updates["x"])
            return jax.tree.map(lambda u: u + 0 * wasted, updates), state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

    slow, adam = timing.step_seconds(QUIET, burn, KEY, rounds=3, seconds=0.005)
    assert slow > 3 * adam > 0
    assert len(set(timing.step_seconds(QUIET, timing.reference_adam, KEY, rounds=2))) == 1


def test_state_bytes_by_hand():
    size = partial(curve.state_bytes_per_param, QUIET, hypers=np.zeros(1))
    assert size(lambda _: optax.sgd(0.1)) == 0
    assert size(lambda _: optax.sgd(0.1, momentum=0.9)) == 4
    assert size(lambda _: optax.adam(0.1)) == pytest.approx(8 + 4 / 3)  # and its counter


@pytest.fixture(scope="module")
def results(cache_dir):
    contenders = {
        "my <new> rule": lambda horizon: optax.adam(optax.linear_schedule(0.5, 0.0, horizon)),
        "explodes": lambda horizon: optax.sgd(1e30),
    }
    done = []
    found = evaluate(
        contenders,
        {"bowl": NOISY, "quiet bowl": QUIET},
        steps=STEPS,
        seeds=SEEDS,
        evals=4,
        baselines=["sgd_momentum"],
        cache_dir=cache_dir,
        progress=lambda message, share: done.append(share),
    )
    assert done == sorted(done)
    assert done[-1] == 1.0
    return found


def test_evaluation_rows_and_scores(results):
    assert set(results.rows) == {
        "my <new> rule", "explodes", "adam (tuned)", "sgd_momentum (tuned)", DEFAULT, ORACLE,
    }  # fmt: skip
    summary = results.summary
    assert summary["adam (tuned)"]["mean_train_vs_tuned"] == [1.0, 1.0, 1.0]
    assert summary[DEFAULT]["mean_train_vs_default"] == [1.0, 1.0, 1.0]
    assert (
        summary[DEFAULT]["mean_train_vs_tuned"][0]
        < 1
        < summary["my <new> rule"]["mean_train_vs_default"][0]
    )
    assert summary["explodes"]["divergence_rate"] == [1.0, 1.0, 1.0]
    assert summary["explodes"]["mean_train_vs_tuned"] == [0.0, 0.0, 0.0]
    assert summary[ORACLE]["mean_train_vs_tuned"][0] >= 0.999  # no worse than any in its grid
    assert summary["sgd_momentum (tuned)"]["step_time_vs_adam"][0] > 0
    assert results.rows["adam (tuned)"]["chosen"]["bowl"]["learning_rate"] > 1e-3
    assert summary["adam (tuned)"]["time_to_target_vs_tuned"] == [1.0, 1.0, 1.0]
    assert summary["explodes"]["time_to_target_vs_tuned"] == [0.0, 0.0, 0.0]
    assert summary[ORACLE]["time_to_target_vs_tuned"] is None


def descend(horizon):
    """Steps of 1 down the gradient, which only a multiplier below 2 keeps from diverging."""
    del horizon
    return optax.sgd(1.0)


def test_contenders_and_cosine_baselines_are_tuned_over_the_same_learning_rates(tmp_path):
    rates = (0.03, 0.3, 3.0)
    found = evaluate(
        {"descend": descend}, {"bowl": NOISY}, steps=STEPS, seeds=SEEDS, evals=4, key=KEY,
        baselines=(), learning_rates=rates, cosine_baselines=["sgd", "adamw"], cache_dir=tmp_path,
    )  # fmt: skip
    sgd, adamw = "sgd (0.03, 0.3, 3; cosine)", "adamw (0.03, 0.3, 3; cosine)"
    assert list(found.rows) == ["descend", "adam (tuned)", sgd, adamw, DEFAULT, ORACLE]
    assert [row["kind"] for row in found.rows.values()] == [
        "contender", "tuned", "tuned", "tuned", "default", "oracle",
    ]  # fmt: skip
    # A multiple of plain steps is gradient descent at that learning rate.
    assert found.rows["descend"]["chosen"] == found.rows[sgd]["chosen"] == {
        "bowl": {"learning_rate": 0.3, "cosine": 1.0, "weight_decay": 0.0, "at_edge": False}
    }  # fmt: skip
    for metric in ("mean_train_loss", "held_out_loss"):
        ours, theirs = (found.scores["tuned"][n]["bowl"][metric] for n in ("descend", sgd))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    schedule = optax.cosine_decay_schedule(0.3, STEPS)
    alone = train_curves(
        NOISY,
        lambda _: optax.sgd(schedule),
        np.zeros(1),
        steps=STEPS,
        seeds=SEEDS,
        evals=4,
        key=KEY,
    )
    mean = np.array(found.curves["descend"]["bowl"]["mean"], np.float64)
    np.testing.assert_allclose(mean, alone.train[0].mean(axis=0), rtol=1e-3)
    assert found.rows[adamw]["chosen"]["bowl"]["weight_decay"] == pytest.approx(0.01)
    assert found.about["learning_rates"] == list(rates)
    assert found.about["grids"] == {"adam": 18, sgd: 3, adamw: 3}
    # What is judged has no file: its theta is not part of a name.
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith("descend")]

    report.render(found, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "judged here, learning rate tuned per task" in page
    assert "its updates times a learning rate (0.03, 0.3, 3)" in page
    assert "lr 0.3, cosine" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rates": (0.1, 0.0)}, "`learning_rates` must be positive, .* got 0.1, 0$"),
        ({"learning_rates": (np.inf,)}, "`learning_rates` must be positive, finite"),
        ({"learning_rates": (np.nan,)}, "`learning_rates` must be positive, finite"),
        ({"learning_rates": (0.1, 0.1)}, "`learning_rates` must be .* all different"),
        ({"cosine_baselines": "adamw"}, "`cosine_baselines` needs `learning_rates`"),
        (
            {"cosine_baselines": ("adamm",), "learning_rates": (0.1,)},
            "`cosine_baselines` has no 'adamm'; there are adam",
        ),
        (
            {"cosine_baselines": ("schedule_free_sgd",), "learning_rates": (0.1,)},
            "`cosine_baselines` has schedule_free_sgd, which goes without a schedule",
        ),
    ],
)
def test_learning_rates_that_cannot_be_are_refused_before_any_work(options, message, monkeypatch):
    monkeypatch.setattr("evaluation.benchmark.run", None)
    with pytest.raises(ValueError, match=message):
        evaluate({"descend": descend}, {"bowl": QUIET}, steps=4, seeds=1, evals=2, **options)


def test_results_round_trip_and_refuse_damage(results, tmp_path):
    path = tmp_path / "runs" / "results.json"
    save(results, path)
    assert load(path) == results
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match=r"`path` .* is not a results file"):
        load(path)
    path.write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="schema 99"):
        load(path)


def test_report_is_complete_and_needs_no_network(results, tmp_path):
    path = tmp_path / "report.html"
    records = [{"step": i, "loss": 2.0 / (1 + i)} for i in range(50)]
    report.render(results, path, metrics=[*records, {"step": 50, "loss": None}])
    page = path.read_text()
    for name in ("my &lt;new&gt; rule", "explodes", "adam (tuned)", DEFAULT, ORACLE, "quiet bowl"):
        assert name in page
    assert page.count("<svg") == 3
    scores = results.scores["default"]["my <new> rule"]["quiet bowl"]["mean_train_loss"]
    assert f"{np.mean(scores):.3g}x default Adam" in page  # of two seeds, the mean is the IQM
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    for outside in ("http:", "https:", "src=", "<script", "@import", "//"):
        assert outside not in page
    report.plot_curves(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert report.table(results).row_count == len(results.rows)


def test_a_report_on_many_optimizers_and_tasks_stays_readable(results):
    """Thirty baselines that differ by a factor, on fourteen tasks."""
    adam, sgd = "adam (tuned)", "sgd_momentum (tuned)"
    tasks = {f"task {index}": "bowl" for index in range(14)}
    factors = {f"rule {index}": 1 - index / 40 for index in range(29, -1, -1)}
    kinds = dict.fromkeys(results.rows) | dict.fromkeys(factors, sgd)  # row -> what it copies
    chosen = dict.fromkeys(tasks, results.rows[sgd]["chosen"]["bowl"])
    summary = {name: dict(results.summary[like or name]) for name, like in kinds.items()}
    for name, factor in factors.items():
        summary[name]["mean_train_vs_tuned"] = [3 * factor] * 3

    def on_all(of_rows):
        return {
            name: {task: of_rows[like or name][old] for task, old in tasks.items()}
            for name, like in kinds.items()
        }

    many = dataclasses.replace(
        results,
        about=results.about | {"tasks": list(tasks)},
        rows={n: {**results.rows[like or n], "chosen": chosen} for n, like in kinds.items()},
        scores={reference: on_all(of_rows) for reference, of_rows in results.scores.items()},
        summary=summary,
        curves=on_all(results.curves),
    )
    figure = plots.loss_curves(many)
    panels = [panel for panel in figure.axes if panel.get_visible()]
    assert [panel.get_title(loc="left") for panel in panels] == list(tasks)
    shown = [line.get_label() for line in panels[0].lines]
    # all that is not tuned, Adam, and the best of the others
    best = [f"rule {index}" for index in range(7)]
    assert set(shown) == {"my <new> rule", "explodes", DEFAULT, ORACLE, adam, *best}
    looks = {(line.get_color(), line.get_linestyle()) for line in panels[0].lines}
    assert len(looks) == len(shown)
    ranges = [collection.get_facecolor()[0][:3] for collection in panels[0].collections]
    assert len(ranges) == 3  # of the contenders and Adam
    assert [line.get_label() for line in plots.profile(many).axes[0].lines[:-1]] == shown
    tables = report._per_task(many).split("<table>")[1:]
    assert [table.count("<th>") - 1 for table in tables] == [4, 5, 5]
    assert all(name in table for table in tables for name in factors)


def test_evaluate_refuses_before_any_work(monkeypatch):
    monkeypatch.setattr("evaluation.benchmark.run", None)
    run = partial(evaluate, steps=4, seeds=1, evals=2)
    with pytest.raises(ValueError, match="`contenders` uses names of baselines"):
        run({"adam (tuned)": optax.sgd}, {"bowl": QUIET})
    with pytest.raises(ValueError, match="`suite` must hold at least one"):
        run({}, {})
    with pytest.raises(ValueError, match="`baselines` has no 'adamm'"):
        run({}, {"bowl": QUIET}, baselines=["adamm"])
    with pytest.raises(TypeError, match="`family` must be a pytree"):
        run({}, {"bowl": lambda key: QUIET})
