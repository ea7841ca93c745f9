"""The command line: help, bad input in one line before any work, kill -9 and resume, export,
evaluate.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from commands import run

import learned_opt
from cluster import cli, console, run_directory
from meta_train.recipes.base import Recipe

TINY = [
    *("--task", "quadratic(dimension=2)", "--rule", "small_fc(hidden=2)"),
    *("--estimator", "pes(particles=2)", "--horizon", "4", "8", "--truncation", "2"),
]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_complete_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert f"Example: learned-opt {command}" in out
    fields = cli.COMMANDS[command].__dataclass_fields__
    positional = {"name", "rules", "files"}
    for name in fields.keys() - {"settings"} - positional:
        assert f"--{name.replace('_', '-')}" in out
    if "settings" in fields:
        for name in fields["settings"].default.__dataclass_fields__:
            assert f"--{name.replace('_', '-')}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rule", "smal_fc"], "unknown rule 'smal_fc'; did you mean 'small_fc'? Known: "),
        (["--rule", "small_fc(width=3)"], "unknown field of rule small_fc 'width'"),
        (["--task", "image_mpl"], "did you mean 'image_mlp'?"),
        (["--task", "train/divers"], "did you mean 'train/diverse'?"),
        (["--task", "reparm(image_mlp())"], "did you mean 'reparam'?"),
        (["--time-budget", "-1"], "`time_budget` must be positive"),
        (["--task", "image_mlp(data='digts')"], "'digits'"),
        (["--estimator", "ness(particles=3)"], "unknown estimator 'ness'; did you mean 'nres'?"),
        (["--estimator", "nres(particles=0)"], "`particles` must be at least 1, got 0"),
        (["--estimator", "nres(particles=2)", "--workers", "3"], "`parts` must be between 1 and"),
        (["--horizon", "130", "130", "--truncation", "50"], "multiple of `truncation`, got 130"),
        (["--outer-steps", "0"], "`outer_steps` must be at least 1, got 0"),
        (["--workers", "-1"], "`workers` must be 0"),
        (["--address", "auto"], "`address` auto needs `workers` of at least 1"),
        (["--workers", "1", "--address", "127.0.0.1:1"], "no Ray cluster at `address` 127.0.0.1:1"),
        (["--recipe", "quikstart"], "did you mean 'quickstart'?"),
        (["--clip", "inf"], "`clip` must be positive"),
        (["--seed", "-1"], "`seed` must be at least 0"),
        (["--task", "conv_net(data='wine')"], "image"),
        (["--curriculum", "-1"], "`curriculum` must be at least 0"),
        (["--burn-in", "-1"], "`burn_in` must be at least 0, got -1"),
        (
            [
                *("--rule", "hyperparams", "--estimator", "nres(particles=1000000)"),
                *("--task", "image_mlp(data='digits', hidden=(1024,))"),
            ],
            "`particles` 1000000 need about",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(arguments, message, tmp_path, capsys):
    directory = tmp_path / "run"
    _, err = run("meta-train", "--run-dir", directory, *arguments, code=2, capsys=capsys)
    assert message in err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1
    assert not directory.exists()


def test_a_task_over_the_time_budget_says_its_predicted_cost(tmp_path, capsys):
    common = ["--time-budget", "1e-12"]
    for command in (
        ["evaluate", "--optimizer", "adam", "--suite", TINY[1], "--out-dir", tmp_path / "run"],
        ["meta-train", "--run-dir", tmp_path / "run", *TINY],
    ):
        err = run(*command, *common, code=2, capsys=capsys).err
        assert "`time_budget` of 1e-12 seconds per inner step leaves no task" in err
        assert re.search(r"predicted are quadratic\(dimension=2\) [0-9.e-]+ ms", err)
    assert not (tmp_path / "run").exists()


def test_tasks_lists_size_data_and_licence(capsys, monkeypatch):
    monkeypatch.setattr(console.console, "width", 150)
    out = run("tasks", "heldout/quick", capsys=capsys).out
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "conv_net" in rows["digits_conv"]
    assert "1,418" in rows["digits_conv"]
    assert "breast_cancer" in rows["breast_cancer_mlp"]
    assert "BSD-3-Clause" in rows["breast_cancer"]
    assert "never measured on this machine: add --measure" in out


def test_a_wrong_option_says_what_was_meant(capsys):
    err = run("meta-train", "--run-dir", "x", "--outer-step", "3", code=2, capsys=capsys)
    assert "--outer-steps" in err.err + err.out


def test_other_commands_refuse_bad_input(tmp_path, capsys):
    for arguments, message in (
        (["evaluate", "--optimizer", "nope"], "no artifact 'nope'"),
        (["evaluate", "--optimizer", "adam", "--suite", "heldout/quik"], "heldout/quick"),
        (["evaluate", "--optimizer", "adam", "--suite", "foo"], "heldout/quick"),
        (["evaluate", "--optimizer", "adam", "--steps", "0"], "`steps` must be at least 1"),
        (["evaluate", "--optimizer", "adam", "--baselines", "adm"], "adam"),
        (
            ["evaluate", "--optimizer", "adam", "--learning-rates", "0.1", "-1"],
            "`learning_rates` must be positive, finite and all different, got 0.1, -1",
        ),
        (
            ["evaluate", "--optimizer", "adam", "--learning-rates", "0.1"],
            "`learning_rates` tunes artifacts in `optimizer` and `cosine_baselines`, got neither",
        ),
        (
            ["evaluate", "--optimizer", "adam", "--cosine-baselines", "adamw"],
            "`cosine_baselines` needs `learning_rates`",
        ),
        (["report", "--run-dir", tmp_path], "holds no results.json"),
        (["export", "--run-dir", tmp_path, "--out", tmp_path / "a"], "holds no run"),
        (["show", "nope"], "no artifact 'nope'"),
        (["tasks", "heldout/smal"], "Did you mean 'heldout/small'"),
    ):
        err = run(*arguments, code=2, capsys=capsys).err
        assert message in err
        assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_show_lists_everything_and_reads_cards(tmp_path, capsys):
    out = run("show", capsys=capsys).out
    for name in ("small_fc", "image_mlp", "nres", "digits", "heldout/quick", "quickstart"):
        assert name in out
    rule = learned_opt.artifact.discovery.build(
        "rule", "small_fc", cli.discovery.members(learned_opt)
    )
    learned_opt.save(tmp_path / "a.safetensors", rule, rule.init(jax.random.key(0)), {"made": "so"})
    out = run("show", tmp_path / "a.safetensors", capsys=capsys).out
    assert "small_fc(hidden=4" in out
    assert '"made": "so"' in out


def start(directory, *arguments):
    command = [sys.executable, "-m", "cluster.cli", "meta-train", "--run-dir", str(directory)]
    return subprocess.Popen(
        [*command, *TINY, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_line(directory, count, process):
    deadline = time.monotonic() + 120
    while len(run_directory.read_metrics(directory)) < count:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.01)


def test_killed_interrupted_and_resumed_runs_end_bit_equal(tmp_path, capsys):
    options = ["--outer-steps", "2000", "--checkpoint-every", "400", "--burn-in", "3"]
    run("meta-train", "--run-dir", tmp_path / "whole", *TINY, *options)

    directory = tmp_path / "broken"
    process = start(directory, *options)
    wait_for_line(directory, 600, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (directory / "theta.safetensors").exists()

    process = start(directory, *options, "--resume")
    wait_for_line(directory, 900, process)
    # as a cluster stops a job; Ctrl-C takes the same path, but background jobs ignore SIGINT
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert f"--resume --run-dir {directory}" in out

    capsys.readouterr()
    out = run("meta-train", "--run-dir", directory, "--resume", capsys=capsys).out  # its own recipe
    assert "resuming at outer step" in out
    rules, thetas, cards = zip(
        *(learned_opt.read(tmp_path / name / "theta.safetensors") for name in ("whole", "broken")),
        strict=True,
    )
    assert rules[0] == rules[1]
    jax.tree.map(np.testing.assert_array_equal, *thetas)
    assert cards[0]["inner_steps"] == (3 + 2000) * 2 * 2 * 2
    whole, broken = (
        [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
        for lines in (run_directory.read_metrics(tmp_path / name) for name in ("whole", "broken"))
    )
    assert whole == broken
    assert [line["step"] for line in whole] == list(range(2000))
    for line in whole:
        assert {"loss", "grad_norm", "gradient_snr", "effective_sample_size"} < line.keys()
        assert 0 <= line["diverged"] <= 1
        assert len(line["loss_by_window"]) == 4

    assert list((directory / "tensorboard").glob("events.out.tfevents.*"))

    out = run("meta-train", "--run-dir", directory, "--resume", capsys=capsys).out
    assert "is finished" in out
    err = run("meta-train", "--run-dir", directory, *TINY, *options, code=2, capsys=capsys).err
    assert "exists and is not empty" in err
    err = run(
        *("meta-train", "--run-dir", directory, *TINY, "--outer-steps", "1000", "--resume"),
        code=2,
        capsys=capsys,
    ).err  # the default, but asked for
    assert "outer_steps: 2000 in the run, 1000 asked for" in err
    changed = [*TINY, "--rule", "hyperparams", "--resume"]
    err = run("meta-train", "--run-dir", directory, *changed, code=2, capsys=capsys).err
    assert "has another recipe" in err
    assert "hyperparams" in err

    run("export", "--run-dir", directory, "--out", tmp_path / "again.safetensors")
    _, theta, _ = learned_opt.read(tmp_path / "again.safetensors")
    jax.tree.map(np.testing.assert_array_equal, theta, thetas[0])


def test_something_that_is_no_run_is_not_resumed(tmp_path, capsys):
    (tmp_path / "precious").write_text("x")
    err = run("meta-train", "--run-dir", tmp_path, "--resume", code=2, capsys=capsys).err
    assert "holds no run" in err
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_evaluate_writes_results_and_a_report(tmp_path, capsys):
    rule = learned_opt.artifact.discovery.build(
        "rule", "small_fc", cli.discovery.members(learned_opt)
    )
    path = tmp_path / "mine.safetensors"
    learned_opt.save(path, rule, rule.init(jax.random.key(0)), {})
    arguments = ["--suite", "quadratic(dimension=2)", "--steps", "8", "--seeds", "2"]
    out = run(
        *("evaluate", "--optimizer", path, *arguments, "--baselines", "adam"),
        *("--learning-rates", "0.1", "1.0", "--cosine-baselines", "sgd"),
        *("--out-dir", tmp_path / "out"),
        capsys=capsys,
    ).out
    assert "mine" in out
    assert "adam" in out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["about"]["suite"] == "quadratic(dimension=2)"
    for row in ("mine", "sgd (0.1, 1; cosine)"):
        (chosen,) = results["rows"][row]["chosen"].values()
        assert chosen["learning_rate"] in (0.1, 1.0)
        assert chosen["at_edge"]
    report = tmp_path / "out" / "report.html"
    assert "<svg" in report.read_text()
    report.unlink()
    run("report", "--run-dir", tmp_path / "out")
    assert "Loss by inner step" not in report.read_text()

    # where a run is, its metrics are shown
    row = {"loss": 0.5, "effective_sample_size": 3.0, "loss_by_window": [0.6, None]}
    (tmp_path / "out" / "metrics.jsonl").write_text(json.dumps({"step": 0, **row}) + "\n")
    for objective, shown in (("mean", True), ("final", False)):
        recipe = Recipe(objective=objective)
        (tmp_path / "out" / "config.json").write_text(recipe.to_json())
        run("report", "--run-dir", tmp_path / "out")
        assert ("Loss by inner step" in report.read_text()) is shown
        assert "Effective sample size" in report.read_text()


def test_metrics_are_json_whatever_happens(tmp_path, monkeypatch):
    scalars = []

    class Events:
        def add_scalar(self, *values):
            scalars.append(values)

        def close(self):
            pass

    monkeypatch.setattr(run_directory, "event_writer", lambda directory: Events())
    log = run_directory.MetricsLog(tmp_path, 0)
    log.write(7, loss=math.nan, snr=math.inf, ok=1.5, nothing=None, windows=[0.5, None, math.nan])
    log.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    row = {"loss": None, "snr": None, "ok": 1.5, "nothing": None, "windows": [0.5, None, None]}
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 7, **row}
    assert scalars == [("ok", 1.5, 7)]


def test_a_run_without_workers_does_not_import_ray(tmp_path):
    arguments = ["meta-train", "--run-dir", str(tmp_path / "run"), *TINY, "--outer-steps", "2"]
    code = (
        f"import sys; from cluster import cli; cli.main({arguments}); "
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_one_process_at_a_time_in_a_run_directory(tmp_path, capsys):
    with run_directory.opened(tmp_path, Recipe(outer_steps=2)):
        err = run("meta-train", "--run-dir", tmp_path, "--resume", code=2, capsys=capsys).err
    assert "another process is at work in it" in err


def test_optimizers_of_one_name_are_refused(tmp_path, capsys):
    rule = cli.discovery.build("rule", "small_fc", cli.discovery.members(learned_opt))
    for name in ("a", "b"):
        learned_opt.save(tmp_path / name / "x.safetensors", rule, rule.init(jax.random.key(0)), {})
    paths = [str(tmp_path / name / "x.safetensors") for name in ("a", "b")]
    err = run("evaluate", "--optimizer", *paths, code=2, capsys=capsys).err
    assert "there is another called x" in err
