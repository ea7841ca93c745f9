"""Which theta a run exports, from where it starts, and what its card says: snapshots judged by
hand, resumed runs bit-equal, two phases, and scores written into cards.
"""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import scipy.stats
from commands import run

import learned_opt
from cluster import console, jobs, run_directory, selection
from evaluation import metrics
from evaluation.baselines import BASELINES
from evaluation.cache import default_directory
from evaluation.curve import train_curves
from evaluation.results import Results
from evaluation.results import save as save_results
from evaluation.tuning import tune
from learned_opt.hyperparams import Hyperparams
from meta_train.estimators.compiled import compiled
from meta_train.outer_loop import meta_train, start
from meta_train.recipes import base
from meta_train.recipes.base import Recipe
from tasks.quadratic import Quadratic

PLAIN = Recipe(
    rule="hyperparams(knots=2)",
    task="quadratic(dimension=2)",
    estimator="pes(particles=2)",
    horizon=(4, 8),
    truncation=2,
    outer_steps=6,
    learning_rate=3.0,  # overshoots, so that the last theta is not the best
)
RECIPE = dataclasses.replace(
    PLAIN, select_on="quadratic(dimension=3)", select_steps=12, select_seeds=2, select_among=3
)
STEPS = (2, 4, 6)


def options(recipe):
    """The recipe as a command line."""
    changed = {n: x for n, x in vars(recipe).items() if x != getattr(Recipe(), n)}
    return [
        text
        for name, x in changed.items()
        for text in (f"--{name.replace('_', '-')}", *map(str, x if isinstance(x, tuple) else [x]))
    ]


def theta_in(path):
    return learned_opt.read(path)[1]["log_learning_rate"]


