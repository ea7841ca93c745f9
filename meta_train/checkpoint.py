"""Checkpoints of a run: orbax directories, committed atomically, the newest few kept."""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp


def _leaves(tree: Any) -> tuple[dict[str, jax.Array], list[str]]:
    """Leaves by number, and what each is: dtype and shape. Orbax refuses empty arrays: they are
    left out.
    """
    arrays = {f"{i:05d}": jnp.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
    names = [f"{array.dtype}{list(array.shape)}" for array in arrays.values()]
    return {name: array for name, array in arrays.items() if array.size}, names


class Checkpoints:
    """The checkpoints in a directory; step numbers count completed outer steps."""

    def __init__(self, directory: Path | str, keep: int = 3):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(Path(directory).absolute(), options=options)

    def latest(self) -> int | None:
        """The newest complete checkpoint's step, or None. What a killed run left half-written does
        not count.
        """
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Writes the state of a step, unless that step is there already."""
        if self.latest() == step:
            return
        arrays, names = _leaves(state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave({"leaves": names})
            ),
        )

    def restore(self, template: Any, step: int | None = None) -> Any:
        """The state of a step (default: the latest), in the structure of `template`.

        Raises:
          FileNotFoundError: there is no such checkpoint.
          ValueError: it is the checkpoint of another rule, task or estimator; the message says what
            differs.
        """
        step = self.latest() if step is None else step
        if step is None or step not in self._manager.all_steps():
            raise FileNotFoundError(
                f"no checkpoint {'' if step is None else f'of step {step} '}"
                f"in {self._manager.directory}"
            )
        arrays, names = _leaves(template)
        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        saved = meta["meta"]["leaves"]
        if saved != names:
            pairs = itertools.zip_longest(names, saved, fillvalue="nothing")
            wanted, got = next((w, g) for w, g in pairs if w != g)
            raise ValueError(
                f"the checkpoint in {self._manager.directory} is of another rule, task or "
                f"estimator: {len(saved)} arrays where {len(names)} are expected, "
                f"{got} where {wanted} is"
            )
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(arrays))
        )["state"]
        leaves = [
            restored.get(f"{i:05d}", leaf) for i, leaf in enumerate(jax.tree.leaves(template))
        ]
        return jax.tree.unflatten(jax.tree.structure(template), leaves)

    def close(self) -> None:
        self._manager.close()
