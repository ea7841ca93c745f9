"""The cost of an update: figures that are known by hand, and the command that prints them."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import optax
import pytest

from cluster import cli
from evaluation import cost
from learned_opt.hyperparams import Hyperparams

QUICK = 0.02  # seconds of timing; three rounds at least
SIDE = 22
PARAMS = 2 * SIDE**2 + 2 * SIDE  # of the problem of 1000


def measure(optimizer, count=1000):
    return cost.measure(optimizer, count, seconds=QUICK)


@pytest.mark.parametrize(("count", "side"), [(4, 1), (1000, SIDE), (10**6, 707)])
def test_the_problem_is_two_square_matrices_and_two_vectors(count, side):
    params, grads = jax.eval_shape(lambda: cost.problem(count))
    assert sorted(leaf.shape for leaf in params.values()) == [(side,)] * 2 + [(side, side)] * 2
    assert params == grads
    assert {leaf.dtype for leaf in params.values()} == {jnp.dtype("float32")}


def test_adam_by_hand():
    """Reads g, m, v and writes u, m, v, and its count of steps; never reads the params."""
    found = measure(optax.adam(1e-3))
    assert found.state_bytes_per_param == (8 * PARAMS + 4) / PARAMS
    assert found.bytes_floor_per_param == (24 * PARAMS + 8) / PARAMS
    assert found.bytes_floor_ratio_to_adam == 1.0
    low, high = found.step_ratio_quartiles
    assert 0 < low <= found.step_ratio_to_adam <= high


@pytest.mark.parametrize(
    ("optimizer", "floor", "state", "flops"),
    [
        (optax.scale(-0.5), 8, 0, 1),  # reads g, writes u
        (optax.add_decayed_weights(0.5), 12, 0, 2),  # reads g and p, writes u
        (optax.trace(0.5), 16, 4, 2),  # reads g and m, writes u and m
    ],
)
def test_floors_and_flops_by_hand(optimizer, floor, state, flops):
    found = measure(optimizer)
    assert found.bytes_floor_per_param == floor
    assert found.state_bytes_per_param == state
    assert found.flops_per_param == flops
    adam = 24 + 8 / PARAMS
    assert found.bytes_floor_ratio_to_adam == pytest.approx(floor / adam)


def test_a_slow_transformation_measures_slower_than_adam():
    """Some hundred times, by computing alone: it moves a third of Adam's bytes."""

    def update(updates, state, params=None):
        def body(_, g):
            return jnp.sin(g) + 1e-3 * g

        return jax.tree.map(lambda g: jax.lax.fori_loop(0, 20_000, body, g), updates), state

    found = measure(optax.GradientTransformation(lambda params: optax.EmptyState(), update))
    assert found.step_ratio_to_adam > 3
    assert found.bytes_floor_per_param == 8


def test_temporaries_are_counted():
    """A product of two products holds one of them, at least, for each matrix."""

    def update(updates, state, params=None):
        return {k: g @ (g @ g) if g.ndim == 2 else g for k, g in updates.items()}, state

    found = measure(optax.GradientTransformation(lambda params: optax.EmptyState(), update))
    assert found.temp_bytes_per_param >= 4 * SIDE**2 / PARAMS
    assert measure(optax.scale(-0.5)).temp_bytes_per_param < 0.5


def test_the_loss_arrives_and_a_state_of_params_is_donated_safely():
    """The state starts as the params themselves and holds one array twice."""

    def update(updates, state, params, *, value, **extra_args):
        assert value.shape == ()
        moved = jax.tree.map(lambda s, p: s + value * p, state[0], params)
        return updates, (moved, jax.tree.map(jnp.add, state[1], moved))

    optimizer = optax.GradientTransformationExtraArgs(lambda params: (params, params), update)
    assert measure(optimizer).state_bytes_per_param == 8