def theta_of(directory):
    return theta_in(directory / "theta.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("selection") / "whole"
    run("meta-train", "--run-dir", directory, *options(RECIPE))
    return directory


def test_the_best_snapshot_is_exported(finished, capsys, monkeypatch):
    """Every snapshot trained alone, scores by scipy's trimmed mean."""
    family, steps, seeds, key = Quadratic(dimension=3), 12, 2, jax.random.key(0)
    assert sorted(path.stem for path in (finished / "thetas").iterdir()) == list(map(str, STEPS))
    adam = tune(BASELINES["adam"], family, steps=steps, seeds=seeds, key=key, evals=12).curve
    by_hand = []
    for step in STEPS:
        theta = learned_opt.read(finished / "thetas" / f"{step}.safetensors")[1]
        optimizer = Hyperparams(knots=2).optimizer(theta, steps)
        curve = train_curves(
            family, lambda _, o=optimizer: o, np.zeros(1), steps=steps, seeds=seeds, key=key,
            evals=12,
        ).pick(0)  # fmt: skip
        names = ("speedup", "mean_train_loss", "final_train_loss", "held_out_loss", "survival")
        scores = {name: metrics.METRICS[name](curve, adam) for name in names}
        entry = {name: scipy.stats.trim_mean(x, 0.25) for name, x in scores.items()}
        entry["survival"] = scores["survival"].mean()
        product = entry["speedup"] * entry["mean_train_loss"] * entry["held_out_loss"]
        by_hand.append({**entry, "score": np.cbrt(product)})
    best = int(np.argmax([entry["score"] for entry in by_hand]))
    assert STEPS[best] != 6, "the test needs a run whose last theta is not the best"

    np.testing.assert_array_equal(
        theta_of(finished), theta_in(finished / "thetas" / f"{STEPS[best]}.safetensors")
    )
    found = json.loads((finished / "selection.json").read_text())
    _, _, card = learned_opt.read(finished / "theta.safetensors")
    assert [snapshot["outer_step"] for snapshot in found["snapshots"]] == list(STEPS)
    for snapshot, entry in zip(found["snapshots"], by_hand, strict=True):
        assert snapshot["score"] == pytest.approx(entry.pop("score"), rel=1e-4)
        for name, value in entry.items():
            estimate, low, high = snapshot[name]
            assert estimate == pytest.approx(value, rel=1e-4)
            assert low <= estimate <= high
            (runs,) = snapshot["runs"].values()
            assert len(runs[name]) == seeds
    chosen = found["snapshots"][best]
    assert card["meta_validation"] == {
        **{"suite": RECIPE.select_on, "steps": steps, "seeds": seeds},
        **{name: value for name, value in chosen.items() if name != "runs"},
    }
    assert found["outer_step"] == STEPS[best]
    assert card["outer_steps"] == 6
    assert card["workers"] == 0

    monkeypatch.setattr(console.console, "width", 100)
    out = run("show", finished / "theta.safetensors", capsys=capsys).out
    assert (
        f"meta-validation on quadratic(dimension=3), 12 steps, 2 seeds: theta after outer step "
        f"{STEPS[best]}, score {chosen['score']:.3f}"
    ) in out
    assert f"{chosen['speedup'][0]:.3g}" in next(
        line for line in out.splitlines() if line.strip().startswith("speedup")
    )
    assert '"meta_validation"' not in out


def test_the_last_theta_is_that_of_a_run_without_selection(finished, tmp_path):
    """Snapshots change nothing, and without a suite there are none."""
    jobs.run(PLAIN, tmp_path / "plain")
    assert not (tmp_path / "plain" / "thetas").exists()
    _, _, card = learned_opt.read(tmp_path / "plain" / "theta.safetensors")
    assert "meta_validation" not in card
    np.testing.assert_array_equal(
        theta_of(tmp_path / "plain"), theta_in(finished / "thetas" / "6.safetensors")
    )


def test_adam_is_tuned_once_for_selection_and_evaluation(finished, tmp_path):
    def tuned():
        return {path for path in default_directory().glob("adam-*") if "seconds" not in path.name}

    before = tuned()
    run(
        *("evaluate", "--optimizer", "adam", "--baselines", "adam", "--out-dir", tmp_path),
        *("--suite", RECIPE.select_on, "--steps", 12, "--seeds", 2),
    )
    assert before
    assert tuned() == before


def interrupt_at(monkeypatch, step):
    """A run is stopped when it logs this step, or not any more (None)."""
    write = vars(run_directory.MetricsLog)["write"]

    def interrupted(self, **values):
        if values["step"] == step:
            raise KeyboardInterrupt
        write(self, **values)

    monkeypatch.setattr(run_directory.MetricsLog, "write", interrupted)


def test_resumed_runs_end_bit_equal(finished, tmp_path, monkeypatch, capsys):
    directory = tmp_path / "broken"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        command = ["meta-train", "--run-dir", directory, *options(RECIPE)]
        run(*command, "--checkpoint-every", 3, code=130)
    # as if it had been killed: no checkpoint but that after step 3, a snapshot that is later
    shutil.rmtree(directory / "checkpoints" / "4")
    later = directory / "thetas" / "4.safetensors"
    assert later.exists()
    later.write_text("damaged")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(selection, "tune", interrupted)
        run("meta-train", "--run-dir", directory, "--resume", code=130)
    assert not (directory / "theta.safetensors").exists()
    metrics_before = (directory / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    out = run("meta-train", "--run-dir", directory, "--resume", capsys=capsys).out
    assert "resuming at outer step 6" in out
    assert (directory / "metrics.jsonl").read_bytes() == metrics_before
    np.testing.assert_array_equal(theta_of(directory), theta_of(finished))
    for step in STEPS:
        name = f"thetas/{step}.safetensors"
        np.testing.assert_array_equal(theta_in(directory / name), theta_in(finished / name))
    assert (directory / "selection.json").read_bytes() == (finished / "selection.json").read_bytes()
    assert "is finished" in run("meta-train", "--run-dir", directory, "--resume", capsys=capsys).out


FIRST = dataclasses.replace(PLAIN, learning_rate=0.1, outer_steps=4, seed=1)
SECOND = dataclasses.replace(PLAIN, learning_rate=0.1, start="pretraining")


@pytest.fixture
def recipes(monkeypatch):
    """Recipes by name, in place of those that there are."""
    found = {"pretraining": FIRST}
    monkeypatch.setattr(base, "known", lambda: found)
    return found


def by_hand(recipe, theta=None):
    rule, optimizer = recipe.build_rule(), recipe.build_optimizer()
    estimator = compiled(recipe.build_estimator())
    state = start(rule, estimator, optimizer, recipe.seed, theta)
    return meta_train(estimator, optimizer, state, recipe.outer_steps).theta


def test_the_second_phase_starts_where_the_first_one_ends(tmp_path, recipes, monkeypatch, capsys):
    directory = tmp_path / "run"
    command = ["meta-train", "--run-dir", directory]
    for flags, step in (([*options(SECOND)], 2), (["--resume"], 4)):  # in the first, in the second
        with monkeypatch.context() as patch:
            interrupt_at(patch, step)
            run(*command, *flags, "--checkpoint-every", 1, code=130)
        assert (directory / "first" / "theta.safetensors").exists() == (step == 4)
    assert len(run_directory.read_metrics(directory)) == 4
    done = (directory / "first" / "metrics.jsonl").read_bytes()
    recipes["pretraining"] = dataclasses.replace(FIRST, outer_steps=9)  # the run has its own
    run(*command, "--resume")
    assert (directory / "first" / "metrics.jsonl").read_bytes() == done

    first = by_hand(FIRST)
    np.testing.assert_array_equal(theta_of(directory / "first"), first["log_learning_rate"])
    np.testing.assert_array_equal(theta_of(directory), by_hand(SECOND, first)["log_learning_rate"])
    _, _, card = learned_opt.read(directory / "theta.safetensors")
    _, _, earlier = learned_opt.read(directory / "first" / "theta.safetensors")
    assert card["inner_steps"] == (4 + 6) * 2 * 2 * 2
    own = run_directory.read_metrics(directory)[-1]["seconds"]
    assert card["seconds"] == pytest.approx(own + earlier["seconds"])
    assert card["first"]["recipe"]["seed"] == 1
    assert card["first"]["inner_steps"] == 4 * 2 * 2 * 2


def test_an_artifact_is_a_start_too(tmp_path):
    theta = {"log_learning_rate": np.array([-1.0, -2.0], np.float32)}
    learned_opt.save(tmp_path / "a.safetensors", Hyperparams(knots=2), theta, {})
    recipe = dataclasses.replace(SECOND, start=str(tmp_path / "a.safetensors"))
    jobs.run(recipe, tmp_path / "run")
    expected = by_hand(recipe, theta)["log_learning_rate"]
    np.testing.assert_array_equal(theta_of(tmp_path / "run"), expected)
    assert "first" not in learned_opt.read(tmp_path / "run" / "theta.safetensors")[2]


def test_the_artifact_states_the_exported_rule(finished, tmp_path):
    """Meta-trained and judged as it was, and it goes on from an artifact that states it."""
    recipe = dataclasses.replace(RECIPE, exported_rule="hyperparams(knots=2, b1=0.5)")
    path = jobs.run(recipe, tmp_path / "run")
    assert learned_opt.read(path)[0] == Hyperparams(knots=2, b1=0.5)
    snapshot = tmp_path / "run" / "thetas" / "2.safetensors"
    assert learned_opt.read(snapshot)[0] == Hyperparams(knots=2)
    np.testing.assert_array_equal(theta_of(tmp_path / "run"), theta_of(finished))
    latest = tmp_path / "latest.safetensors"
    run("export", "--run-dir", tmp_path / "run", "--out", latest)
    assert learned_opt.read(latest)[0] == Hyperparams(knots=2, b1=0.5)
    dataclasses.replace(recipe, start=str(path)).check()
    with pytest.raises(ValueError, match=r"`start` .* must have the rule .*b1=0.9.* got .*b1=0.5"):
        dataclasses.replace(PLAIN, start=str(path)).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select_on": "metaval/smal"}, "`select_on`: unknown suite or task 'metaval/smal'"),
        ({"select_steps": 0}, "`select_steps` must be at least 1, got 0"),
        ({"select_seeds": 0}, "`select_seeds` must be at least 1, got 0"),
        ({"select_among": 0}, "`select_among` must be at least 1, got 0"),
        ({"select_among": 7}, "`select_among` must be at most `outer_steps` 6, got 7"),
        ({"exported_rule": "hyperparam"}, "unknown exported_rule 'hyperparam'; did you mean"),
        (
            {"exported_rule": "hyperparams(knots=3)"},
            "`exported_rule`: theta of hyperparams(knots=2) does not fit the rule "
            "hyperparams(knots=3, ",
        ),
        ({"start": "mulo_smal"}, "`start`: no artifact 'mulo_smal'"),
        ({"start": "mulo_smal"}, "Or a recipe: a, b, other"),
        ({"start": "small_fc-digits"}, "`start` small_fc-digits must have the rule hyperparams("),
        ({"start": "other"}, "`start` other must have the rule hyperparams(knots=2"),
        ({"start": "a"}, "`start` leads back: a -> b -> a"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(changes, message, recipes, tmp_path, capsys):
    recipes.clear()
    recipes["a"] = dataclasses.replace(PLAIN, start="b")
    recipes["b"] = dataclasses.replace(PLAIN, start="a")
    recipes["other"] = dataclasses.replace(PLAIN, rule="hyperparams(knots=5)")
    given = [
        text for name, x in changes.items() for text in (f"--{name.replace('_', '-')}", str(x))
    ]
    directory = tmp_path / "run"
    command = ["meta-train", "--run-dir", directory, *options(RECIPE), *given]
    err = run(*command, code=2, capsys=capsys).err
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not directory.exists()


COLUMN = {"speedup_vs_tuned": [1.25, 1.0, 1.5], "mean_train_vs_tuned": None}


def results(path, about, row="mine"):
    columns = {row: COLUMN, "adam (tuned)": {"speedup_vs_tuned": [1.0, 1.0, 1.0]}}
    save_results(Results(about=about, rows={}, scores={}, summary=columns, curves={}), path)
    return path


def test_card_writes_scores_and_failures(tmp_path, capsys, monkeypatch):
    rule, theta = Hyperparams(knots=2), {"log_learning_rate": np.array([0.1, -7.3], np.float32)}
    source = tmp_path / "mine" / "theta.safetensors"
    learned_opt.save(source, rule, theta, {"licence": "MIT"})
    about = {"tasks": ["x", "y"], "steps": 2000, "seeds": 5}
    small = results(tmp_path / "a.json", {**about, "suite": "heldout/small"})
    rated = {**about, "suite": "heldout/small", "learning_rates": [0.1, 1.0]}
    tuned, old = results(tmp_path / "b.json", rated), results(tmp_path / "c.json", about)
    failures = ["Diverges on [bold] tasks.", "Slow."]
    flags = [text for failure in failures for text in ("--failure", failure)]
    out = tmp_path / "shipped" / "universal.safetensors"
    run("card", source, "--results", small, tuned, old, *flags, "--out", out)

    scores = {"speedup_vs_tuned": [1.25, 1.0, 1.5]}
    stated, kept, card = learned_opt.read(out)
    assert stated == rule
    np.testing.assert_array_equal(kept["log_learning_rate"], theta["log_learning_rate"])
    key = "heldout/small, 2000 steps, 5 seeds"
    assert card == {
        "licence": "MIT",
        "scores": {
            key: scores,
            f"{key}, learning rate of 0.1, 1": scores,
            "2 tasks, 2000 steps, 5 seeds": scores,
        },
        "known_failures": failures,
    }
    assert learned_opt.read(source)[2] == {"licence": "MIT"}

    run("card", source, "--results", small)  # in its place; no failures are given
    run("card", source, "--failure", "Slow.")
    card = {"licence": "MIT", "scores": {key: scores}, "known_failures": ["Slow."]}
    assert learned_opt.read(source)[2] == card
    assert [path.name for path in source.parent.iterdir()] == [source.name]

    monkeypatch.setattr(console.console, "width", 80)
    capsys.readouterr()
    shown = [line.strip() for line in run("show", out, capsys=capsys).out.splitlines()]
    assert f"scores on {key}" in shown
    assert shown[shown.index(f"scores on {key}") + 1].split(maxsplit=2) == [
        *("speedup_vs_tuned", "1.25", "[1, 1.5]")
    ]
    assert shown[-3:] == ["known failures", "- Diverges on [bold] tasks.", "- Slow."]
    assert '"licence": "MIT"' in shown
    # a card of another form is shown as it is
    learned_opt.save(source, rule, theta, {"scores": "good", "known_failures": "few"})
    shown = run("show", source, capsys=capsys).out
    assert '"scores": "good"' in shown
    assert '"known_failures": "few"' in shown


def test_card_refuses_bad_input(tmp_path, capsys):
    source = tmp_path / "mine.safetensors"
    theta = {"log_learning_rate": np.zeros(2, np.float32)}
    learned_opt.save(source, Hyperparams(knots=2), theta, {})
    about = {"tasks": ["x"], "steps": 10, "seeds": 2}
    good = results(tmp_path / "good.json", about)
    other = results(tmp_path / "other.json", about, row="theirs")
    (tmp_path / "bad.json").write_text("{")
    before = source.read_bytes()
    for arguments, message in (
        ([source], "`results`, `failure`, `other_seeds` or `out` must be given"),
        ([tmp_path / "no", "--failure", "x"], "no artifact"),
        ([source, "--results", tmp_path / "none.json"], "none.json cannot be read"),
        ([source, "--results", tmp_path / "bad.json"], "bad.json cannot be read"),
        (
            [source, "--results", other],
            "other.json has no row 'mine', which is what this artifact is called in evaluations. "
            "It has: theirs, adam (tuned)",
        ),
        (
            [source, "--results", good, good],
            "good.json is a second one of x, 10 steps, 2 seeds: give one of them",
        ),
        ([source, "--results", good, "--out", tmp_path], "`out`"),
    ):
        err = run("card", *arguments, code=2, capsys=capsys).err
        assert message in err
        assert len(err.strip().splitlines()) == 1
    assert source.read_bytes() == before


def test_card_tells_how_the_score_varies_with_the_seed(tmp_path, capsys):
    """For two scores the interval is mean +- t_1(0.975) |difference| / sqrt(2) sqrt(3 / 2)."""
    rule, recipe = Hyperparams(), {"rule": "hyperparams", "seed": 0}

    def artifact(seed, score, **changed):
        path = tmp_path / f"{seed}-{score}.safetensors"
        card = {"recipe": {**recipe, "seed": seed, **changed}, "meta_validation": {"score": score}}
        learned_opt.save(path, rule, rule.init(jax.random.key(0)), card)
        return path

    source = artifact(0, 1.5)
    run("card", source, "--other-seeds", artifact(1, 1.4))
    found = learned_opt.read(source)[2]["meta_validation"]
    assert found["score_by_seed"] == {"0": 1.5, "1": 1.4}
    width = np.tan(np.pi * 0.475) * 0.1 / np.sqrt(2.0) * np.sqrt(1.5)
    expected = [1.45, 1.45 - width, 1.45 + width]
    np.testing.assert_allclose(found["score_of_another_seed"], expected, rtol=1e-3)
    for other, message in (
        (artifact(0, 1.3), "a second one of seed 0"),
        (artifact(2, 1.3, rule="celo"), "not of the same recipe"),
    ):
        err = run("card", source, "--other-seeds", other, code=2, capsys=capsys).err
        assert message in err
