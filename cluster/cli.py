"""The command line. Each command is a dataclass: its fields are options, its `run` the work."""

import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from cluster.console import console
from cluster.devices import one_per_core
from learned_opt import discovery
from meta_train.recipes.base import Recipe, known
from meta_train.search.recipe import SearchRecipe
from tasks.data import cache_directory

DEFAULT, SEARCH = Recipe(), SearchRecipe()


def recipes() -> dict[str, Recipe]:
    """Recipes by name, with that of an option's defaults."""
    return {"default": DEFAULT, **known()}


@dataclasses.dataclass(frozen=True)
class MetaTrain:
    """Meta-train an update rule and export it as an optax optimizer.

    The run directory gets config.json, metrics.jsonl, checkpoints/ and theta.safetensors; with
    --select-on thetas/ and selection.json, and first/ where --start names a recipe. Ctrl-C
    checkpoints; the same command with --resume goes on from there and ends as if it had never
    stopped.

    Example: learned-opt meta-train --run-dir runs/mine --rule "small_fc(hidden=8)" --workers 2
    """

    run_dir: Path
    """Directory of the run: new, empty, or with --resume."""
    recipe: str = "default"
    """Recipe that supplies the defaults of the options below; `learned-opt show` lists them."""
    settings: Annotated[Recipe, tyro.conf.arg(name="")] = DEFAULT
    workers: int = 0
    """Ray workers of one core each; 0 runs in this process, on all its cores, without Ray."""
    address: str | None = None
    """Ray cluster to join, "auto" or host:port; None starts the workers on this machine."""
    checkpoint_every: int = 100
    """Outer steps between checkpoints."""
    time_budget: float | None = None
    """Leave out tasks of a suite whose inner step is predicted to take more seconds than this."""
    resume: bool = False
    """Go on with the run in --run-dir, by the recipe it was started with."""

    def run(self) -> None:
        from cluster import jobs

        path = jobs.run(
            self.settings,
            self.run_dir,
            workers=self.workers,
            address=self.address,
            resume=self.resume,
            checkpoint_every=self.checkpoint_every,
            time_budget=self.time_budget,
        )
        console.print(
            f"exported {path}\n"
            f"judge it: learned-opt evaluate --optimizer {path} --out-dir {self.run_dir}"
        )


