"""An exported optimizer: one safetensors file with theta as tensors and everything else as
metadata. No pickle anywhere.

The metadata holds the schema version, the rule with its fields, and a card: provenance, cost,
licence, whatever the maker states.
"""

import dataclasses
import difflib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

import learned_opt
from learned_opt import base, discovery
from learned_opt.base import Horizon, LearnedOptimizer, Theta
from learned_opt.mup import MuP

SCHEMA = "1"
PRETRAINED = Path(__file__).parent / "pretrained"
Card = dict[str, Any]


def digest(metadata: dict[str, str], tensors: dict[str, np.ndarray]) -> str:
    """SHA-256 over the metadata and tensors of an artifact: a safetensors file has no checksum of
    its own.
    """
    sha = hashlib.sha256()
    for name in sorted(metadata.keys() - {"sha256"}):
        sha.update(f"{name}={metadata[name]};".encode())
    for name in sorted(tensors):
        sha.update(f"{name}:{tensors[name].dtype}{tensors[name].shape};".encode())
        sha.update(tensors[name].tobytes())
    return sha.hexdigest()


def save(path: str | os.PathLike, rule: LearnedOptimizer, theta: Theta, card: Card) -> None:
    """Writes an artifact in one piece: a reader sees the old file or the new one.

    Raises:
      ValueError: the rule could not be found again by name, theta is not the rule's, or the card is
        not JSON.
    """
    spec = discovery.spec_of(rule)
    try:
        survives = discovery.build("rule", spec, discovery.members(learned_opt)) == rule
    except ValueError as error:
        raise ValueError(f"`rule` {spec} could not be built again: {error}") from None
    if not survives:
        raise ValueError(f"`rule` does not survive its description {spec}: fields must be literals")
    base.check_theta(rule, theta)
    leaves = base.flatten(theta)
    try:
        text = json.dumps(card, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`card` must be plain JSON: {error}") from None
    metadata = {"schema": SCHEMA, "rule": spec, "card": text}
    # not ascontiguousarray, which makes a scalar a vector
    tensors = {name: np.asarray(leaf, order="C") for name, leaf in leaves.items()}
    metadata["sha256"] = digest(metadata, tensors)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(serialize(tensors, metadata))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def pretrained() -> list[str]:
    """Names of the optimizers that ship with this package."""
    return sorted(file.stem for file in PRETRAINED.glob("*.safetensors"))


def find(name_or_path: str | os.PathLike) -> Path:
    """The file of a pretrained optimizer's name, or the path itself.

    Raises:
      FileNotFoundError: neither exists; the message lists the pretrained names.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = PRETRAINED / f"{name_or_path}.safetensors"
    if shipped.is_file():
        return shipped
    names = pretrained()
    near = difflib.get_close_matches(str(name_or_path), names, n=1)
    hint = f"; did you mean '{near[0]}'" if near else ""
    raise FileNotFoundError(
        f"no artifact '{name_or_path}'{hint}. "
        f"Give a .safetensors file or one of: {', '.join(names)}"
    )


def read(name_or_path: str | os.PathLike) -> tuple[LearnedOptimizer, Theta, Card]:
    """The rule, theta and card of an artifact.

    Raises:
      FileNotFoundError: there is no such file or pretrained optimizer.
      ValueError: the file is damaged, is no artifact, is of a newer schema, names an unknown rule,
        or its tensors are not the rule's.
    """
    path = find(name_or_path)
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from None
    if not {"schema", "rule", "card"} <= metadata.keys():
        raise ValueError(f"{path} is not an exported optimizer: its metadata names no rule")
    if metadata["schema"] != SCHEMA:
        raise ValueError(
            f"{path} has schema {metadata['schema']}, this version reads schema {SCHEMA}: "
            "upgrade learned-opt"
        )
    if metadata.get("sha256") != digest(metadata, tensors):
        raise ValueError(f"{path} is damaged: its contents do not have the checksum it states")
    try:
        rule = discovery.build("rule", metadata["rule"], discovery.members(learned_opt))
        card = json.loads(metadata["card"])
        template = jax.eval_shape(rule.init, jax.random.key(0))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    base.check_leaves(rule, tensors, str(path))
    leaves = [jnp.asarray(tensors[name]) for name in base.flatten(template)]
    return rule, jax.tree.unflatten(jax.tree.structure(template), leaves), card


def load(
    name_or_path: str | os.PathLike,
    horizon: Horizon = None,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    multipliers: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """An exported optimizer as an optax transformation, ready for `optax.chain` and
    `optax.apply_updates`.

    Args:
      name_or_path: a pretrained optimizer's name or a .safetensors file.
      horizon: steps the run will take; needed by some rules, which say so.
      learning_rate: multiplies the updates: a number or an optax schedule.
      multipliers: of a mu-parametrized model, from `mup.mup_multipliers`; for any rule but those
        whose steps are relative to the params (VeLO, Celo).
    """
    rule, theta, _ = read(name_or_path)
    if multipliers is not None:
        rule = rule if isinstance(rule, MuP) else MuP(rule)
        rule = dataclasses.replace(rule, multipliers=multipliers)
    optimizer = rule.optimizer(theta, horizon)
    scale = optax.scale_by_learning_rate(learning_rate, flip_sign=False)
    return optax.with_extra_args_support(optax.chain(optimizer, scale))
