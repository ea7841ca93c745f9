"""Ray: the same theta for any number of workers and none, and for a worker that dies; of one task
family, and of a mixture.
"""

import dataclasses
import gc
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from cluster import cli, run_directory
from cluster.remote import Remote, RemoteState, connect
from learned_opt import artifact
from meta_train.checkpoint import Checkpoints
from meta_train.estimators.compiled import compiled
from meta_train.outer_loop import burn_in, meta_train, start
from meta_train.recipes.base import Recipe
from tasks.image_mlp import ImageMLP
from tasks.quadratic import Quadratic
from tasks.suites import SUITES

pytestmark = pytest.mark.xdist_group("ray")

RECIPE = Recipe(
    task="image_mlp(data='synthetic', hidden=(4,), batch_size=8)",
    rule="small_fc(hidden=2)",
    estimator="pes(particles=5)",
    horizon=(8, 8),
    truncation=4,
    burn_in=2,
    outer_steps=8,
    learning_rate=0.01,
)


MIXTURE = dataclasses.replace(
    RECIPE, task="train/two", weights=(2.0, 1.0), rule="hyperparams(knots=2)"
)


@pytest.fixture(scope="module", autouse=True)
def cluster(ray_home):
    """One for all tests, with nominal cores for all workers that may live at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "")
        assert connect(None, cpus=8)
        assert not connect(None, cpus=8)
        yield
        import ray

        ray.shutdown()


@pytest.fixture(scope="module", autouse=True)
def suite():
    with pytest.MonkeyPatch.context() as patch:
        images = ImageMLP(data="synthetic", hidden=(4,), batch_size=8)
        families = {"images": images, "quadratic": Quadratic(dimension=2)}
        patch.setitem(SUITES, "train/two", lambda: families)
        yield


def train(recipe, estimator, on_step=lambda *_: None):
    rule, optimizer = recipe.build_rule(), recipe.build_optimizer()
    state = burn_in(estimator, start(rule, estimator, optimizer, recipe.seed), recipe.burn_in)
    return meta_train(estimator, optimizer, state, recipe.outer_steps, on_step=on_step)


def flat(theta):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(theta)])


# a mixture goes the way of one family, several times
RECIPES = {"two": MIXTURE, "one": pytest.param(RECIPE, marks=pytest.mark.slow)}


@pytest.fixture(scope="module", params=RECIPES.values(), ids=RECIPES)
def recipe(request):
    return request.param


@pytest.fixture(scope="module")
def here(recipe):
    return compiled(recipe.build_estimator())


@pytest.fixture(scope="module")
def local(recipe, here):
    """Theta after the run in this process."""
    return flat(train(recipe, here).theta)


@pytest.fixture(scope="module")
def two_workers(recipe):
    remote = Remote(recipe.build_estimator(), workers=2)
    yield remote
    remote.close()


def references():
    """To objects in Ray's store, of this process."""
    import ray

    gc.collect()
    return len(ray._private.worker.global_worker.core_worker.get_all_reference_counts())


def test_two_workers_a_dead_worker_and_no_ray_give_the_same_theta(
    recipe, here, local, two_workers, tmp_path
):
    compilations, held = [], []

    def watch(*_):
        compilations.append(two_workers.compilations())
        held.append(references())

    undisturbed = train(recipe, two_workers, watch)
    np.testing.assert_allclose(flat(undisturbed.theta), local, rtol=0, atol=1e-5)
    moved = flat(recipe.build_rule().init(jax.random.split(jax.random.key(recipe.seed), 3)[0]))
    assert np.abs(local - moved).max() > 1e-3
    assert len(set(compilations)) == 1, "all was compiled in the first step"
    assert compilations[0] > 0
    assert len(set(held[1:])) == 1, "old states are let go"

    killed = []

    def kill(step, *_):
        if step == 3:
            killed.append(two_workers.pids()[0])
            os.kill(killed[0], signal.SIGKILL)

    disturbed = train(recipe, two_workers, kill)
    assert killed
    assert killed[0] not in two_workers.pids()
    np.testing.assert_array_equal(flat(disturbed.theta), flat(undisturbed.theta))

    # a checkpoint holds all particles, whoever hosted them: this process goes on from the workers'
    # state, and they from the checkpoint
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(8, disturbed)
    template = start(recipe.build_rule(), here, recipe.build_optimizer(), 0)
    restored = checkpoints.restore(template)
    key = jax.random.key(1)
    back = disturbed.estimator_state
    remote_estimate, _ = two_workers.estimate(disturbed.theta, back, key)
    local_estimate, _ = here.estimate(restored.theta, restored.estimator_state, key)
    np.testing.assert_allclose(flat(remote_estimate.grad), flat(local_estimate.grad), rtol=1e-3)
    whole = RemoteState(whole=restored.estimator_state)
    again, _ = two_workers.estimate(restored.theta, whole, key)
    jax.tree.map(np.testing.assert_array_equal, again, remote_estimate)


def test_servers_listen_on_loopback_alone(two_workers):
    import ray

    assert ray.util.get_node_ip_address() == "127.0.0.1"
    assert ray.get_runtime_context().gcs_address.startswith("127.0.0.1:")


def test_more_workers_than_particles_and_unreachable_clusters_are_refused():
    with pytest.raises(ValueError, match=r"`parts` must be between 1 and the number of particles"):
        Remote(RECIPE.build_estimator(), workers=6)
    with pytest.raises(ValueError, match="`workers` must be at most 10"):
        Remote(MIXTURE.build_estimator(), workers=11)
    for address in ("127.0.0.1:1", "nonsense"):
        with pytest.raises(ConnectionError, match=f"`address` {address}"):
            Remote(RECIPE.build_estimator(), workers=1, address=address)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers_gives_the_same_theta(recipe, local, workers):
    remote = Remote(recipe.build_estimator(), workers=workers)
    try:
        # how a sum is ordered depends on how many particles a program has; steps are of 1e-2
        np.testing.assert_allclose(flat(train(recipe, remote).theta), local, rtol=0, atol=1e-5)
    finally:
        remote.close()


@pytest.mark.slow
def test_a_command_with_workers_starts_its_own_cluster_and_ends_it(tmp_path):
    options = [
        *("--task", "quadratic(dimension=2)", "--rule", "hyperparams(knots=2)"),
        *("--estimator", "nres(particles=3)", "--horizon", "4", "8", "--truncation", "2"),
        *("--outer-steps", "5", "--recipe", "default"),
    ]
    cli.main(["meta-train", "--run-dir", str(tmp_path / "0"), *options])
    command = [sys.executable, "-m", "cluster.cli", "meta-train", "--run-dir", str(tmp_path / "2")]
    subprocess.run([*command, *options, "--workers", "2"], check=True, timeout=300)
    thetas = [artifact.read(tmp_path / n / run_directory.ARTIFACT)[1] for n in ("0", "2")]
    np.testing.assert_allclose(*map(flat, thetas), rtol=0, atol=1e-5)
