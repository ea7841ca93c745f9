"""Published weights read into theta: flax msgpack files (`theta.state`, google's parameter
checkpoints) and PyLO's safetensors (arXiv 2506.10315). No pickle is ever loaded.

Such files hold arrays by name and nothing else, so the rule must be named; its sizes are read off
the arrays, its quirks are those of `published()`.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from learned_opt import base, discovery, msgpack
from learned_opt.base import LearnedOptimizer, Theta

Leaves = dict[str, np.ndarray]


def _flat(tree: Any, path: str = "") -> Leaves:
    if isinstance(tree, dict):
        parts = [_flat(value, f"{path}/{key}".lstrip("/")) for key, value in tree.items()]
        return {name: leaf for part in parts for name, leaf in part.items()}
    return {path: tree} if isinstance(tree, np.ndarray) else {}


def read_leaves(path: str | os.PathLike) -> Leaves:
    """The arrays of a flax msgpack or safetensors file by their name, nested names joined by `/`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is a pickle, damaged, or of neither format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file '{path}' to read weights from")
    data = path.read_bytes()
    if data[:2] == b"PK" or (data[:1] == b"\x80" and data[1:2] in b"\x02\x03\x04\x05"):
        raise ValueError(
            f"{path} is a pickle, which can run any code and is never loaded: "
            "save its arrays as safetensors"
        )
    try:
        if data[8:9] == b"{":
            return load_safetensors(data)
        tree = msgpack.unpack(data)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{path} is no msgpack or safetensors file of arrays: {error}") from None
    # google's checkpoints wrap theta together with a generation and a step
    wrapped = isinstance(tree, dict) and {"params", "gen_id", "step"} <= tree.keys()
    leaves = _flat(tree["params"] if wrapped else tree)
    if not leaves:
        raise ValueError(f"{path} holds no arrays")
    return leaves


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a leaf of theta comes from: published arrays, concatenated along their inputs."""

    names: tuple[str, ...]
    transposed: bool = False

    def read(self, leaves: Leaves, shape: tuple[int, ...]) -> np.ndarray:
        parts = [leaves[name] for name in self.names]
        parts = [np.swapaxes(p, -1, -2) if self.transposed and p.ndim > 1 else p for p in parts]
        try:
            array = np.concatenate(parts, axis=-2) if len(parts) > 1 else parts[0]
        except ValueError:
            shapes = ", ".join(f"{n} {leaves[n].shape}" for n in self.names)
            raise ValueError(f"leaves that belong together do not fit: {shapes}") from None
        # banks of one entry and initial states are published with a leading axis of size one
        if array.shape == (1, *shape):
            array = array[0]
        if array.shape != shape:
            names = self.names[0] if len(parts) == 1 else f"{self.names[0]} to {self.names[-1]}"
            raise ValueError(f"leaf {names} has shape {array.shape}, not {shape}")
        return array.astype(np.float32)


Layout = dict[str, Source]  # leaf of theta, by its dotted path -> published leaves


def _layers(ours: str, weight: str, bias: str) -> Layout:
    """Three layers of an MLP, from names with the layer's number to be filled in."""
    return {
        f"{ours}.{kind}{i}": Source((pattern.format(i),))
        for i in range(3)
        for kind, pattern in (("w", weight), ("b", bias))
    }


def _dense(ours: str, theirs: str, weight="/w", bias="/b", transposed=False) -> Layout:
    w, b = Source((theirs + weight,), transposed), Source((theirs + bias,))
    return {f"{ours}.w": w, f"{ours}.b": b}


def _split_mlp(ours: str, prefix: str) -> Layout:
    """An MLP whose first layer is published in fourteen groups of rows."""
    first = tuple(f"{prefix}w0__{i}" for i in range(14))
    return _layers(ours, prefix + "w{}", prefix + "b{}") | {f"{ours}.w0": Source(first)}


def _scheduler(controls: bool) -> Layout:
    layout = {
        **_dense("scheduler.mix_all", "rnn_params/linear_1"),
        **_dense("scheduler.mix_own", "rnn_params/linear_2"),
        **_dense("scheduler.lstm", "rnn_params/rnn/linear"),
        **_dense("scheduler.step_size", "rnn_params/step_size"),
        "scheduler.initial.hidden": Source(("lstm_init_state/hidden",)),
        "scheduler.initial.cell": Source(("lstm_init_state/cell",)),
    }
    return layout | (_dense("scheduler.controls", "rnn_params/rnn_to_controls") if controls else {})


