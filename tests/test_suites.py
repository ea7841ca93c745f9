"""Suites: what is held out is held out, and what their tasks cost is told and kept to."""

import dataclasses
import itertools

import numpy as np
import pytest

from evaluation import task_cost
from learned_opt.discovery import name_of
from tasks.data import synthetic
from tasks.image_mlp import ImageMLP
from tasks.quadratic import Quadratic
from tasks.reparam import Reparam
from tasks.suites import SUITES, datasets, provenance, suite

SEEN = ("train/quick", "train/fast", "train/diverse", "train/proxies", "metaval/small")
HELD_OUT = ("heldout/small", "heldout/proxies", "heldout/wide")


def plain(family):
    """Without augmentations."""
    return plain(family.family) if hasattr(family, "family") else family


def architecture(family):
    """The class and all sizes: its fields but data and what is drawn or sampled from them."""
    family = plain(family)
    free = {"data", "batch_size", "dynamic", "noise", "length"}
    fields = [field.name for field in dataclasses.fields(family) if field.name not in free]
    return type(family).__name__, *(getattr(family, name) for name in fields)


def families(names):
    return [family for name in names for family in suite(name).values()]


def sources(names):
    return {source for family in families(names) for source, *_ in provenance(family)}


def test_held_out_tasks_share_neither_data_nor_architecture_with_what_is_seen():
    assert len(suite("heldout/small")) >= 12
    assert not sources(SEEN) & sources(HELD_OUT)
    assert not {architecture(f) for f in families(SEEN)} & {
        architecture(f) for f in families(HELD_OUT)
    }
    assert not sources(SEEN[:-1]) & sources(SEEN[-1:])


def test_sources_of_seen_and_held_out_tasks_share_no_row():
    rows = {}
    for family in families(SEEN + HELD_OUT):
        for data in datasets(family):
            if hasattr(data, "inputs"):
                rows[data.name] = {np.asarray(x).tobytes() for x in data.inputs}
    seen = {d.name for f in families(SEEN) for d in datasets(f)} & set(rows)
    for a, b in itertools.product(seen, set(rows) - seen):
        assert not rows[a] & rows[b], (a, b)


def test_train_diverse_has_many_families_and_augmentations():
    diverse = suite("train/diverse").values()
    assert len({type(plain(family)) for family in diverse}) >= 10
    assert len({type(family) for family in diverse if plain(family) is not family}) >= 6


def test_train_fast_is_four_mlps_on_8x8_images():
    for family in suite("train/fast").values():
        assert isinstance(family, Reparam)
        assert family.family.hidden == (32,)
        assert family.family.data.shape[:2] == (8, 8)


def test_the_quick_suites_share_no_row():
    train, heldout = suite("train/quick"), suite("heldout/quick")
    trained_on = {row.tobytes() for row in train["digits_mlp"].data.inputs}
    for family in heldout.values():
        assert not {row.tobytes() for row in family.data.inputs} & trained_on


def test_an_unknown_suite_lists_what_exists():
    with pytest.raises(ValueError, match=r"`suite` 'heldout/smal'. Did you mean 'heldout/small'"):
        suite("heldout/smal")


@pytest.mark.parametrize("name", SUITES)
def test_every_dataset_has_a_licence(name):
    for family in suite(name).values():
        for source, about, licence in provenance(family):
            assert "TensorFlow" not in about + licence, source


def test_every_task_of_every_suite_traces():
    for name in SUITES:
        for family in suite(name).values():
            assert task_cost.count_params(family) > 0, name_of(type(family))


def test_costs_are_measured_once_and_keep_tasks_to_a_budget(tmp_path, monkeypatch):
    small = ImageMLP(data=synthetic(), hidden=(4,), batch_size=4)
    large = ImageMLP(data=synthetic(), hidden=(512, 512), batch_size=64)
    tasks = {"small": small, "large": large}
    assert task_cost.known(small, tmp_path) is None
    costs = {name: task_cost.cost(family, tmp_path) for name, family in tasks.items()}
    assert costs["small"].params == 16 * 4 + 4 + 4 * 3 + 3
    # 500 times the work; a noisy machine does not hide that
    assert costs["large"].step_seconds > 3 * costs["small"].step_seconds
    monkeypatch.setattr(task_cost, "measure", None)
    assert task_cost.known(small, tmp_path) == costs["small"]
    budget = (costs["large"].step_seconds * costs["small"].step_seconds) ** 0.5
    kept, over = task_cost.within_budget(tasks, budget, tmp_path)
    assert kept == {"small": small}
    assert over == {"large": costs["large"].step_seconds}
    with pytest.raises(ValueError, match=r"`time_budget` of 1e-09 .* small [0-9.]+ ms, large"):
        task_cost.within_budget(tasks, 1e-9, tmp_path)
    with pytest.raises(ValueError, match="`time_budget` must be positive"):
        task_cost.within_budget(tasks, 0.0, tmp_path)


def test_params_are_counted_without_computing():
    assert task_cost.count_params(Quadratic(dimension=7)) == 7
    assert task_cost.count_params(Reparam(Quadratic(dimension=5))) == 5
