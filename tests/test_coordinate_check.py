"""The coordinate check: its arithmetic, what passes it and what does not."""

import json

import jax
import numpy as np
import pytest

from cluster import cli, coordcheck
from evaluation import coordinate_check
from tasks.image_mlp import ImageMLP
from tasks.mlp import MLP

SMALL = "mlp(data='digits', batch_size=32)"


def run(tmp_path, name, model=SMALL, widths="32,128", **options):
    options = {
        "base_width": None, "standard": False, "steps": 4, "seeds": 16, "tolerance": 0.1,
        "learning_rate": 1e-3, **options,
    }  # fmt: skip
    passed = coordcheck.run(name, model, widths, directory=tmp_path, **options)
    found = json.loads((tmp_path / coordcheck.JSON).read_text())
    assert found["passed"] == passed
    return passed, {name: slopes[-1] for name, slopes in found["slopes_of_changes"].items()}, found


def test_slopes_of_power_laws():
    widths = (8, 16, 64)
    values = np.array([[3.0 * w**0.5, 2.0, w**-1.0, 0.0 if w == 8 else 1.0] for w in widths])
    slopes = coordinate_check.slopes(widths, values)
    np.testing.assert_allclose(slopes[:3], [0.5, 0.0, -1.0], atol=1e-12)
    assert np.isnan(slopes[3])


def test_the_steepest_hidden_layer_decides():
    widths = (8, 16, 32)
    power = lambda exponent: np.array([[1.0, float(w) ** exponent] for w in widths])  # noqa: E731
    changes = {"a": power(0.05), "b": power(-0.2), "logits": power(1.0)}
    hidden = {"a": True, "b": True, "logits": False}
    found = coordinate_check.Coordinates(widths, changes, hidden, {}, np.zeros((3, 2)))
    verdict = coordinate_check.judge(found, 0.1)
    assert verdict[:2] == (False, "b")
    assert verdict.slope == pytest.approx(-0.2)
    assert coordinate_check.judge(found, 0.25).passed
    changes["a"] = np.full((3, 2), np.nan)
    assert coordinate_check.judge(found, 0.25)[:2] == (False, "a")  # failure is never a pass


def test_adam_passes_under_mu_parametrization_and_fails_without(tmp_path):
    """Of theory: without, hidden changes grow with a power between a half and one, as do readouts'
    at the first step; updates of hidden matrices shrink as 1 / width with.
    """
    passed, _, found = run(tmp_path, "adam")
    assert passed
    assert found["slopes_of_updates"]["hidden/0/kernel"][-1] == pytest.approx(-1.0, abs=0.05)
    assert found["slopes_of_updates"]["input/kernel"][-1] == pytest.approx(0.0, abs=0.05)
    passed, slopes, found = run(tmp_path, "adam", standard=True)
    assert not passed
    assert 0.3 < slopes["hidden/1"] < 1.1
    assert found["slopes_of_updates"]["hidden/0/kernel"][-1] == pytest.approx(0.0, abs=0.1)


@pytest.mark.parametrize("standard", [False, True])
def test_small_fc_passes_under_mu_parametrization_and_fails_without(tmp_path, standard):
    passed, slopes, _ = run(tmp_path, "small_fc(hidden=4)", standard=standard)
    assert passed != standard
    assert standard == (slopes["hidden/1"] > 0.3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model"),
    [
        *(("adam", model) for model in ("mlp", "transformer", "vit", "resnet")),
        ("sgd", "mlp"), ("sgd", "resnet"), ("mulo", "mlp"), ("mulo", "vit"),
        ("mu_velo", "mlp"), ("mu_velo", "transformer"),
    ],
)  # fmt: skip
def test_every_model_passes_under_mu_parametrization(tmp_path, name, model):
    widths = "16,32,64" if model == "resnet" else "64,128,256"
    rate = {"adam": 1e-3, "sgd": 0.1}.get(name, 1.0)
    passed, slopes, _ = run(
        tmp_path, name, model, widths, seeds=5, steps=10, tolerance=0.15, learning_rate=rate
    )
    assert passed, slopes


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mlp", "transformer", "vit", "resnet"])
def test_every_model_fails_under_standard_parametrization(tmp_path, model):
    widths = "16,32,64" if model == "resnet" else "64,128,256"
    assert not run(tmp_path, "adam", model, widths, standard=True, steps=10)[0]


def test_the_command_writes_a_plot_and_says_by_its_exit_code(tmp_path, capsys):
    command = ["coordcheck", "adam", "--model", "mlp(data='digits',depth=2)", "--widths", "8,16"]
    common = [*command, "--steps", "3", "--seeds", "2", "--out-dir", str(tmp_path / "new")]
    cli.main([*common, "--tolerance", "5"])
    assert "pass: of the hidden layers" in capsys.readouterr().out
    assert (tmp_path / "new" / coordcheck.PLOT).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit) as ended:
        cli.main([*common, "--tolerance", "1e-9"])
    assert ended.value.code == 1
    assert "fail: of the hidden layers" in capsys.readouterr().out


@pytest.mark.slow
def test_the_control_runs_for_rules_that_mu_parametrization_refuses(tmp_path):
    """VeLO's own steps are relative to its params."""
    rule = "velo(lstm=4, bank=2)"
    found = run(tmp_path, rule, widths="8,16", standard=True, steps=2, seeds=1)[2]
    assert found["tolerance"] == 0.1
    assert len(found["changes"]["hidden/0"]) == 2
    with pytest.raises(ValueError, match="relative_steps=False"):
        run(tmp_path, rule)


def test_widths_may_go_on_as_they_began():
    assert coordcheck.parse_widths("64,128,...,1024") == [64, 128, 256, 512, 1024]
    assert coordcheck.parse_widths("8, 24") == [8, 24]
    lists = ("64", "64,32", "a,b", "8,16,...,100", "8,...,64", "0,8", "8,8,...,64", "0,8,...,16")
    for text in (*lists, "-8,-16,...,9"):
        with pytest.raises(ValueError, match="`widths` must be at least two growing numbers"):
            coordcheck.parse_widths(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adan_"}, "unknown rule, artifact or baseline 'adan_'; did you mean 'adan'"),
        ({"name": "velo"}, "relative_steps=False"),
        ({"model": "quadratic"}, "`model` quadratic has no `width` and `base_width`"),
        ({"model": "mpl"}, "unknown suite or task 'mpl'"),
        ({"model": "train/quick"}, "`model` train/quick has no `width`"),
        ({"steps": 1}, "`steps` must be at least 2"),
        ({"base_width": 0}, "`base_width` must be a positive integer, got 0"),
        ({"base_width": 8, "standard": True}, "leave it out with --standard"),
        ({"model": "transformer_lm(data='markov')", "base_width": 5}, "multiple of `heads`"),
        ({"tolerance": 0.0}, "`tolerance` must be positive"),
        ({"model": "transformer_lm(data='markov', heads=3)"}, "multiple of `heads`"),
    ],
)
def test_bad_input_is_told_before_any_work(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **{"name": "adam", **options})


def test_families_without_activations_are_refused():
    families = {width: ImageMLP("digits", hidden=(width,)) for width in (4, 8)}
    with pytest.raises(ValueError, match="activations"):
        coordinate_check.measure(
            families, lambda width: None, steps=1, seeds=1, key=jax.random.key(0)
        )
    with pytest.raises(ValueError, match="`widths` must be at least two"):
        coordinate_check.measure(
            {8: MLP("digits", 8)}, lambda width: None, steps=1, seeds=1, key=jax.random.key(0)
        )
