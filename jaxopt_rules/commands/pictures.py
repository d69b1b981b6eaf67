"""Pictures that commands write."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxopt_rules.experiments import output


def prepare(directory: Path) -> None:
    """Has a directory for them, and what draws them without a window, before anything takes its time.

    Raises:
      UserError: the directory cannot be made.
      ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("agg")
    output.make_directory(directory)


def save(plot: Callable[[], Any], path: Path) -> None:
    """Writes the figure of pyplot, of which `plot` gives the axes or an array of them, as PNG."""
    import matplotlib.pyplot as plt

    figure = np.ravel(plot())[0].figure
    try:
        output.save_picture(figure, path)
    finally:
        plt.close(figure)