@dataclasses.dataclass(frozen=True)
class Search:
    """Search for an optimizer as a program: from AdamW, one changed statement after another.

    The run directory gets config.json, journal.jsonl, metrics.jsonl, best.py, theta.safetensors and
    report.html. The same command with --resume goes on where the last checkpoint was, and ends as
    if it had never stopped.

    Example: learned-opt search --run-dir runs/found --evaluated 25000 --workers 2
    """

    run_dir: Path
    """Directory of the run: new, empty, or with --resume."""
    settings: Annotated[SearchRecipe, tyro.conf.arg(name="")] = SEARCH
    workers: int = 0
    """Ray workers of one core each; 0 runs in this process, without Ray."""
    address: str | None = None
    """Ray cluster to join, "auto" or host:port; None starts the workers on this machine."""
    asynchronous: bool = False
    """Let no worker wait for another: for clusters. The result then depends on their timing."""
    resume: bool = False
    """Go on with the run in --run-dir, by the recipe it was started with."""

    def run(self) -> None:
        from cluster import search

        path = search.run(
            self.settings,
            self.run_dir,
            workers=self.workers,
            address=self.address,
            resume=self.resume,
            asynchronous=self.asynchronous,
        )
        console.print(
            f"exported {path}\n"
            f"judge it: learned-opt evaluate --optimizer {path} --out-dir {self.run_dir}/evaluation"
        )


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Judge optimizers on held-out tasks beside baselines tuned for each task.

    Writes results.json and report.html. The tuning of baselines is cached on disk, baseline by
    baseline: the same command goes on from there, be it after Ctrl-C or with other optimizers.

    Example: learned-opt evaluate --optimizer runs/mine/theta.safetensors --out-dir runs/mine
    """

    optimizer: tuple[str, ...]
    """Artifacts (files or names of pretrained optimizers) and baselines ("lion")."""
    suite: str = "heldout/quick"
    """Suite of tasks, or one task family with its fields, e.g. "quadratic(dimension=20)"."""
    steps: int = 500
    """Training steps of every run; the horizon that optimizers are told."""
    seeds: int = 5
    """Runs of every optimizer on every task."""
    baselines: tuple[str, ...] = ("baselines/quick",)
    """Baselines to tune and compare with. Adam always is."""
    learning_rates: tuple[float, ...] = ()
    """Tune artifacts per task over these, too, each multiplying their updates and falling to zero
    by a cosine; without any, artifacts run as they are."""
    cosine_baselines: tuple[str, ...] = ()
    """Baselines to tune, in addition, over just --learning-rates with the cosine schedule."""
    out_dir: Path = Path("runs/evaluate")
    """Directory for results.json and report.html."""
    time_budget: float | None = None
    """Leave out tasks whose inner step is predicted to take more seconds than this."""
    workers: int = 0
    """Ray workers of one core each; 0 runs in this process, on all its cores, without Ray."""
    address: str | None = None
    """Ray cluster to join, "auto" or host:port; None starts the workers on this machine."""

    def run(self) -> None:
        from cluster.evaluate import evaluate

        evaluate(
            self.optimizer,
            self.suite,
            self.steps,
            self.seeds,
            self.baselines,
            self.out_dir,
            workers=self.workers,
            address=self.address,
            time_budget=self.time_budget,
            learning_rates=self.learning_rates,
            cosine_baselines=self.cosine_baselines,
        )


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """Meta-train on 8x8 digits, export, and compare with tuned baselines on held-out tasks.

    Example: learned-opt quickstart
    """

    run_dir: Path = Path("runs/quickstart")
    """Directory of the run: new, empty, or with --resume."""
    workers: int = 0
    """Ray workers of one core each; 0 runs in this process, on all its cores, without Ray."""
    seeds: int = 5
    """Runs of every optimizer on every held-out task."""
    resume: bool = False
    """Go on with the run in --run-dir."""

    def run(self) -> None:
        from cluster import jobs
        from cluster.evaluate import evaluate

        recipe = recipes()["quickstart"]
        path = jobs.run(recipe, self.run_dir, workers=self.workers, resume=self.resume)
        evaluate((str(path),), "heldout/quick", 500, self.seeds, ("baselines/quick",), self.run_dir)


@dataclasses.dataclass(frozen=True)
class Report:
    """Write report.html anew from the results.json and metrics.jsonl of a directory.

    Example: learned-opt report --run-dir runs/mine
    """

    run_dir: Path
    """Directory with a results.json."""

    def run(self) -> None:
        from cluster.evaluate import report

        console.print(f"wrote {report(self.run_dir)}")


@dataclasses.dataclass(frozen=True)
class Cost:
    """Measure what an update of each rule costs: its time as a ratio to optax.adam's, its memory,
    its compilation, and the least bytes and FLOPs it could do with.

    Example: learned-opt cost small_fc "small_fc(hidden=32)" --params 1e6,1e7 --json cost.json
    """

    rules: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Rules, with or without fields, and artifacts (files or names); without any, every rule."""
    params: str = "1e6,1e7"
    """Parameter counts to measure at, separated by commas."""
    seconds: float = 10.0
    """Time to spend on each rule at each count, compilation apart."""
    json: Path | None = None
    """File to write the figures to."""

    def run(self) -> None:
        from cluster import cost

        cost.run(self.rules, self.params, self.seconds, self.json)


@dataclasses.dataclass(frozen=True)
class Coordcheck:
    """Check that an optimizer moves the activations of wide networks as it moves those of narrow
    ones: the coordinate check of mu-parametrization. Exit code 1 says that it failed.

    Example: learned-opt coordcheck mulo --model transformer --widths 64,128,...,512
    """

    name: Annotated[str, tyro.conf.Positional]
    """A rule, with or without fields, an artifact (file or name) or a baseline ("adam")."""
    model: str = "mlp"
    """mlp, transformer, vit or resnet, or a task family with `width` and `base_width` and its
    fields, e.g. "mlp(data='digits', depth=6)"."""
    widths: str = "64,128,256,512"
    """Widths, separated by commas; 64,128,...,2048 goes on as it began."""
    base_width: int | None = None
    """Width at which nothing is scaled; without it, the first of the widths."""
    standard: bool = False
    """Leave network and optimizer under standard parametrization: the control, which fails."""
    steps: int = 10
    """Training steps; what is judged is the last."""
    seeds: int = 5
    """Networks of every width."""
    tolerance: float = 0.1
    """Steepest slope of log2 change over log2 width that passes, of hidden layers."""
    learning_rate: float = 1e-3
    """Learning rate of a baseline."""
    out_dir: Path = Path("runs/coordcheck")
    """Directory for coordcheck.json and coordcheck.png."""

    def run(self) -> None:
        from cluster import coordcheck

        passed = coordcheck.run(
            self.name,
            self.model,
            self.widths,
            self.base_width,
            self.standard,
            self.steps,
            self.seeds,
            self.tolerance,
            self.learning_rate,
            self.out_dir,
        )
        if not passed:
            sys.exit(1)


