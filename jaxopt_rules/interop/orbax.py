"""Orbax: checkpoints of a run, under names that stay.

    from jaxopt_rules.interop.orbax import Checkpoints

    with Checkpoints("runs/first", keep=3) as checkpoints:
        if checkpoints.latest_step is not None:
            done, trees, _ = checkpoints.restore(params=params, state=state)
            params, state = trees["params"], trees["state"]
        for step in range(done + 1, 1001):
            params, state = train_step(params, state)
            checkpoints.save(step, params=params, state=state)

Orbax alone names leaves by their positions, so that a checkpoint cannot be read any more once clipping stands in front
of the chain, and takes no empty arrays. Here leaves have the names of `state_dict`, and what a checkpoint holds is what
`load_state_dict` reads. The files are Orbax's: its tools read them.
"""

import contextlib
import json
import operator
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxopt_rules import trees
from jaxopt_rules.interop import needed
from jaxopt_rules.state import LoadReport, named_leaves, take_over

ocp = needed("orbax.checkpoint", "checkpoints")
tensorstore = needed("tensorstore", "checkpoints")  # Orbax's own storage, which decides what can be saved

_ON_HOST = ocp.RestoreArgs(restore_type=np.ndarray)
_METADATA = Path("default", "_METADATA")  # where Orbax keeps the structure, within a checkpoint


class Restored(NamedTuple):
    """What `Checkpoints.restore` gives."""

    step: int
    trees: dict[str, Any]  # by the names under which they were saved
    reports: dict[str, LoadReport]  # what could not be loaded, for each of them