def _torch(ours: str, theirs: str) -> Layout:
    return _dense(ours, theirs, ".weight", ".bias", transposed=True)


PYLO_VELO = {
    **_torch("scheduler.mix_all", "mix_layer2"),
    **_torch("scheduler.mix_own", "final_mix_layer"),
    **_torch("scheduler.lstm", "lstm.linear"),
    **_torch("scheduler.controls", "rnn_to_controls"),
    **_torch("scheduler.step_size", "step_size"),
    "scheduler.initial.hidden": Source(("lstm_init_state.0",)),
    "scheduler.initial.cell": Source(("lstm_init_state.1",)),
    "bank.w0": Source(("input_weights_",), transposed=True),
    "bank.b0": Source(("input_bias_",)),
    "bank.w1": Source(("hidden_weights_.0",), transposed=True),
    "bank.b1": Source(("hidden_bias_.0",)),
    "bank.w2": Source(("output_weights_",), transposed=True),
    "bank.b2": Source(("output_bias_",)),
}
# zero where a file lacks them: PyLO keeps its decays in code
DECAYS = {
    "momentum_decays": Source(("momentum_decays",)),
    "rms_decays": Source(("rms_decays",)),
    "factored_decays": Source(("adafactor_decays",)),
}
PYLO_MLP = DECAYS | {
    f"mlp.{kind}{i}": Source((f"network.{layer}.{name}",), transposed=kind == "w")
    for i, layer in enumerate(("input", "linear_0", "output"))
    for kind, name in (("w", "weight"), ("b", "bias"))
}
PYLO_CELO2 = {
    "mlp.w0": Source(tuple(f"w0.{i}" for i in range(14))),
    "mlp.b0": Source(("b0",)),
    "mlp.w1": Source(("dense_w.0",)),
    "mlp.b1": Source(("dense_b.0",)),
    "mlp.w2": Source(("dense_w.1",)),
    "mlp.b2": Source(("dense_b.1",)),
}
LINEAR = "mlp/~/linear_{}"
NN = _layers("mlp", "nn/~/w{}", "nn/~/b{}") | DECAYS
NN_ADAM = {
    **_dense("lstm", "rnn_params/rnn/linear"),
    **_dense("controls", "rnn_to_controls_params/rnn_to_controls"),
    "initial.hidden": Source(("lstm_init_state/hidden",)),
    "initial.cell": Source(("lstm_init_state/cell",)),
    "initial.learning_rate": Source(("per_layer_lr",)),
    "initial.beta1": Source(("per_layer_beta1",)),
    "initial.beta2": Source(("per_layer_beta2",)),
    "initial.epsilon": Source(("per_layer_epsilon",)),
}
RNN_MLP = {
    **_dense("lstm", "rnn_params/rnn/linear"),
    **_dense("lstm_to_lstm", "rnn_to_in_params/rnn_to_in"),
    **_dense("lstm_to_mlp", "rnn_to_ff_params/rnn_to_ff"),
    **_layers("mlp", f"ffmod_params/{LINEAR}/w", f"ffmod_params/{LINEAR}/b"),
    "initial.hidden": Source(("lstm_init_state/hidden",)),
    "initial.cell": Source(("lstm_init_state/cell",)),
    "initial.from_lstm": Source(("initial_from_lstm",)),
    "initial.from_mlp": Source(("initial_from_mlp",)),
}