@dataclasses.dataclass(frozen=True)
class Convex:
    """Judge proximal optimizers on composite convex problems: by how near they come to the least F,
    relative to it, beside FISTA with and without restarts.

    Writes results.json, report.html and tables.md. What was judged is kept: the same command goes
    on from there, be it after Ctrl-C or with other optimizers.

    Example: learned-opt convex --optimizer runs/pa/theta.safetensors constant --suite heldout/lasso
    """

    optimizer: tuple[str, ...]
    """Artifacts (files or names; a+b+c pools those of several training seeds), rules with or
    without fields, which are not trained, and ista, fista, fista_restart, fista_curvature,
    constant, prox_adam, subgradient_adam, the last three tuned for every set."""
    suite: str = "heldout/lasso"
    """Suite of composite tasks, or one family with its fields, e.g. "lasso(rows=25)"."""
    instances: int = 256
    """Problems of every set."""
    iterations: int = 1000
    """Iterations of every run; the horizon that optimizers are told."""
    tuning_instances: int = 32
    """Other problems of every set, by which baselines are tuned."""
    tune_at: int = 100
    """Iteration at which their suboptimality is judged in tuning."""
    seed: int = 0
    """Seed of the problems."""
    out_dir: Path = Path("runs/convex")
    """Directory for results.json, report.html and tables.md."""

    def run(self) -> None:
        from cluster import convex

        budget = convex.Budget(
            self.instances, self.iterations, self.tuning_instances, self.tune_at, self.seed
        )
        convex.run(self.optimizer, self.suite, budget, self.out_dir)


@dataclasses.dataclass(frozen=True)
class Convert:
    """Turn published weights (flax msgpack `theta.state`, PyLO safetensors) into an artifact.

    Example: learned-opt convert theta.state --rule celo --out celo.safetensors
    """

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files of one set of weights; PyLO's VeLO has two."""
    rule: str
    """Rule they belong to; without fields as published, with the sizes that the weights have."""
    out: Path
    """Where to write the artifact."""
    licence: str | None = None
    """Licence of the weights, for the card."""

    def run(self) -> None:
        from cluster import jobs

        console.print(f"wrote {jobs.convert(self.files, self.rule, self.licence, self.out)}")


@dataclasses.dataclass(frozen=True)
class Export:
    """Export the newest checkpoint of a run, finished or not.

    Example: learned-opt export --run-dir runs/mine --out mine.safetensors
    """

    run_dir: Path
    """Directory of the run."""
    out: Path
    """The artifact to write."""

    def run(self) -> None:
        from cluster import jobs

        console.print(f"exported {jobs.export_latest(self.run_dir, self.out)}")


@dataclasses.dataclass(frozen=True)
class Card:
    """Write scores and known failures into the card of an artifact; its rule and theta stay.

    What is given replaces what the card says of it, and the rest of the card stays.

    Example: learned-opt card runs/mine/theta.safetensors --results runs/mine/results.json
        --failure "Diverges on convex problems." --out mine.safetensors
    """

    name: Annotated[str, tyro.conf.Positional]
    """A .safetensors file or the name of a pretrained optimizer."""
    results: tuple[Path, ...] = ()
    """Files that `learned-opt evaluate` wrote, with a row of this artifact."""
    failure: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """What it is known to fail at; may be repeated."""
    other_seeds: tuple[Path, ...] = ()
    """Artifacts of the same recipe from other seeds: the card then says how scores vary."""
    out: Path | None = None
    """Where to write the artifact; without it, in its place."""

    def run(self) -> None:
        from cluster import card

        path = card.write(self.name, self.results, self.failure, self.out, self.other_seeds)
        console.print(f"wrote {path}")


