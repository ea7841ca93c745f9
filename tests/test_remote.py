"""Ray: the same theta for any number of workers and none, and for a worker that dies."""

import os
import signal

import jax
import numpy as np
import pytest

from cluster.remote import Remote
from meta_train.checkpoint import Checkpoints
from meta_train.estimators.compiled import Compiled
from meta_train.outer_loop import burn_in, meta_train, start
from meta_train.recipes.base import Recipe

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


@pytest.fixture(scope="module", autouse=True)
def ray_home(tmp_path_factory):
    """Ray writes its authentication token to the home directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("XLA_FLAGS", "")
        yield


def train(estimator, on_step=lambda *_: None):
    rule, optimizer = RECIPE.build_rule(), RECIPE.build_optimizer()
    state = burn_in(estimator, start(rule, estimator, optimizer, RECIPE.seed), RECIPE.burn_in)
    return meta_train(estimator, optimizer, state, RECIPE.outer_steps, on_step=on_step)


def flat(theta):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(theta)])


@pytest.fixture(scope="module")
def local():
    """Theta after the run in this process, and how far it moved."""
    estimator = Compiled(RECIPE.build_estimator())
    return flat(train(estimator).theta)


@pytest.fixture(scope="module")
def two_workers():
    remote = Remote(RECIPE.build_estimator(), workers=2)
    yield remote
    remote.close()


def test_two_workers_a_dead_worker_and_no_ray_give_the_same_theta(local, two_workers, tmp_path):
    undisturbed = train(two_workers)
    np.testing.assert_allclose(flat(undisturbed.theta), local, rtol=0, atol=1e-5)
    moved = flat(RECIPE.build_rule().init(jax.random.split(jax.random.key(RECIPE.seed), 3)[0]))
    assert np.abs(local - moved).max() > 1e-3

    killed = []

    def kill(step, *_):
        if step == 3:
            killed.append(two_workers.pids()[0])
            os.kill(killed[0], signal.SIGKILL)

    disturbed = train(two_workers, on_step=kill)
    assert killed
    assert killed[0] not in two_workers.pids()
    np.testing.assert_array_equal(flat(disturbed.theta), flat(undisturbed.theta))

    # a checkpoint holds all particles, whoever hosted them: this process goes on from the workers'
    # state
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(8, disturbed)
    here = Compiled(RECIPE.build_estimator())
    template = start(RECIPE.build_rule(), here, RECIPE.build_optimizer(), 0)
    restored = checkpoints.restore(template)
    key = jax.random.key(1)
    back = disturbed.estimator_state
    remote_estimate, _ = two_workers.estimate(disturbed.theta, back, key)
    local_estimate, _ = here.estimate(restored.theta, restored.estimator_state, key)
    np.testing.assert_allclose(flat(remote_estimate.grad), flat(local_estimate.grad), rtol=1e-3)


def test_servers_listen_on_loopback_alone(two_workers):
    import ray

    assert ray.util.get_node_ip_address() == "127.0.0.1"
    assert ray.get_runtime_context().gcs_address.startswith("127.0.0.1:")


def test_more_workers_than_particles_and_unreachable_clusters_are_refused():
    with pytest.raises(ValueError, match=r"`parts` must be between 1 and the number of particles"):
        Remote(RECIPE.build_estimator(), workers=6)
    for address in ("127.0.0.1:1", "nonsense"):
        with pytest.raises(ConnectionError, match=f"`address` {address}"):
            Remote(RECIPE.build_estimator(), workers=1, address=address)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers_gives_the_same_theta(local, workers):
    remote = Remote(RECIPE.build_estimator(), workers=workers)
    try:
        # how a sum is ordered depends on how many particles a program has; steps are of 1e-2
        np.testing.assert_allclose(flat(train(remote).theta), local, rtol=0, atol=1e-5)
    finally:
        remote.close()