def test_compilation_is_measured_past_the_cache_on_disk(monkeypatch):
    """The update is not looked for in the cache; what is compiled after it is."""
    looked_for = []
    monkeypatch.setattr(
        "jax._src.compilation_cache.get_executable_and_time",
        lambda key, *_: (looked_for.append(key), (None, None))[1],
    )
    measure(optax.scale(-0.5))
    jax.jit(lambda x: x + 1)(1.0)
    programs = {key.rpartition("-")[0] for key in looked_for}
    assert "jit_update" not in programs
    assert "jit__lambda" in programs


def run(capsys, *arguments, code=0):
    if code:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["cost", *map(str, arguments)])
        assert stopped.value.code == code
    else:
        cli.main(["cost", *map(str, arguments)])
    return capsys.readouterr()


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    path = tmp_path / "new" / "cost.json"
    names = ("hyperparams", "small_fc-digits", "hyperparams(knots=3)")
    out = run(capsys, *names, "--params", "1e3,16", "--seconds", QUICK, "--json", path).out
    for shown in (*names, "optax.adam", "1,000 params", "16 params"):
        assert shown in out
    found = json.loads(path.read_text())
    assert tuple(found) == names
    for sizes in found.values():
        assert list(sizes) == ["1000", "16"]
        for figures in sizes.values():
            assert figures.keys() == set(cost.Cost._fields)
            low, high = figures.pop("step_ratio_quartiles")
            assert low <= figures["step_ratio_to_adam"] <= high
            assert all(math.isfinite(figure) and figure >= 0 for figure in figures.values())
    assert found["hyperparams"]["1000"]["state_bytes_per_param"] == pytest.approx(8, abs=0.01)
    assert [p.name for p in path.parent.iterdir()] == ["cost.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smal_fc"], "unknown rule or artifact 'smal_fc'; did you mean 'small_fc'?"),
        (["small_fc-digit"], "did you mean 'small_fc-digits'?"),
        (["small_fc(width=3)"], "unknown field of rule small_fc 'width'"),
        (["small_fc(hidden=0)"], "`hidden` must be at least 1, got 0"),
        (["--params", "1e6,-3"], "got '-3'"),
        (["--params", "many"], "`params` must be whole numbers from 4 to 1e12"),
        (["--params", "3"], "got '3'"),
        (["--params", "nan"], "got 'nan'"),
        (["--params", "10.5"], "got '10.5'"),
        (["--params", ""], "got ''"),
        (["--seconds", "0"], "`seconds` must be positive, got 0"),
        (["--json", "."], "`json` . is a directory"),
        (["--json", "file/x.json"], "`json` file/x.json cannot be written"),
    ],
)
def test_bad_input_is_one_line_before_any_work(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cost, "measure", None)
    (tmp_path / "file").touch()
    err = run(capsys, *arguments, code=2).err
    assert err.startswith("error: ")
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@dataclasses.dataclass(frozen=True)
class Picky:
    """A rule that cannot take a plain step."""

    def init(self, key):
        return {}

    def optimizer(self, theta, horizon=None):
        def update(updates, state, params=None, **extra_args):
            return updates, extra_args["smoothness"]

        return optax.GradientTransformationExtraArgs(lambda params: (), update)


def test_of_all_rules_those_that_cannot_be_measured_are_left_out(tmp_path, monkeypatch, capsys):
    """Among them those for which there is no memory; a rule that is asked for is an error."""
    rules = {"picky": Picky, "hyperparams": Hyperparams}
    monkeypatch.setattr(cli.discovery, "members", lambda package: rules)
    err = run(capsys, "picky", code=2).err
    assert "error: picky: KeyError('smoothness')" in err

    plain = cost.measure

    def measured(optimizer, count, seconds):
        if count == 8:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory\nand so on")
        return plain(optimizer, count, seconds)

    monkeypatch.setattr(cost, "measure", measured)
    path = tmp_path / "cost.json"
    out = run(capsys, "--params", "8,1e3", "--seconds", QUICK, "--json", path).out
    assert "not measured: picky: KeyError('smoothness')" in out
    assert "not measured: hyperparams at 8: RESOURCE_EXHAUSTED: no memory\n" in out
    found = json.loads(path.read_text())
    assert list(found) == ["hyperparams"]
    assert list(found["hyperparams"]) == ["1000"]
