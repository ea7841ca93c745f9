"""Relative suboptimality against closed forms and an independent solver, its summaries on curves
made by hand, and the command that judges optimizers by it.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import learned_opt
from cluster import cli, convex, run_directory
from evaluation import proximal, suboptimality, suboptimality_report
from evaluation.suboptimality import Interval, Summary
from learned_opt.structured import StructuredLSTM
from tasks.convex import Lasso, LogisticL1, lasso
from tasks.optimum import optimum
from tasks.quadratic import Quadratic
from tasks.suites import suite

TINY = Lasso(8, 12, noise=0.1, rho=0.02)
RESTARTED = proximal.fista(restart=True)


@pytest.fixture(scope="module")
def problems():
    return suboptimality.instances(TINY, 5, seed=7)


def test_instances_are_float32_draws_in_float64_and_solved(problems):
    task = jax.jit(TINY)(jax.random.fold_in(jax.random.key(7), 3))
    for stacked, drawn in zip(jax.tree.leaves(problems.tasks), jax.tree.leaves(task), strict=True):
        assert stacked.dtype == np.float64
        np.testing.assert_array_equal(stacked, stacked.astype(np.float32))
        np.testing.assert_allclose(stacked[3], drawn, rtol=1e-5)
    one = jax.tree.map(lambda leaf: leaf[3], problems.tasks)
    assert problems.optima[3] == optimum(one).value
    other = jax.tree.leaves(suboptimality.generate(TINY, 5, seed=8))[1]  # targets
    assert (other != jax.tree.leaves(problems.tasks)[1]).all()


def test_restarted_fista_is_at_the_optimum_to_twelve_digits(problems):
    for some in (problems, suboptimality.instances(LogisticL1(30, 6, rho=0.02), 3, seed=0)):
        params, x = suboptimality.run(RESTARTED, some, 300, both=True)
        assert x is not None
        assert params.shape == x.shape == (len(some.optima), 301)
        assert params.dtype == x.dtype == np.float64
        assert params[:, -1].max() < 1e-12
        assert x[:, -1].max() < 1e-12
        assert (params >= 0).all()
        assert params[:, 0].min() > 1e-3


def test_curves_are_those_of_the_iterates(problems):
    """Of ISTA, by hand: F of the start and after every step."""
    params, x = suboptimality.run(proximal.ista(), problems, 6, both=True)
    assert x is not None
    np.testing.assert_allclose(params, x, rtol=1e-9)  # it does not extrapolate
    for i in range(5):
        matrix, target, rho, lipschitz = (leaf[i] for leaf in jax.tree.leaves(problems.tasks))
        least, y = problems.optima[i], np.zeros(12)
        for k in range(7):
            value = np.sum((matrix @ y - target) ** 2) / 2 + rho * np.abs(y).sum()
            assert params[i, k] == pytest.approx((value - least) / least, rel=1e-10)
            v = y - 0.9999 / lipschitz * matrix.T @ (matrix @ y - target)
            y = np.sign(v) * np.maximum(np.abs(v) - rho * 0.9999 / lipschitz, 0)


def test_blocks_and_settings_do_not_change_the_curves(problems, monkeypatch):
    make, hypers = proximal.Keywords(proximal.constant), {"p": np.array([0.5, 1]), "a": np.zeros(2)}
    whole = suboptimality.run_all(make, hypers, problems, 5)
    assert whole.params.shape == (2, 5, 6)
    assert whole.x is None
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(problems.tasks)) // 5
    monkeypatch.setattr(suboptimality, "BLOCK_BYTES", 2 * size)  # the last block is not full
    blocks = suboptimality.run_all(make, hypers, problems, 5)
    np.testing.assert_allclose(blocks.params, whole.params, rtol=1e-12)
    alone = suboptimality.run(proximal.ista(), problems, 5)
    np.testing.assert_allclose(alone.params, whole.params[1], rtol=1e-12)


def test_diverging_is_told(problems):
    climbing = optax.chain(optax.identity(), optax.scale(10.0))
    curves = suboptimality.run(climbing, problems, 400, both=True)
    assert curves.x is None
    assert (curves.params[:, -1] == np.inf).all()
    assert not np.isnan(curves.params).any()
    summary = suboptimality.summarize(curves.params, at=(1, 400))
    assert summary.diverged == 1.0
    assert summary.at[400]["mean"] == (np.inf,) * 3
    assert summary.to[1e-2].value == np.inf
    slowly = suboptimality.run(optax.scale(0.1), problems, 3)  # above F(0), and finite
    assert np.isfinite(slowly.params).all()
    assert suboptimality.summarize(slowly.params, at=(3,)).diverged == 1.0


def test_the_outermost_proximal_point_is_found():
    x, params = jnp.ones(3), jnp.zeros(3)
    state = proximal.ProximalState(x, proximal.ProximalState(2 * x, x))
    assert suboptimality.proximal_point((state, optax.EmptyState()), params) is x
    assert suboptimality.proximal_point({"x": jnp.ones(2)}, params) is None
    assert suboptimality.proximal_point(optax.adam(0.1).init(params), params) is None


def test_refused():
    nothing = jax.tree.map(lambda leaf: leaf[None], lasso(np.eye(2), np.zeros(2), 0.1))
    with pytest.raises(ValueError, match=r"least F is 0 \(1 of 1\)"):
        suboptimality.solved(nothing)
    with pytest.raises(ValueError, match="`count` must be at least 1, got 0"):
        suboptimality.generate(TINY, 0, seed=0)
    with pytest.raises(TypeError, match="`family` must make composite tasks, got Quadratic"):
        suboptimality.generate(Quadratic(3), 1, seed=0)


CURVES = np.array(
    [
        [1.0, 0.5, 0.01, 0.02, 1e-9],
        [2.0, 1e-3, 1e-3, 1e-5, 1e-5],
        [3.0, 3.0, 3.0, 3.0, 3.0],
        [4.0, 1.0, 1e-4, 0.0, 0.0],
        [5.0, np.inf, np.inf, np.inf, np.inf],
    ]
)


def test_iterations_to_are_the_first():
    found = suboptimality.iterations_to(CURVES, 1e-2)
    np.testing.assert_array_equal(found, [2, 1, np.inf, 2, np.inf])
    np.testing.assert_array_equal(
        suboptimality.iterations_to(CURVES, 1e-8), [4, np.inf, np.inf, 3, np.inf]
    )
    np.testing.assert_array_equal(suboptimality.iterations_to(CURVES[None], 5.0), [[0] * 5])


def test_summaries_of_known_curves():
    summary = suboptimality.summarize(CURVES, at=(0, 1))
    assert summary.at[0]["median"].value == 3
    assert summary.at[0]["mean"].value == 3
    assert summary.at[0]["p90"].value == 5
    assert summary.at[1]["median"].value == 1
    assert summary.at[1]["mean"].value == np.inf
    assert summary.to[1e-2].value == 2
    assert summary.to[1e-8].value == np.inf
    assert summary.diverged == 0.2
    assert summary.curve["k"] == [0, 1, 2, 3, 4]
    assert summary.curve["median"] == [3, 1, 0.01, 0.02, 1e-5]
    assert summary.curve["p90"] == [5] + [np.inf] * 4
    kept = Summary.of_plain(json.loads(json.dumps(summary.plain(), allow_nan=False)))
    assert kept == summary
    with pytest.raises(ValueError, match=r"`at` must be below 5, .* got \[9\]"):
        suboptimality.summarize(CURVES, at=(1, 9))


def test_intervals_cover_the_mean_as_often_as_they_say():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        _, low, high = suboptimality.bootstrap(rng.normal(size=(1, 60)), np.mean)
        covered += low <= 0 <= high
    assert 0.89 < covered / 200 <= 0.99


def test_pooled_runs_of_an_instance_are_drawn_together():
    """Seeds that do the same tell nothing more about other instances."""
    values = np.random.default_rng(1).normal(size=(1, 40))
    once = suboptimality.bootstrap(values, np.mean)
    thrice = suboptimality.bootstrap(np.tile(values, (3, 1)), np.mean)
    np.testing.assert_allclose(thrice, once, rtol=1e-9)
    pooled = suboptimality.summarize(np.stack([CURVES[:2], CURVES[2:4]]), at=(0,))
    assert pooled.at[0]["mean"].value == 2.5
    assert pooled.diverged == 0.0


def row(scale, kind="contender"):
    curves = scale * np.array([[1.0, 1e-3, 1e-7, 1e-9], [2.0, 1e-3, 1e-7, 1e-9]])
    return suboptimality_report.Row(kind, suboptimality.summarize(curves, at=(1, 2)), None, "so")


@pytest.fixture
def comparison():
    about = {"title": "On <sets>", "text": "of two instances", "iterations": 3}
    rows = {"slow & sure": row(37.0), "fast": row(1e-3), "fista_restart": row(1.0, "reference")}
    return suboptimality_report.Comparison(about, {"first": rows, "second": rows})


def test_the_report_holds_the_numbers_and_marks_losses(comparison, tmp_path):
    suboptimality_report.render(comparison, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "http" not in page
    assert "On &lt;sets&gt;" in page
    assert '<td>slow &amp; sure<small>judged here: so</small></td><td><span class="loss">2<' in page
    assert '<span class="loss">3.7e-02</span>' in page
    assert '<span class="win">1.0e-06</span>' in page
    assert '<span class="">1.0e-03</span>' in page  # restarted FISTA's own
    assert "&gt;3" in page
    assert len(re.findall("<svg", page)) == 1


def test_the_markdown_holds_the_numbers_and_marks_losses(comparison):
    text = suboptimality_report.markdown(comparison)
    assert "### first" in text
    head = "| optimizer | to 1e-02 | to 1e-04 | to 1e-06 | to 1e-08 | mean at 1 | mean at 2 | div"
    assert head in text
    assert "| slow & sure | *2* | 2 | *3* | *>3* | *3.7e-02* | *3.7e-06* | 0% |" in text
    assert "| fista_restart | 1 | 2 | 2 | 3 | 1.0e-03 | 1.0e-07 | 0% |" in text
    bare = comparison._replace(sets={"a": {"fast": comparison.sets["first"]["fast"]}})
    assert "| fast | 0 | 1 | 1 | 2 |" in suboptimality_report.markdown(bare)  # nothing to mark


def test_what_is_below_rounding_is_no_win():
    both = [Interval(3e-17, 2e-17, 4e-17), Interval(3e-15, 2e-15, 4e-15)]
    assert suboptimality_report._verdict(*both) == ""
    assert suboptimality_report._verdict(Interval(3, 2, 4), Interval(np.inf, 5, np.inf)) == "win"
    assert suboptimality_report._verdict(Interval(3, 2, 4), Interval(3, 3, 3)) == ""


COMMAND = [
    *("convex", "--suite", "lasso(rows=8, columns=12, noise=0.1, rho=0.02)", "--instances", "5"),
    *("--iterations", "12", "--tuning-instances", "5", "--tune-at", "5"),
]


def run(*arguments):
    cli.main([*COMMAND, *map(str, arguments)])


def test_the_command_judges_and_goes_on_where_it_was_stopped(tmp_path, capsys, monkeypatch):
    rule = StructuredLSTM(hidden=2, layers=1)
    files = [tmp_path / f"seed{i}" / run_directory.ARTIFACT for i in range(2)]
    for i, file in enumerate(files):
        file.parent.mkdir()
        learned_opt.save(file, rule, rule.init(jax.random.key(i)), {})
    out = tmp_path / "out"
    options = ["--optimizer", f"{files[0]}+{files[1]}", "constant", "--out-dir", out]

    run_all, calls = suboptimality.run_all, []

    def interrupted(*args, **options):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(args)
        return run_all(*args, **options)

    monkeypatch.setattr(suboptimality, "run_all", interrupted)
    with pytest.raises(SystemExit) as stopped:
        run(*options)
    assert stopped.value.code == 130
    assert "goes on from there" in capsys.readouterr().err
    assert not (out / run_directory.RESULTS).exists()

    calls.clear()

    def counted(*args, **options):
        calls.append(args)
        return run_all(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(suboptimality, "run_all", counted)
        patch.setattr(suboptimality, "solved", None)  # all that is needed of it was kept
        run(*options)
    # the pooled ones were judged; what is tuned is not kept half done
    assert len(calls) == 4
    assert "report: " in capsys.readouterr().out

    found = convex.load(out / run_directory.RESULTS)
    (rows,) = found.sets.values()
    assert list(rows) == ["seed0+seed1", "constant", "fista_restart", "fista"]
    assert rows["seed0+seed1"].note == "2 pooled"
    assert rows["constant"].note.startswith("p ")
    problems = suboptimality.instances(TINY, 5, convex.TEST)
    curves = suboptimality.run(RESTARTED, problems, 12, both=True)
    restarted = rows["fista_restart"]
    for summary, each in zip((restarted.params, restarted.x), curves, strict=True):
        assert summary is not None
        assert each is not None
        assert summary.at[12]["mean"].value == pytest.approx(each[:, 12].mean())
    pooled = [suboptimality.run(learned_opt.load(file), problems, 12).params for file in files]
    assert rows["seed0+seed1"].params.at[12]["mean"].value == pytest.approx(
        np.mean([each[:, 12] for each in pooled]), rel=1e-5
    )
    for name in (run_directory.REPORT, convex.TABLES):
        assert f"{curves.params[:, 12].mean():.1e}" in (out / name).read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "fist"], "unknown rule, artifact or baseline 'fist'; did you mean"),
        (["--optimizer", "celo2"], "`optimizer` celo2 knows of neither `prox` nor `penalty`"),
        (["--optimizer", "ista", "--suite", "heldout/quick"], "are not composite convex ones"),
        (["--optimizer", "ista", "--suite", "heldout/laso"], "did you mean 'heldout/lasso'"),
        (["--optimizer", "ista", "--instances", "0"], "`instances` must be at least 1, got 0"),
        (["--optimizer", "ista", "--seed", "-1"], "`seed` must be at least 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_line_before_any_work(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments, "--out-dir", tmp_path / "out")
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["heldout/lasso", "heldout/convex"])
def test_restarted_fista_solves_every_held_out_set(name):
    for chosen, family in suite(name).items():
        problems = suboptimality.instances(family, 4, seed=1)
        params = suboptimality.run(RESTARTED, problems, 3000).params
        assert params[:, -1].max() < 1e-8, chosen
