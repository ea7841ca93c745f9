"""Any flax or haiku model becomes a task in one call: `from_flax`, `from_haiku`."""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from tasks.base import Key, Params
from tasks.data import Batch, Dataset, load
from tasks.network import Network, NetworkTask, Objective

Loss = Callable[[Any, jax.Array], jax.Array]  # (outputs, targets) -> scalar, or one per example


class Model(Network, Protocol):
    """A network that may turn out to hold what a task cannot."""

    def state(self, key: Key, inputs: Any) -> Any:
        """What the model holds besides parameters; a tree without leaves when nothing."""
        ...


@dataclasses.dataclass(frozen=True)
class _OfTargets:
    """A loss of (outputs, targets) as that of an `Objective`."""

    loss: Loss

    def __call__(self, outputs: Any, batch: Batch) -> jax.Array:
        return self.loss(outputs, batch.targets)


def from_flax(
    module: Any,
    loss: Loss,
    data: Dataset | str,
    *,
    batch_size: int = 64,
    untrained: float | None = None,
) -> NetworkTask:
    """A flax model as a family of one task.

    Args:
      module: a `flax.linen` module, or a function `rngs -> flax.nnx module`. Called with inputs
        [batch, ...] float32.
      loss: (outputs, targets [batch] int32) -> a scalar, or one number per example, which are
        averaged.
      data: a dataset, or a name for `tasks.data.load`.
      untrained: the loss that `normalize` maps to 1; when None that of the best constant
        prediction, the entropy of the labels or the variance of real targets.

    `module` and `loss` become part of the jit key: pass the same objects (or equal ones) again and
    nothing is compiled anew.

    Raises:
      ValueError: the model holds state besides its parameters (batch statistics, dropout keys), or
        is not hashable.
    """
    from flax import linen, nnx

    if isinstance(module, linen.Module):
        return _model_task(Linen(module), loss, data, batch_size, untrained)
    if isinstance(module, nnx.Module) or not callable(module):
        raise ValueError(
            "`module` must be a linen module or a function rngs -> nnx module, got "
            f"{type(module).__name__}; for nnx pass e.g. lambda rngs: Network(width=8, rngs=rngs)"
        )
    return _model_task(Nnx(module), loss, data, batch_size, untrained)


def from_haiku(
    transformed: Any,
    loss: Loss,
    data: Dataset | str,
    *,
    batch_size: int = 64,
    untrained: float | None = None,
) -> NetworkTask:
    """A haiku model, `hk.transform(f)` or `hk.without_apply_rng(hk.transform(f))`, as a family;
    else as `from_flax`.
    """
    import haiku as hk

    if isinstance(transformed, hk.TransformedWithState):
        raise ValueError(
            "`transformed` carries haiku state, which a task cannot hold; use hk.transform"
        )
    return _model_task(Haiku(transformed), loss, data, batch_size, untrained)


def _model_task(
    model: Model, loss: Loss, data: Dataset | str, batch_size: int, untrained: float | None
) -> NetworkTask:
    data = load(data) if isinstance(data, str) else data
    try:
        hash((model, loss))
    except TypeError as error:
        raise ValueError(f"the model and `loss` must be hashable: {error}") from None
    _check(model, data.shape)
    untrained = data.statistics.target if untrained is None else float(untrained)
    return NetworkTask(data, model, Objective(_OfTargets(loss), untrained), batch_size)


@functools.lru_cache(maxsize=128)
def _check(model: Model, shape: tuple[int, ...]) -> None:
    """Refuses a model with state, by its abstract values: nothing is computed."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    inputs = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    state = jax.eval_shape(model.state, key, inputs)
    if jax.tree.leaves(state):
        raise ValueError(
            f"the model holds state besides its parameters, which a task cannot carry: {state}; "
            "leave out batch statistics, dropout and the like"
        )
    jax.eval_shape(lambda key, x: model.apply(model.init(key, x), x), key, inputs)


@dataclasses.dataclass(frozen=True)
class Linen:
    module: Any

    def init(self, key: Key, inputs: Any) -> Params:
        return self.module.init(key, inputs).get("params", {})

    def apply(self, params: Params, inputs: Any, *activation: Any) -> Any:
        return self.module.apply({"params": params}, inputs, *activation)

    def state(self, key: Key, inputs: Any) -> Any:
        variables = self.module.init(key, inputs)
        return {name: tree for name, tree in variables.items() if name != "params"}


@dataclasses.dataclass(frozen=True)
class Nnx:
    """The parameters are nnx's pure dict; the graph, which is static, is the same for every key."""

    build: Callable[[Any], Any]

    def init(self, key: Key, inputs: Any) -> Params:
        from flax import nnx

        return nnx.to_pure_dict(nnx.state(self.build(nnx.Rngs(key)), nnx.Param))

    def apply(self, params: Params, inputs: Any, *activation: Any) -> Any:
        from flax import nnx

        return nnx.merge(_graph(self.build), params)(inputs, *activation)

    def activations(self, params: Params, inputs: Any, *activation: Any) -> dict[str, jax.Array]:
        """The output of every module, by its path, the second of one that is called twice under
        "path/1"; "output" is that of the whole.
        """
        from flax import nnx

        model = nnx.merge(_graph(self.build), params)
        keep = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)
        leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(keep(inputs, *activation)[1]))
        names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
        names = [re.sub("/?__call__(/0)?", "", name) or "output" for name in names]
        return dict(zip(names, (leaf for _, leaf in leaves), strict=True))

    def state(self, key: Key, inputs: Any) -> Any:
        from flax import nnx

        return nnx.to_pure_dict(nnx.state(self.build(nnx.Rngs(key)), nnx.Not(nnx.Param)))


@functools.lru_cache(maxsize=128)
def _graph(build: Callable[[Any], Any]) -> Any:
    from flax import nnx

    return nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))[0]


@dataclasses.dataclass(frozen=True)
class Haiku:
    transformed: Any

    def init(self, key: Key, inputs: Any) -> Params:
        return self.transformed.init(key, inputs)

    def apply(self, params: Params, inputs: Any, *activation: Any) -> Any:
        # hk.without_apply_rng drops the argument.
        takes_key = "rng" in inspect.signature(self.transformed.apply).parameters
        return self.transformed.apply(params, *([None] if takes_key else []), inputs, *activation)

    def state(self, key: Key, inputs: Any) -> Any:
        return ()
