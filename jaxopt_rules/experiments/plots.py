"""What the plots of experiments have in common. matplotlib is imported when something is drawn."""

import base64
import io
import os
import textwrap
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from jaxopt_rules import markup
from jaxopt_rules.interop import needed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What a legend may have that stands inside of axes.
_MOST_LABELS, _MOST_LETTERS = 6, 24


def new_axes(width: float = 6.4, height: float = 4.0) -> "Axes":
    """Axes in a figure of pyplot, which notebooks show and `plt.show()` does."""
    return _new_figure(width, height).subplots()


def drawn(width: float, height: float, draw: Callable[["Figure"], Any]) -> np.ndarray:
    """The axes, which `draw` gives, of a figure of pyplot. (A notebook shows a figure that is returned twice.)"""
    return np.array(draw(_new_figure(width, height)), dtype=object)


def _new_figure(width: float, height: float) -> "Figure":
    needed("matplotlib", "experiments")
    import matplotlib.pyplot as plt

    return plt.figure(figsize=(width, height), layout="constrained")


def detached(width: float, height: float, draw: Callable[["Figure"], object]) -> "Figure":
    """A figure that pyplot knows nothing of, to be saved."""
    needed("matplotlib", "experiments")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    return figure


def shown(width: float, height: float, draw: Callable[["Figure"], object]) -> str:
    """What is drawn as an element of HTML; without matplotlib, a remark in its place."""
    if find_spec("matplotlib") is None:
        return markup.faint("(no picture: matplotlib is not installed)")
    return image(detached(width, height, draw))


def image(figure: "Figure") -> str:
    """A figure as an element of HTML."""
    buffer = io.BytesIO()
    save(figure, buffer, dpi=100)
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def save(figure: "Figure", file: "str | os.PathLike[str] | IO[bytes]", dpi: float) -> None:
    """Writes a figure as PNG."""
    with warnings.catch_warnings():
        # Names may have letters that the font lacks. They come out as boxes.
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(file, format="png", dpi=dpi)


def label(text: object, width: int = 32, lines: int = 2) -> str:
    """A text for a legend, ticks or a title: wrapped, shortened to some lines, and shown letter by letter."""
    wrapped = textwrap.wrap(str(text), width, break_on_hyphens=False)
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], wrapped[lines - 1][: width - 1] + "…"]
    # Between two dollars matplotlib sets formulas, and a legend leaves out what begins with an underscore.
    joined = "\n".join(wrapped).replace("$", r"\$")
    return f" {joined}" if joined.startswith("_") else joined


def crowded(labels: Sequence[str]) -> bool:
    """Whether a legend of these labels would cover what is drawn."""
    return len(labels) > _MOST_LABELS or any(len(line) > _MOST_LETTERS or "\n" in line for line in labels)


def below(labels: Sequence[str], width: float) -> tuple[int, float]:
    """The columns, and the inches of height, of a legend of these labels below a picture of this width."""
    letters = max(len(line) for text in labels for line in text.split("\n"))
    columns = max(1, min(len(labels), int(width / (0.6 + 0.075 * letters))))
    rows = -(-len(labels) // columns)
    return columns, 0.3 + 0.16 * rows * max(1 + text.count("\n") for text in labels)


def room(labels: Sequence[str], width: float) -> float:
    """The inches that a picture of this width needs below for its legend."""
    return below(labels, width)[1] if crowded(labels) else 0.0


def legend(ax: "Axes", handles: Sequence[Any], labels: Sequence[str], width: float) -> None:
    """A legend inside of the axes; below them, over this width, where it would cover them."""
    if not labels:
        return
    if not crowded(labels):
        ax.legend(handles, labels, frameon=False, fontsize="small")
        return
    from matplotlib.transforms import ScaledTranslation

    under_ticks = ax.transAxes + ScaledTranslation(0, -0.5, ax.figure.dpi_scale_trans)
    anchor = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "bbox_transform": under_ticks}
    ax.legend(handles, labels, **anchor, ncols=below(labels, width)[0], frameon=False, fontsize="small")


def legend_of_all(figure: "Figure", handles: Sequence[Any], labels: Sequence[str]) -> None:
    """One legend for all axes of a figure, below them."""
    columns = below(labels, figure.get_figwidth())[0]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")


def remark(ax: "Axes", text: str) -> None:
    """What axes say that have nothing to show."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color="0.5")


def marker(values: np.ndarray) -> str:
    """A dot for a curve of one point, which has no line."""
    return "o" if np.isfinite(values).sum() == 1 else ""


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of each value and those before it, `width` in all; at the beginning, of as many as there are."""
    if not len(values):
        return np.asarray(values, float)
    with np.errstate(invalid="ignore", over="ignore"):
        sums = np.convolve(np.asarray(values, float), np.ones(width))[: len(values)]
    return sums / np.minimum(np.arange(1, len(values) + 1), width)


def spans_decades(values: Any) -> bool:
    """Whether a logarithmic scale shows them better."""
    low, high = (min(values), max(values)) if len(values) else (0, 0)
    return low > 0 and high / low > 20


def words(name: str) -> str:
    return name.replace("_", " ")


def style(ax: "Axes", **settings: Any) -> None:
    """Labels and a grid behind what is drawn."""
    ax.set(**settings)
    ax.grid(color="0.5", alpha=0.2)
    ax.set_axisbelow(True)
