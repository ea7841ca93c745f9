"""The search of programs: changes that reach Lion from AdamW, an evolution that is the same whoever
tries its programs and however often it is interrupted, and trials that are ordinary training.
"""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from learned_opt.symbolic import PROGRAMS, ProgramError, Symbolic, execution, parse
from learned_opt.symbolic.analysis import Kind, check, cost, simplified
from learned_opt.symbolic.functional import functional_hash
from learned_opt.symbolic.operators import OPERATORS
from meta_train.recipes.base import families
from meta_train.search import funnel, journal, mutation
from meta_train.search.behaviour import behaviour
from meta_train.search.evaluator import Local, try_all
from meta_train.search.evolution import Search, scaled_rate
from meta_train.search.mutation import Mutation, Mutator, apply
from meta_train.search.proxies import Proxies, Runs, score
from meta_train.search.recipe import SearchRecipe
from meta_train.search.simplification import round_constant, simplify
from tasks.base import behind, train_step

BODY = "def train(w, g, m, v, lr):\n    {}\n    return update, m, v\n"
SMALL = Proxies("tabular_mlp(data='synthetic_table', hidden=(4,), batch_size=16)", steps=60)


class Quadratic:
    """An evaluator without jax: the loss that float64 numpy reaches in 20 steps on a quadratic
    whose axes are not those of the params. `backwards`: what is done last is told first.
    """

    slots = 2

    def __init__(self, backwards=False):
        self.backwards, self.waiting, self.tried = backwards, [], 0

    def submit(self, ticket, program, proxies):
        del proxies
        self.waiting.append((ticket, program))

    def collect(self):
        ticket, program = self.waiting.pop(-1 if self.backwards else 0)
        self.tried += 1
        return [(ticket, self.losses(program))]

    def losses(self, program):
        program = simplified(program)
        axes = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
        hessian = (axes * np.geomspace(1.0, 1e-3, 6)) @ axes.T
        w, zero = 3.0 * np.ones((1, 6)), np.zeros((1, 6))
        untrained = np.sum(w @ hessian * w)
        states = {"m": zero, "v": zero}
        with np.errstate(all="ignore"):
            for t in range(20):
                inputs = {"w": w, "g": w @ hessian, "lr": np.full((1, 1), 1 - t / 20), **states}
                outputs = execution.run(program, execution.Flat((6,)), inputs)
                w = w - outputs["update"]
                states = {name: outputs[name] for name in ("m", "v")}
            loss = np.sum(w @ hessian * w) / untrained
        return np.array([min(2.0, loss) if np.isfinite(loss) else 2.0])


# changes


def test_changes_are_valid_and_of_every_kind():
    random, program, seen = np.random.default_rng(0), PROGRAMS["adamw"], set()
    for _ in range(600):
        change, failed = Mutator(15)(program, random)
        program = apply(program, change)
        check(program)
        assert len(program.statements) <= 15
        assert failed < mutation.ATTEMPTS
        seen.add(change.change)
    assert seen == {"insert", "delete", "modify"}


def test_constants_alone():
    random, start = np.random.default_rng(0), PROGRAMS["adamw"]
    program = start
    for _ in range(200):
        program = apply(program, Mutator(only_constants=True)(program, random)[0])
    same = [
        (a.target, a.operator, [x for x in a.arguments if isinstance(x, str)])
        == (b.target, b.operator, [x for x in b.arguments if isinstance(x, str)])
        for a, b in zip(start.statements, program.statements, strict=True)
    ]
    assert all(same)
    assert not set(execution.places(start)) & set(execution.places(program))
    with pytest.raises(ProgramError, match="no valid change"):
        Mutator(only_constants=True)(parse(BODY.format("update = g * lr")), random)


def test_every_step_of_a_path_from_adamw_to_lion_is_open():
    """Each is one of the mutator's changes, with every choice among those it draws from; the
    constants, which are drawn from a continuum, apart.
    """
    program = PROGRAMS["adamw"]
    path = [
        Mutation("insert", 1, statement("c = interpolate(g, m, 0.9)")),
        Mutation("modify", 2, statement("m = interpolate(g, m, 0.99)")),
        Mutation("insert", 6, statement("update = sign(c)")),
        Mutation("delete", 5, None),  # update = m / sqrt_v
        Mutation("delete", 4, None),  # sqrt_v
        Mutation("delete", 3, None),  # v
        Mutation("delete", 0, None),  # g2
        Mutation("modify", 5, statement("lr = lr * 0.0003")),
    ]
    for change in path:
        assert_open(program, change)
        program = apply(program, change)
        check(program)
    assert functional_hash(program) == functional_hash(PROGRAMS["lion"])


