"""What one update costs: its time as a ratio to optax.adam's, its memory, its compilation; and
beside them its floor, the bytes that any implementation of the same update must move.

The floor reads every argument of the compiled update once and writes every result once. Arguments
that no result depends on, as params for Adam, are not in the compiled program and do not count:
Adam in float32 reads g, m, v and writes u, m, v, 24 bytes per parameter.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich.box
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from rich.markup import escape
from rich.table import Table

Params = Any

ROUNDS = 50  # as long as steps are short enough
LEAST_ROUNDS = 3  # however long a step is


class Cost(NamedTuple):
    """One update of one optimizer at one size. "Per param" divides by the actual parameters."""

    step_ratio_to_adam: float  # median over rounds of its time over Adam's in the same round
    step_ratio_quartiles: tuple[float, float]
    step_ns_per_param: float
    bytes_floor_per_param: float
    bytes_floor_ratio_to_adam: float  # what the time ratio would be if nothing else took time
    flops_per_param: float | None  # XLA's count; a loop's body counts once. None: XLA has none
    temp_bytes_per_param: float  # held during the update, beside its arguments and results
    state_bytes_per_param: float
    compile_s: float  # tracing, lowering and compiling, nothing taken from a cache on disk


def problem(count: int) -> tuple[Params, Params]:
    """Params and gradients of about `count` numbers (at least 4): two square matrices and two
    bias vectors, float32, all nonzero.
    """
    side = max(1, round((math.sqrt(1 + 2 * count) - 1) / 2))  # 2 side^2 + 2 side = count
    shapes = {"w0": (side, side), "b0": (side,), "w1": (side, side), "b1": (side,)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {
        name: 0.1 + jax.random.uniform(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return params, jax.tree.map(lambda p: 0.01 * (p - 0.6), params)


def check(optimizer: optax.GradientTransformation, count: int) -> None:
    """Traces one update, without computing it; raises what the optimizer raises."""

    def update():
        params, grads = problem(count)
        return _update(optimizer)(optimizer.init(params), grads, params, jnp.float32(1.0))

    jax.eval_shape(update)


def measure(optimizer: optax.GradientTransformation, count: int, seconds: float = 10.0) -> Cost:
    """Cost of the optimizer on the `problem` of `count` parameters.

    What is timed is the jitted `update` with the loss as `value=`, the state donated, as in a
    training loop that does nothing else. It takes turns with optax.adam for about `seconds`, for
    longer when that is less than three rounds.
    """
    params, grads = jax.jit(problem, static_argnums=0)(count)
    arguments = (grads, params, jnp.float32(1.0))
    adam, rule = _compile(optax.adam(1e-3), arguments), _compile(optimizer, arguments)
    times = _alternate(adam.step, rule.step, seconds)
    low, ratio, high = np.quantile(times[:, 1] / times[:, 0], (0.25, 0.5, 0.75))
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Cost(
        step_ratio_to_adam=float(ratio),
        step_ratio_quartiles=(float(low), float(high)),
        step_ns_per_param=1e9 * float(np.median(times[:, 1])) / total,
        bytes_floor_per_param=rule.bytes_floor / total,
        bytes_floor_ratio_to_adam=rule.bytes_floor / adam.bytes_floor,
        flops_per_param=None if rule.flops is None else rule.flops / total,
        temp_bytes_per_param=rule.temp_bytes / total,
        state_bytes_per_param=rule.state_bytes / total,
        compile_s=rule.compile_s,
    )


class _Compiled(NamedTuple):
    step: Callable[[int], float]  # takes so many steps, returns seconds per step
    bytes_floor: int
    flops: float | None
    temp_bytes: int
    state_bytes: int
    compile_s: float


def _update(optimizer: optax.GradientTransformation) -> Callable:
    def update(state, grads, params, loss):
        extended = optax.with_extra_args_support(optimizer)
        return extended.update(grads, state, params, value=loss)

    return update


def _compile(optimizer: optax.GradientTransformation, arguments) -> _Compiled:
    # Jitted, because an init may return the params themselves, or one array twice: neither may be
    # donated, and the results of a program are arrays of their own.
    state = jax.jit(optimizer.init)(arguments[1])
    update = jax.jit(_update(optimizer), donate_argnums=0)
    with no_compilation_cache():
        began = time.perf_counter()
        program = update.lower(state, *arguments).compile()
        compile_s = time.perf_counter() - began

    def step(steps: int) -> float:
        nonlocal state
        began = time.perf_counter()
        for _ in range(steps):
            # waits for each step: queued ones would each hold memory for their updates
            state = jax.block_until_ready(program(state, *arguments))[1]
        return (time.perf_counter() - began) / steps

    memory = program.memory_analysis()
    assert memory is not None  # as XLA's CPU, GPU and TPU backends have it
    return _Compiled(
        step=step,
        bytes_floor=memory.argument_size_in_bytes + _bytes(program.out_info),
        flops=(program.cost_analysis() or {}).get("flops"),
        temp_bytes=memory.temp_size_in_bytes,
        state_bytes=_bytes(state),
        compile_s=compile_s,
    )


def _alternate(adam: Callable, rule: Callable, seconds: float) -> np.ndarray:
    """[rounds, 2] seconds per step of Adam and of the rule, taking turns."""
    turn = seconds / ROUNDS / 2
    steps = []
    for step in (adam, rule):
        first = step(1)  # which pays for fetching memory from the system
        steps.append(1 if first > turn else math.ceil(turn / step(1)))
    deadline = time.perf_counter() + seconds
    rounds = []
    while len(rounds) < LEAST_ROUNDS or time.perf_counter() < deadline:
        rounds.append((adam(steps[0]), rule(steps[1])))
    return np.array(rounds)


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@contextlib.contextmanager
def no_compilation_cache() -> Iterator[None]:
    """JAX's persistent compilation cache, neither read nor written in the block."""
    enabled = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        reset_cache()  # JAX decides once whether there is a cache, and forgets here
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        reset_cache()


def table(costs: dict[str, dict[int, Cost]]) -> Table:
    """Costs by optimizer and parameter count for a terminal."""
    view = Table(
        title=f"cost of an update, float32, on {jax.default_backend()} ({os.cpu_count()} cores)",
        caption="Time as a ratio to optax.adam's, taking turns: median and quartiles over rounds. "
        "Floor: the ratio if all that took time were reading gradients, state and params (where "
        "used) once and writing updates and state once. Times, bytes and FLOPs are per parameter; "
        "FLOPs by XLA's count, a loop's body once.",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    view.add_column("optimizer", min_width=16, overflow="fold")
    for heading in (
        "time vs\nAdam", "floor", "ns", "temp\nbytes", "state\nbytes", "FLOPs", "compile\ns",
    ):  # fmt: skip
        view.add_column(heading, justify="right", no_wrap=True)
    for name, sizes in costs.items():
        for count, cost in sizes.items():
            low, high = cost.step_ratio_quartiles
            flops = cost.flops_per_param
            view.add_row(
                f"{escape(name)}\n[dim]{count:,} params[/dim]",
                f"{_short(cost.step_ratio_to_adam)}\n[dim]{_short(low)} to {_short(high)}[/dim]",
                _short(cost.bytes_floor_ratio_to_adam),
                _short(cost.step_ns_per_param),
                f"{cost.temp_bytes_per_param:.1f}",
                f"{cost.state_bytes_per_param:.1f}",
                "-" if flops is None else f"{flops:.0f}",
                f"{cost.compile_s:.1f}",
            )
    return view


def _short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.{max(0, 3 - len(str(int(value))))}f}"
