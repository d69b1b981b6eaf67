"""Files that experiments write, each of which is there whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jaxopt_rules.experiments.data import UserError
from jaxopt_rules.experiments.plots import save

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def make_directory(out: Path) -> None:
    """Makes the directory that `--out` names, where it is not there.

    Raises:
      UserError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the directory {out}: {error.strerror}; choose another --out") from error


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Gives the path of a temporary file, which takes the place of `path` when it is complete.

    Raises:
      UserError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --out") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_picture(figure: "Figure", path: Path) -> None:
    """Writes a figure as PNG.

    Raises:
      UserError: it cannot be written.
    """
    with replaced(path) as temporary:
        save(figure, temporary, dpi=150)