class Checkpoints:
    """The checkpoints in a directory, one for each step that was saved.

    A checkpoint is written beside the others and gets its name when it is complete: a run that is killed meanwhile
    leaves them as they were, and what it left unfinished is never read. A step that is there is not overwritten, also
    if another process saved it; only two that save the same step at the same time do not see each other. Nothing but
    what `keep` says is deleted, after the new checkpoint is complete.

    Args:
      directory: of the checkpoints; made if there is none. `manager.directory` is its absolute path.
      keep: how many checkpoints to keep, the latest ones; `None`: all.
      options: further fields of `orbax.checkpoint.CheckpointManagerOptions`, such as `save_interval_steps=100`,
        `cleanup_tmp_directories=True` (removes what a killed run left; not while another process saves there) or
        `enable_async_checkpointing=False`.

    Raises:
      NotADirectoryError: `directory` is a file.

    Example:
      checkpoints = Checkpoints("runs/first", save_interval_steps=100)
    """

    def __init__(self, directory: str | os.PathLike[str], keep: int | None = None, **options: Any) -> None:
        path = Path(directory).absolute()
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"{path} is a file, not a directory of checkpoints")
        chosen = ocp.CheckpointManagerOptions(max_to_keep=keep, **options)
        self.manager = ocp.CheckpointManager(path, item_handlers=ocp.PyTreeCheckpointHandler(), options=chosen)
        """Orbax's manager, for what goes beyond this class: `checkpoints.manager.delete(step)`."""
        self._names = chosen.step_name_format or ocp.path.step.standard_name_format(
            step_prefix=chosen.step_prefix, step_format_fixed_length=chosen.step_format_fixed_length
        )
        self._closed = False

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits until everything is saved. Nothing can be saved or restored afterwards."""
        self._closed = True
        self.manager.close()

    def wait(self) -> None:
        """Waits until everything is saved, and raises what went wrong with it."""
        self.manager.wait_until_finished()

    @property
    def latest_step(self) -> int | None:
        """The step of the latest complete checkpoint, as in `steps`."""
        return max(self.steps, default=None)

    @property
    def steps(self) -> list[int]:
        """The steps of all complete checkpoints that are in the directory now, whichever process saved them.

        What `save` has begun is among them when it is complete, at the latest after `wait()`.
        """
        # Not the manager's list: it does not know what others saved, and has what is not yet complete.
        return sorted(found.step for found in self._names.find_all(self.manager.directory))

    def save(self, step: int, /, **trees: Any) -> bool:
        """Begins to save these trees, and returns when their arrays may be donated; files are written meanwhile.

        Args:
          step: later than all that were saved, at least 0.
          trees: of arrays and numbers, under names of your choice; at least one.

        Returns:
          Whether the options had this step saved.

        Raises:
          TypeError: a leaf is no array, or of a dtype that Orbax has not; names it.
          ValueError: there is a checkpoint of this step, or of a later one; or no tree is given; or this is closed.
        """
        self._check_open()
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"a step is at least 0, not {step}")
        if not trees:
            raise ValueError(f"save({step}) is given no tree; name what is to be saved: save({step}, params=params)")
        # Orbax has no empty arrays. They hold nothing that could be lost.
        named = {
            item: {name: _storable(item, name, x) for name, x in named_leaves(tree).items() if np.size(x)}
            for item, tree in trees.items()
        }
        known = self.manager.latest_step()
        if (known is None or known < step) and not self.manager.should_save(step):
            return False
        # The manager writes over what it does not know of.
        self._reload()
        latest = self.manager.latest_step()
        if latest is not None and step <= latest:
            raise ValueError(
                f"{self.manager.directory} has a checkpoint of step {latest}, so that step {step} cannot be saved. To "
                f"go on from an earlier one, delete the later ones, checkpoints.manager.delete({latest}), or use "
                "another directory"
            )
        return self.manager.save(step, args=ocp.args.PyTreeSave(named))

    def restore(
        self,
        step: int | None = None,
        /,
        *,
        strict: bool = True,
        hyperparams: Literal["saved", "new"] = "saved",
        **like: Any,
    ) -> Restored:
        """The trees that were saved at a step, built and placed like those given. Others in it are not read.

            restored = checkpoints.restore(params=params, state=rule.init(params))
            restored = checkpoints.restore(state=rule.init(params), strict=False)  # of a chain with one hook more

        Args:
          step: of the checkpoint; `None`: the latest.
          strict: whether everything must fit, as in `load_state_dict`; else what does not stays as it is in `like`.
          hyperparams: "saved" takes them from the checkpoint, "new" keeps those of `like`.
          like: trees as they are wanted, of arrays or of `jax.ShapeDtypeStruct`s, by the names under which they were
            saved. Arrays that are bound to a place, and structs with a sharding, say where to; that may be another mesh
            than that of the run that saved them.

        Raises:
          FileNotFoundError: there is no checkpoint, or none of this step.
          ValueError: a file is damaged, foreign or missing; or, if `strict`, something does not fit or a whole tree is
            not there. Names the directory, and what is wrong. Nothing is deleted: earlier checkpoints can be restored
            by their step. Or this is closed.
        """
        step, path, found = self._found(step)
        if strict and (absent := [repr(item) for item in like if item not in found]):
            held = ", ".join(map(repr, sorted(found))) or "none"
            raise ValueError(f"{path} has no tree {' and no tree '.join(absent)}; the trees in it are: {held}")
        saved: dict[str, dict[str, Any]] = {}
        arguments: dict[str, dict[str, Any]] = {}
        for item, tree in like.items():
            wanted, there = named_leaves(tree), found.get(item, {})
            empty = {name: np.zeros(np.shape(x), jnp.result_type(x)) for name, x in wanted.items() if not np.size(x)}
            saved[item] = empty | {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in there.items()}
            arguments[item] = {
                name: _arguments(x) for name, x in wanted.items() if name in there and there[name].shape == np.shape(x)
            }
        for item, arrays in self._read(step, path, arguments).items():
            saved[item] |= arrays
        restored, reports = {}, {}
        for item, tree in like.items():
            try:
                restored[item], reports[item] = take_over(tree, saved[item], strict, hyperparams)
            except ValueError as error:
                raise ValueError(f"{path}, {item}: {error}") from error
        return Restored(step, restored, reports)

    def load(self, step: int | None = None) -> dict[str, dict[str, np.ndarray]]:
        """All that was saved at a step: for each tree its arrays by their names, for `load_state_dict`.

            optimizer.load_state_dict(model, checkpoints.load()["optimizer"])

        Raises:
          FileNotFoundError, ValueError: as `restore`.
        """
        step, path, found = self._found(step)
        return {item: {} for item in found} | self._read(
            step, path, {item: dict.fromkeys(there, _ON_HOST) for item, there in found.items()}
        )

    def _check_open(self) -> None:
        # Orbax would fail after it has begun, and what waits for it then holds up the end of the process.
        if self._closed:
            raise ValueError(f"these checkpoints, of {self.manager.directory}, are closed: open them again")

    def _reload(self) -> None:
        """Has the manager know of all that is in the directory, whoever saved it."""
        self.manager.wait_until_finished()  # it would forget what it is still writing
        # To open each of them takes a millisecond and more, and seldom has anyone else written. Processes of one run
        # may read together, so that all or none of them must.
        known = (
            {self._names.build_name(step) for step in self.manager.all_steps()} if jax.process_count() == 1 else None
        )
        for _ in range(3):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # deleted since it was listed
                return None if known == set(os.listdir(self.manager.directory)) else self.manager.reload()
        return self.manager.reload()

    def _found(self, step: int | None) -> tuple[int, Path, dict[str, dict[str, Any]]]:
        """The step, the directory of its checkpoint, and what is in it: shapes and dtypes."""
        self._check_open()
        self._reload()
        steps: list[int] = sorted(self.manager.all_steps())
        directory = Path(self.manager.directory)
        if not steps:
            raise FileNotFoundError(f"there is no checkpoint in {directory}")
        step = steps[-1] if step is None else operator.index(step)
        if step not in steps:
            raise FileNotFoundError(
                f"{directory} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}"
            )
        path = directory / self._names.build_name(step)
        with _explained(path):
            metadata = self.manager.item_metadata(step)
        tree = getattr(metadata, "tree", None)
        if not (isinstance(tree, dict) and all(isinstance(part, dict) for part in tree.values())):
            raise ValueError(
                f"{path} was not written by Checkpoints, or {path / _METADATA} is missing; "
                f"it holds {', '.join(sorted(x.name for x in path.iterdir())) or 'no files'}"
            )
        return step, path, tree

    def _read(self, step: int, path: Path, arguments: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The arrays that these arguments are for."""
        arguments = {item: those for item, those in arguments.items() if those}
        if not arguments:
            return {}
        args = ocp.args.PyTreeRestore(
            item=jax.tree.map(lambda _: 0, arguments, is_leaf=lambda x: isinstance(x, ocp.RestoreArgs)),
            restore_args=arguments,
            partial_restore=True,
        )
        with _explained(path):
            return self.manager.restore(step, args=args)


def _storable(item: str, name: str, x: Any) -> Any:
    """An array that Orbax takes: of complex numbers of Python and of scalars of NumPy it takes not all."""
    x = x if isinstance(x, Array) else np.asarray(x)
    try:
        tensorstore.dtype(x.dtype.name)
    except ValueError as error:
        raise TypeError(f"Orbax cannot save {trees.quoted(name)} of {item}, which is of dtype {x.dtype}") from error
    return x


def _arguments(x: Any) -> Any:
    """How Orbax reads what is to stand where `x` does: to where that is bound, else to the host."""
    sharding = trees.binding(x)
    return _ON_HOST if sharding is None else ocp.ArrayRestoreArgs(sharding=sharding)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Has what Orbax raises while it reads a checkpoint say which it was."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise ValueError(f"{path / _METADATA} is truncated or foreign: {error}") from error
    except Exception as error:
        reason = str(error).partition(" [tensorstore_spec=")[0]
        raise ValueError(f"{path} is damaged, incomplete or foreign: {reason}") from error