def statement(text):
    return parse(BODY.format(text)).statements[0]


def assert_open(program, change):
    if change.change == "delete":
        assert 0 <= change.index < len(program.statements)
        return
    scope = mutation.scope(program, change.index)
    new = change.statement
    assert new.operator in OPERATORS
    for position, argument in enumerate(new.arguments):
        if isinstance(argument, str):
            assert argument in mutation.admissible(new.operator, position, scope)
    if change.change == "modify":
        old = program.statements[change.index]
        assert (old.target, old.operator) == (new.target, new.operator)
        assert sum(a != b for a, b in zip(old.arguments, new.arguments, strict=True)) == 1
    else:
        fresh = [n for n in mutation.targets(scope) if n not in scope and n != "update"]
        known = new.target in mutation.targets(scope)
        assert known or len(fresh) == 1  # a new variable, whatever its name


def test_scalars_where_scalars_must_be():
    scope = mutation.scope(PROGRAMS["adamw"], 8)
    assert scope["lr"] == Kind.SCALAR
    assert mutation.admissible("interpolate", 2, scope) == ["lr"]
    assert "g2" in mutation.admissible("interpolate", 1, scope)


# evolution

RECIPE = SearchRecipe(
    tasks=SMALL.tasks, evaluated=400, population=20, tournament=3, batch=8, patience=120,
    most_statements=14,
)  # fmt: skip


def evolve(recipe, evaluator, born=None, rounds=10**6):
    search = Search(recipe, (lambda x: None) if born is None else born.append)
    search.begin(evaluator)
    while not search.done and rounds:
        search.round(evaluator)
        rounds -= 1
    return search


def test_evolution_finds_better_programs_than_it_starts_from():
    """On a quadratic that the numpy evaluator trains: more than its tuned learning rate gives."""
    born = []
    search = evolve(RECIPE, evaluator := Quadratic(), born)
    assert search.best.fitness < -0.2
    assert search.counts["evaluated"] == evaluator.tried - 17 == 400
    first, again = (evaluator.losses(x.program) for x in (search.first, search.best))
    np.testing.assert_allclose(np.log(np.maximum(again, 1e-3) / first).mean(), search.best.fitness)
    known = {b.how for b in born}
    assert known >= {"start", "evaluated", "structural", "functional"}
    # who takes over a fitness without a trial would have had it
    for b in born[::25]:
        losses = evaluator.losses(b.individual.program)
        assert score(losses, search.reference) == pytest.approx(b.individual.fitness, abs=1e-5)


def test_the_order_in_which_programs_are_tried_does_not_matter():
    assert evolve(RECIPE, Quadratic()).state() == evolve(RECIPE, Quadratic(True)).state()


def test_an_interrupted_search_ends_as_if_it_had_not_been():
    whole = evolve(RECIPE, Quadratic())
    part = evolve(RECIPE, Quadratic(), rounds=7)
    resumed = Search(RECIPE)
    resumed.restore(json.loads(json.dumps(part.state())))
    while not resumed.done:
        resumed.round(Quadratic())
    assert json.dumps(resumed.state()) == json.dumps(whole.state())


@pytest.mark.parametrize("mode", ["constants", "random", "walk"])
def test_controls(mode):
    recipe = SearchRecipe(**{**vars(RECIPE), "mode": mode, "evaluated": 120})
    born = []
    search = evolve(recipe, Quadratic(), born)
    assert search.counts["evaluated"] == 120
    parents = {b.individual.parent is None for b in born[1:]}
    assert parents == {mode == "random"}
    if mode == "constants":
        assert all(b.individual.statements == 9 for b in born)


@pytest.mark.parametrize("restart", ["best", "start"])
def test_a_search_that_is_stuck_restarts(restart):
    recipe = SearchRecipe(**{**vars(RECIPE), "patience": 10, "restart": restart})
    search = evolve(recipe, Quadratic(), rounds=1)
    while not search.restarts:
        search.round(Quadratic())
    want = simplified(search.best.program) if restart == "best" else search.first.program
    assert {x.program for x in search.population} == {want}


