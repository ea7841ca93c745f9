"""The job that judges proximal optimizers on composite convex problems, set by set, by how near
they come to the least F.
"""

import dataclasses
import functools
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from cluster import named, run_directory
from cluster.console import console, progress
from evaluation import proximal, suboptimality, suboptimality_report
from evaluation.atomic import replacing
from evaluation.suboptimality import Instances, Summary
from evaluation.suboptimality_report import Comparison, Row
from learned_opt import artifact
from meta_train.recipes.base import families
from tasks.base import TaskFamily, classes, train_step
from tasks.composite import Composite

SCHEMA = 1  # raise it when the same inputs would give other numbers
PARTS, TABLES = "parts", "tables.md"
REFERENCES = ("fista_restart", "fista")  # that always run
TOLD_AT = (100, 1000)
TEST, TUNING = 1_000_003, 2_000_003  # seeds, to which `seed` is added


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much of everything; told in the report."""

    instances: int
    iterations: int
    tuning_instances: int
    tune_at: int
    seed: int

    def __post_init__(self) -> None:
        for name in ("instances", "iterations", "tuning_instances", "tune_at"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 1_000_000:
            raise ValueError(f"`seed` must be at least 0 and below a million, got {self.seed}")


@dataclasses.dataclass(frozen=True)
class Method:
    """What runs: `make` of each of `hypers`, stacked along their first axis; if its kind is tuned,
    the best of them.
    """

    kind: str
    make: suboptimality.Make
    hypers: Any
    note: str = ""


def run(names: Iterable[str], suite: str, budget: Budget, directory: Path) -> Path:
    """Judges optimizers by name on the families of a suite; prints the table, writes results.json,
    report.html and tables.md. What was judged before in the same directory is not judged again.

    Raises:
      ValueError, OSError: before any work, for unknown names, optimizers that need what such tasks
        do not give, and suites of other tasks.
    """
    names = list(dict.fromkeys([*names, *REFERENCES]))
    sets = families(suite)
    methods = _methods(names, budget.iterations)
    programs = _programs(suite, sets, methods)
    run_directory.check_writable("out_dir", directory / run_directory.RESULTS)
    found: dict[str, dict[str, Row]] = {}
    with progress("judging", len(sets) * len(methods)) as advance:
        for chosen, family in sets.items():
            found[chosen] = {}
            problems = _Problems(family, budget, directory / PARTS)
            for name, method in methods.items():
                found[chosen][name] = problems.judged(name, method, programs[chosen, name])
                advance(f"{name} on {chosen}")
    comparison = Comparison(_about(suite, methods, budget), found)
    return _write(comparison, directory)


def _write(found: Comparison, directory: Path) -> Path:
    """Returns the path of the report."""
    sets = {
        chosen: {name: row.plain() for name, row in rows.items()}
        for chosen, rows in found.sets.items()
    }
    plain = {"schema": SCHEMA, "about": found.about, "sets": sets}
    for name, text in (
        (run_directory.RESULTS, json.dumps(plain, allow_nan=False, separators=(",", ":"))),
        (TABLES, suboptimality_report.markdown(found)),
    ):
        with replacing(directory / name) as file:
            file.write(text.encode())
    path = directory / run_directory.REPORT
    suboptimality_report.render(found, path)
    console.print(suboptimality_report.table(found), soft_wrap=False)
    console.print(f"report: {path}")
    return path


def load(path: Path) -> Comparison:
    """What `run` wrote to results.json.

    Raises:
      ValueError: it is of another schema.
    """
    plain = json.loads(path.read_text())
    if plain.get("schema") != SCHEMA:
        raise ValueError(f"`path` {path} is of another version: judge again")
    sets = {
        chosen: {name: Row.of_plain(row) for name, row in rows.items()}
        for chosen, rows in plain["sets"].items()
    }
    return Comparison(plain["about"], sets)


def _methods(names: list[str], iterations: int) -> dict[str, Method]:
    """By what they are called in the report."""
    found: dict[str, Method] = {}
    for name in names:
        label, method = _method(name, iterations)
        if label in found:
            raise ValueError(f"`optimizer` {name}: there is another called {label}; rename it")
        found[label] = method
    return found


def _method(name: str, iterations: int) -> tuple[str, Method]:
    if name in proximal.REFERENCES:
        only = suboptimality.Only(proximal.REFERENCES[name]())
        return name, Method("reference", only, np.zeros(1))
    if name in proximal.GRIDS:
        return name, Method("tuned", *proximal.points(name))
    parts = [name] if "(" in name or Path(name).is_file() else name.split("+")
    known = [*proximal.REFERENCES, *proximal.GRIDS]
    rules, thetas = zip(*(named.find(part, known) for part in parts), strict=True)
    if any(rule != rules[0] for rule in rules):
        raise ValueError(f"`optimizer` {name}: only artifacts of one rule can be pooled")
    is_file = Path(parts[0]).is_file() or parts[0] in artifact.pretrained()
    label = "+".join(map(_label, parts)) if is_file else name
    hypers = jax.tree.map(lambda *leaves: np.stack(leaves), *thetas)
    note = f"{len(parts)} pooled" if len(parts) > 1 else "" if is_file else "not trained"
    # one object for all sets: they share a program where their shapes are the same
    make = functools.partial(rules[0].optimizer, horizon=iterations)
    return label, Method("contender", make, hypers, note)


def _label(name: str) -> str:
    """Pretrained optimizers go by their name, files by that of their run."""
    path = Path(name).resolve()
    return path.parent.name if path.name == run_directory.ARTIFACT else path.stem


def _programs(
    suite: str, sets: Mapping[str, TaskFamily], methods: Mapping[str, Method]
) -> dict[tuple[str, str], str]:
    """The text of a step of every method on every set; those of equal shapes are traced once."""
    traced: dict[tuple, str] = {}
    found = {}
    for chosen, family in sets.items():
        # the family is no argument: some hold what is no array
        task = jax.eval_shape(lambda family=family: family(jax.random.key(0)))
        if not isinstance(task, Composite):
            raise ValueError(
                f"`suite` {suite} has tasks that are not composite convex ones ({chosen}): take "
                "heldout/lasso, heldout/convex, or a family such as lasso(rows=20, columns=40)"
            )
        for name, method in methods.items():
            key = name, repr(task)
            if key not in traced:
                traced[key] = _program(name, method, task)
            found[chosen, name] = traced[key]
    return found


def _program(name: str, method: Method, shapes: Composite) -> str:
    """A step, traced, without theta.

    Raises:
      ValueError: as the optimizer; or it looks at nothing that tells of the penalty.
    """
    used = set()

    def seen(keyword: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any) -> Any:
            used.add(keyword)
            return function(*args)

        return wrapped

    def step(task: Composite, hypers: Any) -> Any:
        inner = method.make(jax.tree.map(lambda leaf: leaf[0], hypers))
        inner = optax.with_extra_args_support(inner)

        def update(updates, state, params=None, **extra_args):
            wrapped = {key: seen(key, extra_args[key]) for key in ("prox", "penalty")}
            return inner.update(updates, state, params, **{**extra_args, **wrapped})

        optimizer = optax.GradientTransformationExtraArgs(inner.init, update)
        params = task.init(jax.random.key(0))
        return train_step(task, optimizer, params, inner.init(params), ())

    try:
        program = str(jax.make_jaxpr(step)(shapes, method.hypers))
    except ValueError as error:
        raise ValueError(f"`optimizer` {name} cannot train such tasks: {error}") from error
    if not used:
        raise ValueError(
            f"`optimizer` {name} knows of neither `prox` nor `penalty`: it would minimise f alone; "
            "take a rule of composite losses, such as l2o_pa"
        )
    return re.sub(r" at 0x[0-9a-f]+", "", program)  # functions print their address


class _Problems:
    """The instances of a family, and what was judged on them; made and solved when they are
    needed, and kept in `directory`.
    """

    def __init__(self, family: TaskFamily, budget: Budget, directory: Path):
        self._family, self._budget, self._directory = family, budget, directory
        self._tasks = suboptimality.generate(family, budget.instances, TEST + budget.seed)
        self._digest = _task_digest(self._tasks)

    @functools.cached_property
    def _test(self) -> Instances:
        return self._solved(self._tasks, self._digest)

    @functools.cached_property
    def _tuning(self) -> Instances:
        budget = self._budget
        tasks = suboptimality.generate(self._family, budget.tuning_instances, TUNING + budget.seed)
        return self._solved(tasks, _task_digest(tasks))

    def _solved(self, tasks: Composite, digest: str) -> Instances:
        least = self._kept(
            ("optima", digest), lambda: {"optima": suboptimality.solved(tasks).tolist()}
        )
        return Instances(tasks, np.array(least["optima"]))

    def judged(self, name: str, method: Method, program: str) -> Row:
        what = (self._digest, self._budget, name, program, _digest(jax.tree.leaves(method.hypers)))
        return Row.of_plain(self._kept(what, lambda: self._judge(name, method).plain()))

    def _judge(self, name: str, method: Method) -> Row:
        iterations, note = self._budget.iterations, method.note
        if method.kind == "tuned":
            best = proximal.tuned(name, self._tuning, self._budget.tune_at)
            curves = suboptimality.run(best.optimizer, self._test, iterations, both=True)
            note = ", ".join(
                f"{key} {value:.3g}{'*' * (key in best.at_edge)}"
                for key, value in best.chosen.items()
            )
        else:
            curves = suboptimality.run_all(
                method.make, method.hypers, self._test, iterations, both=True
            )
        at = [k for k in TOLD_AT if k <= iterations] or [iterations]
        summaries = [None if each is None else suboptimality.summarize(each, at) for each in curves]
        assert isinstance(summaries[0], Summary)
        return Row(method.kind, summaries[0], summaries[1], note)

    def _kept(self, what: tuple, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A JSON file by all that determines it."""
        text = repr((SCHEMA, jax.__version__, optax.__version__, *what))
        path = self._directory / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):  # it is not there, or damaged
            found = compute()
        with replacing(path) as file:
            file.write(json.dumps(found, allow_nan=False).encode())
        return found


def _task_digest(tasks: Composite) -> str:
    return _digest([*jax.tree.leaves(tasks), repr(classes(tasks))])


def _digest(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode())
        else:
            array = np.asarray(part)
            digest.update(f"{array.shape}{array.dtype}".encode() + array.tobytes())
    return digest.hexdigest()


def _about(suite: str, methods: Mapping[str, Method], budget: Budget) -> dict[str, Any]:
    tuned = [name for name, method in methods.items() if method.kind == "tuned"]
    text = (
        f"{budget.instances} instances per set (seed {budget.seed}), {budget.iterations} "
        "iterations from 0, in float64; F* by an independent solver with a certified gap."
    )
    if tuned:
        text += (
            f" {', '.join(tuned)}: tuned for every set on {budget.tuning_instances} other "
            "instances, to the least geometric mean of relative suboptimality at iteration "
            f"{budget.tune_at}; * marks the edge of a grid."
        )
    versions = f"jax {jax.__version__}, optax {optax.__version__}"
    text += f" Judged on {time.strftime('%Y-%m-%d')}, {jax.devices()[0].device_kind}, {versions}."
    title = f"Proximal optimizers on {suite}"
    return {"title": title, "text": text, "iterations": budget.iterations, "suite": suite}
