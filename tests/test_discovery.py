"""Specs: one line of text per member, parsed and never evaluated."""

import dataclasses
import sys
import types

import pytest

import learned_opt
from learned_opt import discovery
from learned_opt.hyperparams import Hyperparams
from learned_opt.small_fc import SmallFC


@dataclasses.dataclass(frozen=True)
class MLPTask:
    width: int
    scales: tuple[float, ...] = (1.0,)


@dataclasses.dataclass(frozen=True)
class Reparametrised:
    inner: MLPTask
    level: str = "global"


KNOWN = {"mlp_task": MLPTask, "reparametrised": Reparametrised}


def build(spec):
    return discovery.build("task", spec, KNOWN)


@pytest.mark.parametrize(
    ("name", "want"),
    [("SmallFC", "small_fc"), ("MLPTask", "mlp_task"), ("Celo2", "celo2"), ("PES", "pes")],
)
def test_name_of(name, want):
    assert discovery.name_of(type(name, (), {})) == want


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        ("mlp_task(8)", MLPTask(8)),
        ("  mlp_task( width = 8 , )  ", MLPTask(8)),
        ("mlp_task(-8, (1.0, 2e-3))", MLPTask(-8, (1.0, 2e-3))),
        ("reparametrised(mlp_task(2))", Reparametrised(MLPTask(2))),
        (
            "reparametrised(level='tensor', inner=mlp_task(width=2, scales=()))",
            Reparametrised(MLPTask(2, ()), "tensor"),
        ),
    ],
)
def test_build(spec, want):
    assert build(spec) == want
    assert build(discovery.spec_of(want)) == want


def test_a_bare_name_is_the_default():
    members = discovery.members(learned_opt)
    assert discovery.build("rule", "small_fc", members) == SmallFC()
    assert discovery.build("rule", "hyperparams(16)", members) == Hyperparams(knots=16)


def test_spec_writes_every_field():
    want = "reparametrised(inner=mlp_task(width=3, scales=(1.0,)), level='it\\'s')"
    spec = discovery.spec_of(Reparametrised(MLPTask(3), "it's"))
    assert spec == want.replace("'it\\'s'", '"it\'s"')


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "`task` '' does not parse.*Write name\\(field=value"),
        ("mlp_task(8", "does not parse"),
        ("mlp_task(width 8)", "does not parse"),
        ("mlp_task\0", "does not parse"),
        ("mlp_task(8); mlp_task(9)", "does not parse"),
        ("x = 3", "does not parse"),
        ("-" * 100_000 + "1", "`task` is nested too deeply"),
        ("a" + ".b" * 100_000, "`task` is nested too deeply"),
        ("'mlp_task'", "is not of the form name"),
        ("mlp_task(8)(9)", "is not of the form name"),
        ("mlp_task.mro()", "is not of the form name"),
        ("mlptask(8)", r"unknown task 'mlptask'; did you mean 'mlp_task'\? Known: mlp_task, repar"),
        ("zzz", r"unknown task 'zzz'\. Known: mlp_task, reparametrised\.$"),
        (
            "mlp_task(widht=8)",
            r"unknown field of task mlp_task 'widht'; did you mean 'width'\? Known: scales, width",
        ),
        ("reparametrised(mlp_task(widht=8))", "did you mean 'width'"),
        ("reparametrised(mlp_tsk(8))", "did you mean 'mlp_task'"),
        ("mlp_task(1, (), 3)", "`task` mlp_task takes at most 2 fields, got 3"),
        ("mlp_task(1, width=2)", "`task` mlp_task got the field 'width' twice"),
        ("mlp_task(width=1, width=2)", "`task` mlp_task got the field 'width' twice"),
        ("mlp_task(**{'width': 2})", "must name its fields"),
        ("mlp_task(*[2])", "neither a literal nor"),
        ("mlp_task()", "`task` mlp_task cannot be made of .*missing.*'width'"),
        ("mlp_task(1 + 1)", "'1 \\+ 1' is neither a literal nor"),
        ("mlp_task(width)", "'width' is neither a literal nor"),
        ("mlp_task({[]: 1})", "is neither a literal nor"),
    ],
)
def test_errors(spec, message):
    with pytest.raises(ValueError, match=message):
        build(spec)


def test_wrong_field_values_name_the_member():
    members = discovery.members(learned_opt)
    with pytest.raises(ValueError, match=r"`rule` hyperparams cannot be made of .*'four'"):
        discovery.build("rule", "hyperparams(knots='four')", members)
    with pytest.raises(ValueError, match="`knots` must be at least 2, got 1"):
        discovery.build("rule", "hyperparams(knots=1)", members)


@pytest.mark.parametrize(
    "spec",
    [
        "__import__('os').system('touch {}')",
        "mlp_task(__import__('os').system('touch {}'))",
        "mlp_task(open('{}', 'w'))",
        "mlp_task(width=[open('{}', 'w') for _ in 'x'])",
        'mlp_task(width=f\'{{open("{}", "w")}}\')',
        "mlp_task(width=(lambda: open('{}', 'w'))())",
        "open('{}', 'w')",
        "exec(\"open('{}', 'w')\")",
    ],
)
def test_nothing_is_evaluated(spec, tmp_path):
    target = tmp_path / "evaluated"
    with pytest.raises(ValueError, match=r"not of the form|neither a literal|unknown task"):
        build(spec.format(target))
    assert not target.exists()


def test_a_new_file_with_examples_is_found(tmp_path, monkeypatch):
    (tmp_path / "some_rule.py").write_text(
        "import dataclasses\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class SomeRule:\n"
        "    size: int = 1\n"
        "EXAMPLES = (SomeRule(2), SomeRule(3))\n"
    )
    (tmp_path / "nothing.py").write_text("")
    package = types.ModuleType("package_for_discovery")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    assert [example.size for example in discovery.examples(package)] == [2, 3]
    members = discovery.members(package)
    assert list(members) == ["some_rule"]
    assert discovery.build("rule", "some_rule(size=5)", members).size == 5


def test_members_of_learned_opt():
    members = discovery.members(learned_opt)
    assert members["small_fc"] is SmallFC
    assert members["hyperparams"] is Hyperparams
