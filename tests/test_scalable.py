"""Families that grow in width and depth, under standard and mu-parametrization."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from learned_opt.mup import mup_multipliers
from tasks.data import synthetic
from tasks.mlp import MLP
from tasks.resnet import Resnet
from tasks.transformer_lm import TransformerLM
from tasks.vit import Vit

KEY = jax.random.key(0)
FAMILIES = {
    "mlp": MLP(synthetic(), width=8, depth=3, batch_size=4),
    "transformer": TransformerLM("markov", width=8, depth=2, length=5, batch_size=2),
    "vit": Vit(synthetic(), patch=2, width=8, batch_size=4),
    "resnet": Resnet(synthetic(), width=8, blocks=(1, 1), batch_size=4),
}
for_each_family = pytest.mark.parametrize("name", FAMILIES)


def at(name, width, base_width=None):
    return dataclasses.replace(FAMILIES[name], width=width, base_width=base_width)(KEY)


def shapes(name, width):
    return jax.eval_shape(lambda: at(name, width).init(KEY))


@for_each_family
def test_names_and_growth_tell_the_same_multipliers_up_to_a_width_of_4096(name):
    wide = shapes(name, 4096)
    by_growth = mup_multipliers(wide, shapes(name, 8), base_width=1)
    by_name = mup_multipliers(wide, base_width=1)
    jax.tree.map(np.testing.assert_array_equal, by_name.step, by_growth.step)
    relative = mup_multipliers(wide, shapes(name, 8))
    assert {*jax.tree.leaves(relative.step)} == {1.0, 1 / 512}
    assert {*jax.tree.leaves(relative.gradient)} == {1.0, 512.0}


@for_each_family
def test_the_network_is_the_standard_one_with_smaller_readout_and_queries(name):
    """Grown 4 times, readouts are divided by 4, and scores by another 2 = sqrt(4)."""
    standard, mup = at(name, 8), at(name, 8, base_width=2)
    params, batch = standard.init(KEY), standard.batch(KEY, "train")

    def divided(path, leaf):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        by = 4.0 if path in ("readout/kernel", "head/kernel") else 1.0
        return leaf / (2.0 if path.endswith("query/kernel") else by)

    smaller = jax.tree_util.tree_map_with_path(divided, params)
    got = mup.network.apply(params, batch.inputs)
    want = standard.network.apply(smaller, batch.inputs)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)
    at_base = at(name, 8, base_width=8).network.apply(params, batch.inputs)
    np.testing.assert_array_equal(at_base, standard.network.apply(params, batch.inputs))


@for_each_family
def test_readouts_start_at_zero_and_all_else_as_at_the_base_width(name):
    params, standard = (at(name, 8, base).init(KEY) for base in (2, None))

    def check(path, leaf, plain):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        if path in ("readout/kernel", "head/kernel"):
            assert not np.any(leaf)
            assert np.any(plain)
        else:  # a standard embedding of width 8 has the variance 1 / 8, one of width 2 1 / 2
            factor = 2.0 if "embed" in path else 1.0
            np.testing.assert_allclose(leaf, factor * plain, rtol=1e-6)

    jax.tree_util.tree_map_with_path(check, params, standard)


@for_each_family
def test_activations_are_those_of_the_forward_pass(name):
    task = at(name, 8)
    params, batch = task.init(KEY), task.batch(KEY, "train")
    found = task.activations(params, batch)
    np.testing.assert_array_equal(found["output"], task.network.apply(params, batch.inputs))
    layers = {
        jax.tree_util.keystr(path[:-1], simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    }
    assert layers - {""} <= found.keys()


def test_deep_networks_keep_their_scale():
    """24 layers of relu, with weights of variance 2 / inputs: the second moment of activations
    stays within a factor of e, where with 1 / inputs it would fall to 2**-24.
    """
    task = MLP(synthetic(), width=256, depth=24, batch_size=64)(KEY)
    found = task.activations(task.init(KEY), task.batch(KEY, "train"))
    second = {name: float(jnp.mean(jnp.square(x))) for name, x in found.items()}
    assert abs(np.log(second["hidden/22"] / second["input"])) < 1


def test_bad_widths_are_refused():
    with pytest.raises(ValueError, match="`base_width` must be a positive integer, got 0"):
        MLP(synthetic(), base_width=0)
    with pytest.raises(ValueError, match="`depth` must be a positive integer, got 0"):
        MLP(synthetic(), depth=0)
