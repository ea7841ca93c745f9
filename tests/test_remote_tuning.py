"""Tuning on Ray workers: what this process finds, also when a worker dies."""

import itertools
import os
import signal

import jax
import numpy as np
import optax
import pytest

from cluster import cli
from cluster import evaluate as job
from cluster.remote_tuning import TrainingWorkers
from evaluation import benchmark
from evaluation.curve import train_from
from evaluation.results import load
from tasks.quadratic import Quadratic

pytestmark = pytest.mark.xdist_group("ray")

SUITE = {"small": Quadratic(dimension=2), "large": Quadratic(dimension=5)}
BASELINES = ["sgd_momentum", "schedule_free_sgd", "polyak_sgd"]


@pytest.fixture(scope="module", autouse=True)
def environment(ray_home):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
        yield


@pytest.fixture(autouse=True)
def untimed(monkeypatch):
    """Time per step, which is never the same."""
    monkeypatch.setattr("evaluation.tuning.compile_steps", lambda *_: None)
    monkeypatch.setattr("evaluation.tuning.step_seconds", lambda *_: (2e-4, 1e-4))


def evaluate(cache_dir, train, **contenders):
    return benchmark.evaluate(
        contenders, SUITE, steps=30, seeds=2, evals=5, baselines=BASELINES, cache_dir=cache_dir,
        train=train,
    )  # fmt: skip


def files(directory):
    return {path.name: dict(np.load(path)) for path in directory.iterdir()}


@pytest.mark.slow
def test_workers_that_die_and_this_process_find_the_same(tmp_path):
    mine = {"mine": lambda horizon: optax.sign_sgd(optax.linear_schedule(0.1, 0.0, horizon))}
    here = evaluate(tmp_path / "here", train_from, **mine)
    workers = TrainingWorkers(2)
    try:
        pids, calls = workers.pids(), itertools.count(1)

        def train(*arguments, **budget):
            if next(calls) == 3:  # while the other thread's is under way
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
            return workers(*arguments, **budget)

        there = evaluate(tmp_path / "there", train, **mine)
        assert not set(pids) & set(workers.pids())
    finally:
        workers.close()
    # This process wrote the cache: files of the same names with the same numbers.
    ours, theirs = files(tmp_path / "here"), files(tmp_path / "there")
    assert ours.keys() == theirs.keys()
    for name in ours:
        jax.tree.map(np.testing.assert_array_equal, theirs[name], ours[name])
    assert there.rows == here.rows
    assert there.scores == here.scores
    from_cache = evaluate(tmp_path / "there", None)
    assert from_cache.scores["tuned"]["adam (tuned)"] == here.scores["tuned"]["adam (tuned)"]


@pytest.mark.slow
def test_the_command_line_takes_workers_and_leaves_none_behind(tmp_path, monkeypatch):
    arguments = ["evaluate", "--optimizer", "sign_sgd", "--baselines", "adam", "--steps", "8"]
    arguments += ["--seeds", "1", "--suite", "quadratic(dimension=2)"]
    found = []
    for workers in ("1", "0"):
        monkeypatch.setenv("LEARNED_OPT_CACHE", str(tmp_path / f"cache{workers}"))
        cli.main([*arguments, "--workers", workers, "--out-dir", str(tmp_path / workers)])
        found.append(load(tmp_path / workers / "results.json"))
    assert found[0].scores == found[1].scores
    import ray

    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": -1}, "`workers` must be 0"),
        ({"address": "auto"}, "`address` auto needs `workers` of at least 1"),
        ({"workers": 1, "address": "127.0.0.1:1"}, "no Ray cluster at `address` 127.0.0.1:1"),
    ],
)
def test_workers_that_cannot_be_are_refused_before_any_work(options, message, tmp_path):
    budget = {"steps": 4, "seeds": 1, "baselines": (), "directory": tmp_path}
    with pytest.raises((ValueError, ConnectionError), match=message):
        job.evaluate(("adam",), "quadratic(dimension=2)", **budget, **options)
    assert not list(tmp_path.iterdir())