def test_asynchronous_search_keeps_the_evaluator_busy():
    search = Search(RECIPE)
    evaluator = Quadratic(backwards=True)
    search.begin(evaluator)
    search.run_asynchronously(evaluator, lambda: search.counts["evaluated"] >= 100)
    assert 100 <= search.counts["evaluated"] < 110
    assert not evaluator.waiting
    search.run_asynchronously(evaluator, lambda: False)
    assert search.counts["evaluated"] == evaluator.tried - 17 == 400
    assert search.best.fitness < -0.1


def test_the_first_program_gets_the_best_learning_rate():
    search = Search(RECIPE)
    search.begin(evaluator := Quadratic())
    rates = [scaled_rate(PROGRAMS["adamw"], 10.0 ** (i / 4)) for i in range(-6, 11)]
    losses = [Quadratic().losses(p)[0] for p in rates]
    assert search.reference[0] == min(losses)
    assert evaluator.tried == 17


def test_journal_tells_the_way_to_every_program(tmp_path):
    path = tmp_path / "journal.jsonl"
    log = journal.Journal(path)
    born = []
    search = Search(RECIPE, lambda x: (born.append(x), log.write(x)))
    search.begin(Quadratic())
    for _ in range(8):
        search.round(Quadratic())
    kept = log.flush()
    search.round(Quadratic())
    log.close()
    with path.open("a") as file:
        file.write('[7, "half a li')
    entries = list(journal.read(path))
    assert len(entries) == len(born)
    for b in born[:: len(born) // 20]:
        line = journal.lineage(entries, b.individual.number)
        assert line[-1][1] == b.individual.program
        assert line[0][1] == search.first.program
        for (_, before), (_, after) in itertools.pairwise(line):
            assert abs(len(after.statements) - len(before.statements)) <= 1
    log = journal.Journal(path, kept)  # what came after the checkpoint is written again
    log.close()
    assert path.stat().st_size == kept


def test_bad_searches():
    evaluator = Quadratic()
    with pytest.raises(FileNotFoundError, match=r"`start` nothing.py is neither a file nor one of"):
        Search(SearchRecipe(start="nothing.py")).begin(evaluator)
    with pytest.raises(ValueError, match="`tournament` must be at least 1"):
        SearchRecipe(tournament=0)
    with pytest.raises(ValueError, match="`most_statements` must be at most 40"):
        SearchRecipe(most_statements=41)
    with pytest.raises(ValueError, match="`steps` must be at least 1"):
        Proxies(steps=0)
    with pytest.raises(ValueError, match="unknown"):
        SearchRecipe(tasks="train/prox").proxies()


def test_a_first_program_that_cannot_be_searched_from(tmp_path):
    path = tmp_path / "mine.py"
    long = "\n    ".join(f"x{i + 1} = x{i} + g" for i in range(41))
    for body, said in (
        ("update = arcsin(g)", "gives updates that are not finite"),
        ("update = norm(g)", "update must end as an array"),
        (f"x0 = g + g\n    {long}\n    update = x41 * lr", "43 statements matter"),
    ):
        path.write_text(BODY.format(body))
        with pytest.raises(ProgramError, match=said):
            SearchRecipe(start=str(path), tasks=SMALL.tasks).check()
    path.write_text(BODY.format("update = g * -1.0"))
    with pytest.raises(ProgramError, match="trains none of"):
        Search(SearchRecipe(start=str(path), tasks=SMALL.tasks)).begin(Quadratic())


# trials


def test_a_trial_is_ordinary_training():
    """With the rule in the place of the machine, step by step."""
    program = scaled_rate(PROGRAMS["adamw"], 10.0)
    (got,) = Runs(SMALL)(program)
    (family,) = families(SMALL.tasks).values()
    key = jax.random.fold_in(jax.random.key(0), 0)
    task_key, init_key, batch_key, eval_key = jax.random.split(key, 4)
    task = family(task_key)
    rule = Symbolic(str(program), "cosine")
    optimizer = behind(task, rule.optimizer(rule.init(key), SMALL.steps))
    params = task.init(init_key)

    def step(carry, t):
        batch = task.batch(jax.random.fold_in(batch_key, t), "train")
        params, state, loss = train_step(task, optimizer, *carry, batch)
        return (params, state), loss

    start = params, optimizer.init(params)
    (params, _), losses = jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(SMALL.steps)))()
    keys = jax.random.split(jax.random.fold_in(eval_key, 0), SMALL.valid_batches)
    valid = [task.loss(params, task.batch(key, "valid")) for key in keys]
    np.testing.assert_allclose(got, task.normalize(jnp.mean(jnp.stack(valid))), rtol=1e-4)
    assert losses[-1] < 0.9 * losses[0]