# by rule, the layouts its weights are published in
LAYOUTS: dict[str, list[Layout]] = {
    "velo": [_split_mlp("bank", "ff_mod_stack/~/") | _scheduler(controls=True), PYLO_VELO],
    "celo": [_split_mlp("mlp", "ff_mod_stack/~/") | _scheduler(controls=False)],
    "celo_adam": [_scheduler(controls=False)],
    "celo2": [_split_mlp("mlp", "ff_mod_stack/~/"), PYLO_CELO2],
    "small_fc": [NN, PYLO_MLP],
    "adafac_nominal": [NN],
    "mlp_lopt": [_layers("mlp", LINEAR + "/w", LINEAR + "/b")],
    "nn_adam": [NN_ADAM],
    "rnn_mlp": [RNN_MLP],
}
# published leaves that the published rules never read
DEAD = {
    "rnn_params/linear/w", "rnn_params/linear/b",
    "rnn_params/rnn_to_controls/w", "rnn_params/rnn_to_controls/b",
    "mix_layer1.weight", "mix_layer1.bias",
    "input_weights", "input_bias", "output_weights", "output_bias",
    "hidden_weights.0", "hidden_bias.0",
}  # fmt: skip
# fields that state sizes: field -> leaf of theta, axis
LSTM = {"lstm": ("scheduler.initial.hidden", -1)}
HIDDEN = {"hidden": ("mlp.b0", -1)}
SIZES: dict[str, dict[str, tuple[str, int]]] = {
    "velo": LSTM | {"bank": ("bank.b0", 0)},
    "celo": LSTM | HIDDEN,
    "celo_adam": LSTM,
    "nn_adam": {"lstm": ("initial.hidden", -1)},
    "rnn_mlp": HIDDEN
    | {
        "lstm": ("initial.hidden", -1),
        "from_lstm": ("initial.from_lstm", 0),
        "from_mlp": ("initial.from_mlp", 0),
        "to_mlp": ("lstm_to_mlp.b", 0),
    },
}


def _layout_of(name: str, leaves: Leaves) -> Layout:
    """The layout of the rule that most of the leaves belong to."""
    if name not in LAYOUTS:
        raise ValueError(discovery.unknown("rule with published weights", name, list(LAYOUTS)))
    score: Callable[[Layout], int] = lambda layout: sum(  # noqa: E731
        published in leaves for source in layout.values() for published in source.names
    )
    return max(LAYOUTS[name], key=score)


def _sized(rule: LearnedOptimizer, name: str, layout: Layout, leaves: Leaves) -> LearnedOptimizer:
    """The rule with the sizes that the arrays have."""
    sizes = {}
    for field, (ours, axis) in SIZES.get(name, HIDDEN).items():
        if field in discovery.fields_of(type(rule)):
            array = leaves.get(layout[ours].names[0])
            if array is not None and array.ndim:
                sizes[field] = array.shape[axis]
    return dataclasses.replace(rule, **sizes)  # pyright: ignore[reportArgumentType]


def read_published(
    paths: Sequence[str | os.PathLike], rule: type | LearnedOptimizer
) -> tuple[LearnedOptimizer, Theta]:
    """A rule and theta from published weights, which may be spread over several files.

    Args:
      paths: flax msgpack files (`theta.state`) or safetensors of PyLO.
      rule: a rule, or its class: then `published()`, with the sizes that the arrays have.

    Raises:
      FileNotFoundError: a file does not exist.
      ValueError: a file cannot be read, the rule has no published weights, or leaves are missing,
        unknown or misshapen; the message names each.
    """
    if not paths:
        raise ValueError("`files` is empty: name the files that hold the weights")
    leaves = {name: leaf for path in paths for name, leaf in read_leaves(path).items()}
    source = ", ".join(str(path) for path in paths)
    cls = rule if isinstance(rule, type) else type(rule)
    name = discovery.name_of(cls)
    layout = _layout_of(name, leaves)
    if isinstance(rule, type):
        published = getattr(cls, "published", cls)
        rule = _sized(published(), name, layout, leaves)
    template = jax.eval_shape(rule.init, jax.random.key(0))
    expected = base.flatten(template)

    wrong, found = [], {}
    for ours, want in expected.items():
        missing = [n for n in layout[ours].names if n not in leaves]
        if missing and ours in DECAYS:
            found[ours] = np.zeros(want.shape, np.float32)
        elif missing:
            wrong += [f"missing leaf {n}" for n in missing]
        else:
            try:
                found[ours] = layout[ours].read(leaves, want.shape)
            except ValueError as error:
                wrong.append(str(error))
    used = {n for ours in expected for n in layout[ours].names}
    wrong += [f"unknown leaf {n}" for n in leaves if n not in used | DEAD]
    if wrong:
        raise ValueError(
            f"{source} does not hold the weights of {discovery.spec_of(rule)}: {'; '.join(wrong)}"
        )
    values = [jnp.asarray(found[ours]) for ours in expected]
    return rule, jax.tree.unflatten(jax.tree.structure(template), values)
