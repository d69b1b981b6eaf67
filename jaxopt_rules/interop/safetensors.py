"""Safetensors: a state, or any pytree of arrays, in one file that is there whole or not at all.

    from jaxopt_rules.interop import safetensors

    safetensors.save("run.safetensors", {"params": params, "state": state})
    saved = safetensors.load("run.safetensors")
    run, _ = jr.load_state_dict({"params": params, "state": rule.init(params)}, saved)

Names are those of `state_dict`; of the pair above `params.blocks.0.w` and `state.adam.m.blocks/0/w`.
"""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxopt_rules.interop import needed
from jaxopt_rules.state import state_dict

files = needed("safetensors.numpy", "checkpoints")


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Writes the arrays of a pytree to a file, under the names that `state_dict` gives them.

    A file of this name is replaced when the new one is complete and on the disk: a run that is killed meanwhile leaves
    it as it was, and perhaps an unfinished file beside it, `.name-....tmp`.

    Args:
      path: where to. Its directory exists.
      tree: a state, a dict of parameters and states, or a flat dict such as `Optimizer.state_dict(model)`, whose names
        stay.

    Raises:
      TypeError: a leaf is no array, or of a dtype that the format has not; names it. Nothing is written.
    """
    path = Path(path)
    arrays = state_dict(tree)
    # The mode of files that are opened for writing, which temporary files do not have.
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".tmp")
    try:
        os.close(handle)
        for dtype, name in {x.dtype: name for name, x in arrays.items()}.items():
            try:  # what cannot be written, and what can be written but not read
                files.save_file({name: np.zeros(0, dtype)}, temporary)
                files.load_file(temporary)
            except Exception as error:
                raise TypeError(f"{path}: safetensors cannot hold '{name}', of dtype {dtype}") from error
        files.save_file(arrays, temporary)
        os.chmod(temporary, mode)
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _flush(path.parent)


def load(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The arrays of a file by their names, for `load_state_dict`. Files of other programs can be read, too.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a safetensors file, or not the whole of one; names it and says what is wrong.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if not path.is_file():
        raise ValueError(f"{path} is a directory, not a safetensors file")
    try:
        return files.load_file(path)
    except OSError:
        raise
    except Exception as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path}, of {size} bytes, is not a safetensors file or only a part of one: {error}"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path: str | Path) -> None:
    """Has what was written to a file, or to a directory, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