def test_a_run_that_is_lost_ends_early_with_the_worst_loss():
    for body in ("update = g * -3.0", "x = log(m)\n    update = g * x"):
        runs = Runs(SMALL)
        assert runs(parse(BODY.format(body))) == [2.0]


RECOVERY = Proxies("tabular_mlp(data='teacher', hidden=(16,), batch_size=32)", steps=100)
BUDGET = 1500  # programs tried


def damaged_lion(changes, seed, lion, reference, runs):
    """Lion after random changes that cost it at least 5% of loss, even with another learning
    rate.
    """
    random, mutator = np.random.default_rng(seed), Mutator(14, constants=0.0)
    while True:
        program = lion
        for _ in range(changes):
            program = apply(program, mutator(program, random)[0])
        if functional_hash(program) is None:
            continue
        rates = [scaled_rate(program, 10.0 ** (i / 4)) for i in range(-6, 11, 2)]
        scores = [score(runs(p), reference) for p in dict.fromkeys(rates)]
        if min(scores) > 0.05 and min(runs(program)) < 1.0:
            return program


@pytest.mark.slow
@pytest.mark.parametrize("changes", [1, 2, 3])
def test_evolution_repairs_a_damaged_lion(changes, tmp_path):
    """Nine times of ten it is back at Lion's loss, within 1%, after at most `BUDGET` trials."""
    runs = Runs(RECOVERY)
    rates = [scaled_rate(PROGRAMS["lion"], 10.0 ** (i / 4)) for i in range(-2, 11)]
    lion = min(rates, key=lambda p: float(np.sum(runs(p))))
    reference, needed = runs(lion), []
    for seed in range(10):
        path = tmp_path / f"{seed}.py"
        path.write_text(str(damaged_lion(changes, seed, lion, reference, runs)))
        recipe = SearchRecipe(
            start=str(path), tasks=RECOVERY.tasks, steps=RECOVERY.steps, seed=seed,
            most_statements=20, patience=500, evaluated=BUDGET,
        )  # fmt: skip
        search = Search(recipe)
        search.begin(Local())
        goal = score(reference, search.reference) + 0.01
        while not search.done and search.best.fitness > goal:
            search.round(Local())
        needed.append(search.counts["evaluated"] if search.best.fitness <= goal else None)
    print(changes, "changes, tried until repaired:", needed)
    assert sum(n is not None for n in needed) >= 9


def test_seeds_are_other_runs_and_programs_meet_the_same():
    several = Proxies(**{**vars(SMALL), "seeds": 2})
    runs = Runs(several)
    losses = runs(PROGRAMS["adamw"])
    assert losses.shape == (2,)
    assert losses[0] != losses[1]
    np.testing.assert_array_equal(losses, runs(PROGRAMS["adamw"]))
    assert losses[0] == Runs(SMALL)(PROGRAMS["adamw"])[0]
    assert score(losses, losses) == 0.0
    assert score(np.array([0.5, 0.2]), np.array([0.25, 0.4])) == pytest.approx(0.0)


def test_local_evaluator_keeps_the_order():
    programs = [scaled_rate(PROGRAMS["adamw"], factor) for factor in (1.0, 10.0)]
    found = try_all(Local(), programs, SMALL)
    runs = Runs(SMALL)
    np.testing.assert_array_equal(found, [runs(p) for p in programs])


# funnel and simplification


def test_funnel_takes_the_best_that_beat_the_first_program_in_every_stage():
    programs, first = [scaled_rate(PROGRAMS["adamw"], f) for f in range(2, 8)], PROGRAMS["adamw"]
    table = {
        "a": [1.0, 0.9, 0.5, 0.7, 0.95, 1.2, 0.6],
        "b": [1.0, 0.1, 1.1, 0.8, 0.9, 0.1, 0.95],
    }

    def tried(some, proxies):
        column = table[proxies.tasks]
        return [np.array([column[[first, *programs].index(p)]]) for p in some]

    class Named:
        def __init__(self, tasks):
            self.tasks = tasks

    chosen = (funnel.Stage("a", Named("a"), 3, True), funnel.Stage("b", Named("b"), 1))
    found = funnel.select(programs, first, chosen, tried)
    assert found.winner == 2  # 0.7 then 0.8; 0.5 loses to the first program in the second stage
    assert set(found.scores["a"]) == set(range(6))
    assert set(found.scores["b"]) == {1, 2, 5}
    worse = funnel.select(programs[4:5], first, chosen, tried)
    assert worse.winner is None