@dataclasses.dataclass(frozen=True)
class Tasks:
    """List the tasks of the suites with their size, cost on this machine, data and licence.

    Example: learned-opt tasks heldout/small --measure
    """

    name: Annotated[str | None, tyro.conf.Positional] = None
    """A suite; without it, all."""
    measure: bool = False
    """Measure what was never measured on this machine, some seconds for each task."""

    def run(self) -> None:
        from cluster import task_table

        task_table.show(self.name, self.measure)


@dataclasses.dataclass(frozen=True)
class Show:
    """Show an artifact's rule and card; without a name, list all that exists.

    Example: learned-opt show small_fc-digits
    """

    name: Annotated[str | None, tyro.conf.Positional] = None
    """A .safetensors file or the name of a pretrained optimizer."""

    def run(self) -> None:
        from cluster import catalogue

        catalogue.show(self.name)


COMMANDS = {
    "quickstart": Quickstart,
    "meta-train": MetaTrain,
    "search": Search,
    "evaluate": Evaluate,
    "report": Report,
    "cost": Cost,
    "coordcheck": Coordcheck,
    "convex": Convex,
    "convert": Convert,
    "export": Export,
    "card": Card,
    "tasks": Tasks,
    "show": Show,
}


def _parser(arguments: list[str]) -> Any:
    """The union of the commands. A recipe that is asked for supplies the defaults, also in help."""
    known = recipes()
    name = "default"
    for flag, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if flag == "--recipe":
            name = following
        elif flag.startswith("--recipe="):
            name = flag.removeprefix("--recipe=")
    if name not in known:
        raise ValueError(discovery.unknown("recipe", name, list(known)))
    defaults = {"meta-train": MetaTrain(run_dir=tyro.MISSING, recipe=name, settings=known[name])}
    union: Any = None
    for command, cls in COMMANDS.items():
        options = {"default": defaults[command]} if command in defaults else {}
        member = Annotated[cls, tyro.conf.subcommand(command, prefix_name=False, **options)]
        union = member if union is None else union | member
    return union


def _asks_for_recipe(arguments: list[str], kind: type) -> bool:
    """Whether an option says what to do, rather than where and how."""
    fields = [field.name.replace("_", "-") for field in dataclasses.fields(kind)]
    flags = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    return bool(flags & {f"--{no}{name}" for name in ("recipe", *fields) for no in ("", "no-")})


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Bad input ends with one line and exit code 2, an interrupt with 130."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # SIGTERM is how clusters stop jobs: checkpoint as for Ctrl-C
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    one_per_core()
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "jax"))
    command = None
    try:
        command = tyro.cli(
            _parser(arguments),
            prog="learned-opt",
            description="Meta-train, export and judge learned optimizers.",
            args=arguments,
        )
        resumes = isinstance(command, MetaTrain | Search) and command.resume
        if resumes and not _asks_for_recipe(arguments, type(command.settings)):
            command = dataclasses.replace(command, settings=None)  # that of the run
        command.run()
    except KeyboardInterrupt:
        hint = ""
        if isinstance(command, Search):
            hint = f" The last checkpoint is kept; go on with --resume --run-dir {command.run_dir}."
        if isinstance(command, (MetaTrain, Quickstart)):
            where = command.run_dir
            hint = f" The last complete step is kept; go on with --resume --run-dir {where}."
        if isinstance(command, Evaluate):
            hint = " Baselines that were tuned are kept; the same command goes on from there."
        if isinstance(command, Convex):
            hint = " What was judged is kept; the same command goes on from there."
        print(f"\nstopped.{hint}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, TypeError, OSError) as error:
        if os.environ.get("LEARNED_OPT_TRACEBACK"):
            raise
        notes = [n for n in getattr(error, "__notes__", ()) if n.startswith("This is of")]
        print("error:", error, *notes, file=sys.stderr)  # LEARNED_OPT_TRACEBACK=1 shows from where
        sys.exit(2)


if __name__ == "__main__":
    main()
