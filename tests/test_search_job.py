"""The search as a command: what it leaves in its directory, interrupts and resume, workers."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

import learned_opt
from cluster import cli, run_directory, search_conclusion
from cluster import search as job
from learned_opt import artifact
from learned_opt.symbolic import PROGRAMS
from learned_opt.symbolic.analysis import read
from meta_train.search import journal
from meta_train.search.evaluator import Local, try_all
from meta_train.search.evolution import Search, scaled_rate
from meta_train.search.proxies import Proxies
from meta_train.search.recipe import SearchRecipe
from tasks.suites import SUITES

TASK = "tabular_mlp(data='synthetic_table', hidden=(4,), batch_size=16)"
RECIPE = SearchRecipe(
    tasks=TASK, steps=40, evaluated=70, population=16, batch=8, metaval="quadratic(dimension=3)",
    metaval_steps=20,
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("search") / "run"
    job.run(RECIPE, directory)
    return directory


def test_a_run_leaves_a_program_an_optimizer_a_journal_and_a_report(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "config.json", "journal.jsonl", "metrics.jsonl", "search.json", "funnel.json", "best.py",
        "theta.safetensors", "report.html",
    }  # fmt: skip
    program = read((finished / "best.py").read_text(), "best.py")
    rule, theta, card = artifact.read(finished / "theta.safetensors")
    assert rule.parsed() == program
    assert card["counts"]["evaluated"] == 70
    assert set(card["log_loss_vs_first_program"]) == {
        "other seeds", "meta-validation", "longer", "meta-validation, other seeds",
    }  # fmt: skip
    assert not np.any(theta["moved"])
    opt = learned_opt.load(finished / "theta.safetensors", horizon=10)
    params = {"w": np.ones(3, np.float32)}
    updates, _ = opt.update({"w": params["w"]}, opt.init(params), params)
    assert np.all(np.isfinite(updates["w"]))
    entries = list(journal.read(finished / "journal.jsonl"))
    line = journal.lineage(entries, card["number"])
    assert line[0][0].how == "start"
    assert line[-1][0].number == card["number"]
    assert "<svg" in (finished / "report.html").read_text()


def test_a_finished_run_is_not_run_again(finished, monkeypatch):
    monkeypatch.setattr(job, "_search", None)
    assert job.run(None, finished, resume=True) == finished / "theta.safetensors"


@pytest.mark.parametrize("where", ["search", "funnel"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(where, finished, tmp_path, monkeypatch):
    directory, calls = tmp_path / "run", 0
    target = (Search, "round") if where == "search" else (search_conclusion, "simplify")
    whole = getattr(*target)

    def dies(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == (4 if where == "search" else 1):
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(*target, dies)
    with pytest.raises(KeyboardInterrupt):
        job.run(RECIPE, directory, checkpoint_seconds=0.0)
    monkeypatch.setattr(*target, whole)
    assert not (directory / "theta.safetensors").exists()
    job.run(None, directory, resume=True)
    for name in ("best.py", "journal.jsonl", "funnel.json"):
        assert (directory / name).read_text() == (finished / name).read_text()
    got, want = (artifact.read(d / "theta.safetensors")[2] for d in (directory, finished))
    for name in ("counts", "number", "log_loss_vs_first_program"):
        assert got[name] == want[name]


def test_bad_input_is_told_before_work(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LEARNED_OPT_CACHE", str(tmp_path / "cache"))
    mine = tmp_path / "mine.py"
    mine.write_text("def train(w, g, m, v, lr):\n    update = g * nope\n    return update, m, v\n")
    body = "def train(w, g, m, v, lr):\n    update = {}\n    return update, m, v\n"
    (still := tmp_path / "still.py").write_text(body.format("g * lr"))
    (wild := tmp_path / "wild.py").write_text(body.format("arcsin(g)"))
    monkeypatch.setitem(SUITES, "train/none", dict)
    options = ["--run-dir", str(tmp_path / "run")]
    for arguments, said in (
        (["--start", "adam"], "`start` adam is neither a file nor one of adamw, lion"),
        (["--start", str(mine)], "line 2: 'update = g * nope': nope is read before it is assigned"),
        (["--tasks", "train/none"], "`tasks` train/none holds no task"),
        (["--tasks", "train/proxie"], "train/proxies"),
        (["--metaval", "metaval/smal"], "metaval/small"),
        (["--population", "1"], "`population` must be at least 2"),
        (["--mode", "constants", "--start", str(still)], "no valid change was found"),
        (["--start", str(wild)], "gives updates that are not finite"),
        (["--asynchronous"], "`asynchronous` needs `workers`"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["search", *options, *arguments])
        err = capsys.readouterr().err
        assert stopped.value.code == 2
        assert said in err
        assert len(err.strip().splitlines()) == 1
        assert not (tmp_path / "run").exists()
    with pytest.raises(FileExistsError, match="add --resume"):
        job.run(RECIPE, finished)
    with pytest.raises(ValueError, match="is no recipe of meta-training in this version"):
        run_directory.read_recipe(finished)
    with pytest.raises(ValueError, match=r"tasks: .* in the run, 'train/quick' asked for"):
        job.run(SearchRecipe(**{**vars(RECIPE), "tasks": "train/quick"}), finished, resume=True)


def test_a_resume_with_other_tasks_of_the_same_name_stops(finished, tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    for name in ("config.json", "journal.jsonl"):
        (directory / name).write_bytes((finished / name).read_bytes())
    saved = json.loads((finished / "search.json").read_text())
    saved["state"]["reference"] = [1.5 * x for x in saved["state"]["reference"]]
    (directory / "search.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="are not the tasks of this run: the first program's"):
        job.run(None, directory, resume=True)


def test_a_search_that_finds_nothing_better_ends_with_its_first_program(tmp_path, capsys):
    recipe = dataclasses.replace(RECIPE, mode="random", evaluated=3)
    job.run(recipe, tmp_path / "run")
    _, _, card = artifact.read(tmp_path / "run" / "theta.safetensors")
    assert card["number"] == 0
    assert not card["better_than_the_first_program"]
    assert "no program beat the first one" in capsys.readouterr().out


def test_a_started_search_needs_its_first_program_no_longer(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(str(PROGRAMS["sgd_momentum"]))
    recipe = dataclasses.replace(RECIPE, start=str(mine), evaluated=8)
    job.run(recipe, tmp_path / "run", checkpoint_seconds=0.0)
    mine.unlink()
    (tmp_path / "run" / "theta.safetensors").unlink()
    job.run(None, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "theta.safetensors").exists()


def test_a_journal_that_lost_its_end_is_told(finished, tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    for name in ("config.json", "search.json"):
        (directory / name).write_bytes((finished / name).read_bytes())
    (directory / "journal.jsonl").write_bytes((finished / "journal.jsonl").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"had [0-9]+ when it was checkpointed"):
        job.run(None, directory, resume=True)


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_workers_that_die_change_nothing(ray_home, finished, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    from cluster.search_workers import SearchWorkers

    workers = SearchWorkers(2)
    try:
        proxies = Proxies(TASK, steps=40)
        programs = [scaled_rate(PROGRAMS["adamw"], 2.0**i) for i in range(12)]
        want = try_all(Local(), programs, proxies)
        pids = workers.pids()
        for ticket, program in enumerate(programs):
            workers.submit(ticket, program, proxies)
        found = dict(workers.collect())
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        while len(found) < len(programs):
            found |= dict(workers.collect())
        np.testing.assert_allclose([found[i] for i in range(12)], want, rtol=1e-5)
        assert not set(pids) & set(workers.pids())
    finally:
        workers.close()


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_on_workers(asynchronous, ray_home, finished, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    directory = tmp_path / "run"
    job.run(RECIPE, directory, workers=2, asynchronous=asynchronous)
    card = artifact.read(directory / "theta.safetensors")[2]
    assert card["counts"]["evaluated"] == 70
    if not asynchronous:  # the same programs as in one process, whose arithmetic differs a little
        ours, theirs = (
            [e.program for e in journal.read(d / "journal.jsonl") if e.losses][:40]
            for d in (finished, directory)
        )
        assert ours == theirs
    assert card["asynchronous"] == asynchronous


def test_meta_training_tunes_the_numbers_of_a_program(tmp_path):
    """Symbolic structure, learned numbers: a learning rate that is 30 times too small grows."""
    program = scaled_rate(PROGRAMS["sgd_momentum"], 1 / 30)
    rule = f"symbolic(program={str(program)!r}, schedule='cosine')"
    cli.main(
        [
            "meta-train", "--run-dir", str(tmp_path / "run"), "--rule", rule,
            "--task", "quadratic(dimension=3)", "--estimator", "full_es(particles=4, sigma=0.1)",
            "--horizon", "20", "20", "--truncation", "20", "--outer-steps", "40",
            "--learning-rate", "0.1",
        ]
    )  # fmt: skip
    found, theta, _ = artifact.read(tmp_path / "run" / "theta.safetensors")
    before, after = (
        found.constants({"moved": x}) for x in (np.zeros(2, np.float32), theta["moved"])
    )
    assert after[1] > 3 * before[1]
    assert jax.tree.map(np.shape, theta) == {"moved": (2,)}