def test_rank_correlation_and_strata():
    a = {i: float(i) for i in range(20)}
    assert funnel.rank_correlation(a, a) == (pytest.approx(1.0), 1.0, 20)
    spearman, recall, count = funnel.rank_correlation(a, {i: -float(i) for i in range(5, 20)})
    assert spearman == pytest.approx(-1.0)
    assert (recall, count) == (0.0, 15) or recall < 0.6
    assert np.isnan(funnel.rank_correlation(a, dict.fromkeys(a, 1.0))[0])
    fitness = list(np.linspace(0.6, -1.0, 200)) + [5.0] * 50
    taken = funnel.stratified(fitness, 48)
    assert len(set(taken)) == 48
    assert set(range(176, 200)) <= set(taken)
    assert funnel.stratified([-0.1, 3.0], 48) == [0]


def test_the_found_program_simplifies_to_lion():
    """By its fitness alone: clip and arcsin go, the sign is found, the averages become one."""
    evaluator = Quadratic()
    reference = evaluator.losses(PROGRAMS["adamw"])

    def scores(programs):
        return [score(evaluator.losses(p), reference) for p in programs]

    start = parse(str(PROGRAMS["lion_as_found"]).replace("0.0002", "0.02"))
    short = simplify(start, scores, tolerance=0.02)
    check(short)
    assert cost(short).statements < 9
    assert scores([short])[0] <= scores([start])[0] + 0.02
    assert cost(short).states <= 1


def test_simplification_keeps_what_is_needed():
    lion = PROGRAMS["lion"]

    def scores(programs):  # nothing may change what it does
        same = functional_hash(lion)
        return [0.0 if functional_hash(p) == same else 1.0 for p in programs]

    bloated = parse(
        BODY.format(
            "x = g * 1.0\n    c = interpolate(x, m, 0.9)\n    s = sign(c)\n    z = s * 0.0\n"
            "    update = s + z\n    m = interpolate(x, m, 0.99)\n    wd = w * 0.01\n"
            "    update = update + wd\n    lr = lr * 0.0003\n    update = update * lr"
        )
    )
    assert functional_hash(bloated) == functional_hash(lion)
    assert cost(simplify(bloated, scores)).statements == 7


def test_interpolations_of_interpolations_are_merged():
    program = parse(
        BODY.format(
            "m = interpolate(g, v, 0.9)\n    v = interpolate(g, m, 0.95)\n    update = m + v"
        )
    )

    def scores(programs):
        same = functional_hash(program)
        return [0.0 if functional_hash(p) == same else 1.0 for p in programs]

    assert "v = interpolate(g, v, 0.855)" in str(simplify(program, scores))


def test_behaviour_tells_lion_from_others():
    lion = behaviour(PROGRAMS["lion"])
    assert lion.like_lion
    assert (lion.spread, lion.scale, lion.agreement) == (0.0, 0.0, 1.0)
    assert lion.betas == (0.9, 0.99)
    found = behaviour(PROGRAMS["lion_as_found"])  # m / sqrt(m * m) is no sign at small m, nor
    assert found.agreement > 0.97  # is the second beta that of the list
    adamw, sgd = behaviour(PROGRAMS["adamw"]), behaviour(PROGRAMS["sgd_momentum"])
    assert not adamw.like_lion
    assert adamw.scale < 1e-5
    assert adamw.spread > 0.4
    assert sgd.scale == pytest.approx(9.0)
    assert not sgd.like_lion


@pytest.mark.parametrize(
    ("value", "digits", "rounded"),
    [(0.8991, 1, 0.9), (0.99653, 1, 0.997), (0.0004602, 1, 0.0005), (-3.14, 2, -3.1)],
)
def test_round_constant(value, digits, rounded):
    assert round_constant(value, digits) == rounded


def test_found_programs_are_optax_optimizers():
    rule = Symbolic(str(PROGRAMS["lion_as_found"]), "cosine")
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), rule.optimizer(rule.init(jax.random.key(0)), 10)
    )
    params = {"w": jnp.ones((3,))}
    updates, _ = optimizer.update({"w": jnp.ones((3,))}, optimizer.init(params), params)
    assert np.all(np.isfinite(updates["w"]))
