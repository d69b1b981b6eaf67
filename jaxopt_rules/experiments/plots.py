"""What the plots of experiments have in common. matplotlib is imported when something is drawn."""

import base64
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_axes(width: float = 6.4, height: float = 4.0) -> "Axes":
    """Axes in a figure of pyplot, which notebooks show and `plt.show()` does."""
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def detached(width: float, height: float, draw: Callable[["Figure"], object]) -> "Figure":
    """A figure that pyplot knows nothing of, to be saved."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    return figure


def image(figure: "Figure") -> str:
    """A figure as an element of HTML."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return f'<img src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of each value and those before it, `width` in all; at the beginning, of as many as there are."""
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
