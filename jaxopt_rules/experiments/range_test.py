"""The learning rate range test: one run under a growing rate, which shows with which ones a model can be trained."""

import math
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxopt_rules.experiments import plots
from jaxopt_rules.experiments.progress import progress
from jaxopt_rules.experiments.training import PART, Block, Program, Task
from jaxopt_rules.schedules import Exponential
from jaxopt_rules.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOISE = 4  # standard errors of the smoothed loss that a fall has to exceed
LEAST_FALL = 1e-4  # of the loss; what is less may be rounding


@dataclass(frozen=True, repr=False)
class RangeTest:
    """What a range test found. It prints its findings, and shows as a picture in Jupyter."""

    rates: np.ndarray  # (steps)  the learning rate of each update
    losses: np.ndarray  # (seeds, steps)  the loss behind that update; NaN where none was made
    start: np.ndarray  # (seeds)  the loss before the first
    window: int  # the number of steps that smoothing takes together
    interrupted: bool
    compile_seconds: float
    seconds: float  # without compilation

    @cached_property
    def loss(self) -> np.ndarray:
        """(steps)  The mean over the seeds."""
        with np.errstate(invalid="ignore", over="ignore"):
            return self.losses.mean(axis=0, dtype=float)

    @property
    def stop(self) -> int:
        """The number of updates up to where the loss diverged: is not finite, or above twice the one at the start."""
        start = self.start.mean(dtype=float)
        with np.errstate(invalid="ignore"):
            bad = ~np.isfinite(self.loss) | (self.loss > start + abs(start)) | ~np.isfinite(start)
        return int(np.argmax(bad)) if bad.any() else len(bad)

    @property
    def diverged_at(self) -> float | None:
        """The rate of the update behind which the loss had diverged; `None`: it never did."""
        made = np.count_nonzero(~np.isnan(self.losses).all(axis=0)) if self.interrupted else len(self.rates)
        return float(self.rates[self.stop]) if self.stop < made else None

    @cached_property
    def smoothed(self) -> np.ndarray:
        """(steps)  The loss, averaged over neighbours with Hann's weights; NaN from where it diverged.

        The mean is centred. The running mean that is customary lags behind by half its length, which over a grid as
        coarse as this is a factor of several.
        """
        smooth = np.full(len(self.rates), np.nan)
        values = self.loss[: self.stop]
        if len(values):
            weights = _hann(min(self.window, len(values)))
            total = np.convolve(values, weights)
            count = np.convolve(np.ones(len(values)), weights)
            begin = len(weights) // 2
            smooth[: self.stop] = (total / count)[begin : begin + len(values)]
        return smooth

    @cached_property
    def _places(self) -> tuple[int, int] | None:
        """Where the smoothed loss falls most steeply, and where it is least; `None`: it does not fall."""
        smooth = self.smoothed[: self.stop]
        if len(smooth) < 3:
            return None
        least = int(np.argmin(smooth))
        weights = _hann(self.window)
        error = np.std(np.diff(self.loss[: self.stop])) / math.sqrt(2)  # of one loss, where the course is smooth
        noise = error * math.sqrt(np.sum(weights**2)) / np.sum(weights)
        highest = float(np.max(smooth[: least + 1]))
        # Only a part of the differences is noise where the loss falls within few steps, and so more than a fall by a
        # tenth of the loss needs no proof.
        needed = max(min(NOISE * noise, 0.1 * abs(highest)), LEAST_FALL * abs(highest))
        if least == 0 or not highest - smooth[least] > needed:
            return None
        return int(np.argmin(np.gradient(smooth)[: least + 1])), least

    @property
    def steepest(self) -> float | None:
        """The rate at which the smoothed loss falls most, per factor of the rate, before its minimum.

        `None`: the loss does not fall, by more than its noise.
        """
        return None if self._places is None else float(self.rates[self._places[0]])

    @property
    def minimum(self) -> float | None:
        """The rate at which the smoothed loss is least; from here on the rate is too high."""
        return None if self._places is None else float(self.rates[self._places[1]])

    @property
    def suggestion(self) -> float | None:
        """A learning rate to begin with: `steepest`.

        As in fastai, which has made the test common. It is for a constant rate, or for the peak of a schedule. Its
        other suggestion, a tenth of `minimum`, is bolder where the two differ.
        """
        return self.steepest

    @property
    def note(self) -> str:
        """What keeps the test from telling more."""
        low, high = (f"{rate:.3g}" for rate in self.rates[[0, -1]])
        if not np.isfinite(self.start).all():
            return "the loss is not finite before the first update: it is the start or the batch, and no learning rate"
        if self.stop < 3 and self.diverged_at is not None:
            return f"the loss diverges at once: low = {low} is too high, or the rule is no good at any rate"
        if self.interrupted:
            return "interrupted"
        if self._places is None:
            return f"the loss does not fall between {low} and {high}, by more than its noise"
        steepest, least = self._places
        if least >= len(self.rates) - 1 - self.window // 2:
            return f"the loss still falls at the end: high = {high} is too low"
        if steepest == 0:
            return f"the loss falls most at the beginning: low = {low} is too high"
        return ""

    @property
    def table(self) -> Table:
        """The findings: a rate and the smoothed loss there. For all steps there are `rates`, `loss` and `smoothed`."""
        rows: list[tuple[str, float, float]] = []
        if self._places is not None:
            for name, k in zip(("steepest", "minimum"), self._places, strict=True):
                rows.append((name, _short(self.rates[k]), _short(self.smoothed[k])))
        if self.diverged_at is not None:
            rows.append(("diverged", _short(self.diverged_at), _short(self.loss[self.stop])))
        return Table(("what", "learning_rate", "loss"), tuple(rows))

    def __repr__(self) -> str:
        return f"{self._summary()}\n{self.table}" if self.table.cells else self._summary()

    def _summary(self) -> str:
        suggested = "no suggestion" if self.suggestion is None else f"suggestion {self.suggestion:.2g}"
        low, high = self.rates[[0, -1]]
        note = f"; {self.note}" if self.note else ""
        return f"RangeTest: {len(self.rates)} steps, learning rate {low:.3g} to {high:.3g}: {suggested}{note}"

    def _repr_html_(self) -> str:
        def draw(figure: "Figure") -> None:
            self.plot(figure.subplots())

        table = self.table._repr_html_() if self.table.cells else ""
        return f"<p>{escape(self._summary())}</p>{plots.image(plots.detached(6.4, 4.0, draw))}{table}"

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """The loss against the learning rate, smoothed and (thin) as it was, up to where it diverged."""
        ax = ax or plots.new_axes()
        shown = min(self.stop + 1, len(self.rates))
        ax.plot(self.rates[:shown], self.loss[:shown], color="0.6", linewidth=0.8, label="loss")
        ax.plot(self.rates, self.smoothed, color="C0", linewidth=2.2, label=f"mean of {self.window} steps")
        if self._places is not None:
            for name, color, k in zip(("steepest", "minimum"), ("C2", "C1"), self._places, strict=True):
                label = f"{name}: {self.rates[k]:.2g}"
                ax.plot(self.rates[k], self.smoothed[k], "o", color=color, markersize=7, label=label, zorder=3)
            ax.axvline(self.rates[self._places[0]], color="C2", linewidth=1, linestyle="--")
        if self.diverged_at is not None:
            ax.axvspan(self.diverged_at, self.rates[-1], color="C3", alpha=0.1, linewidth=0, label="diverged")
        values = np.append(self.loss[: self.stop], self.start.mean())
        if np.isfinite(values).all() and np.ptp(values) > 0:
            margin = 0.06 * np.ptp(values)
            ax.set_ylim(values.min() - margin, values.max() + margin)
        ax.set_xscale("log")
        ax.set_xlim(self.rates[0], self.rates[-1])
        ax.legend(frameon=False)
        plots.style(ax, xlabel="learning rate", ylabel="loss", title=textwrap.fill(self.note, 60))
        ax.title.set_fontsize("small")
        return ax


def learning_rate_range_test(
    make_rule: Callable[..., Any],
    loss_fn: Callable[..., Any],
    params: Any,
    batches: Any,
    steps: int = 100,
    *,
    low: float = 1e-7,
    high: float = 10.0,
    seeds: int | Iterable[int] = 1,
    has_aux: bool = False,
    window: int | None = None,
    shown: bool = True,
) -> RangeTest:
    """Trains once under a learning rate that grows exponentially, and finds the rates at which the loss falls.

        found = learning_rate_range_test(adamw, loss_fn, params, batches)
        rule = adamw(found.suggestion)

        clipped = lambda rate: chain(clip_by_global_norm(1.0), adamw(rate))
        found = learning_rate_range_test(clipped, loss_fn, params, batches, steps=200, seeds=3)

    Update k of K has the rate low · (high / low)^(k / (K − 1)), and the loss behind it is kept. Smith 2015
    (arXiv:1506.01186, section 3.3) lets the rate grow linearly; exponential growth, by which one test spans all
    magnitudes, and the rate of steepest descent as a suggestion are those of fastai's `lr_find`.

    It ends where every seed's loss is not finite, or with Ctrl-C.

    Args:
      make_rule: called with the schedule of the learning rate; gives a rule. Constructors such as `adamw` are that. A
        warm-up or decay that it adds is tested along with it.
      loss_fn: `loss_fn(params, batch) -> loss`, or with `has_aux` `(loss, {name: scalar})`.
      params: the parameters at the start, or a function of a PRNG key that makes them. They are not changed.
      batches: arrays with an axis of batches in front; an iterable of batches; or a function of a seed that gives one
        of these. Where there are fewer than steps + 1, they come again.
      steps: K, how many updates. The more, the longer each magnitude lasts, and the lower are the rates at which the
        loss falls.
      low, high: the first and the last learning rate.
      seeds: those that `params` and `batches` are called with, or as many, from 0; their mean loss is taken.
      window: how many steps the smoothing takes together. `None`: a sixth of them.
      shown: whether a progress bar is.

    Returns:
      A `RangeTest`: `suggestion`, `steepest`, `minimum`, the curves, and `plot()`.

    Raises:
      TypeError: `make_rule` is a rule, or gives none; or as `Task` says.
      ValueError: `low` and `high` are no range, `steps` is below 3 or `window` below 1; or as `Task` says.
    """
    if not callable(make_rule):
        raise TypeError(
            "make_rule is a function of the schedule of the learning rate that gives a rule, adamw or "
            f"lambda rate: chain(clip_by_global_norm(1.0), adamw(rate)), not {make_rule!r}"
        )
    if not (isinstance(steps, int | np.integer) and steps >= 3):
        raise ValueError(f"steps must be an integer >= 3, not {steps!r}")
    if not 0 < low < high < math.inf:
        raise ValueError(f"low and high must be rates with 0 < low < high, not {low!r} and {high!r}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, not {window!r}")
    schedule = Exponential(low, int(steps) - 1, high / low)
    # One more step gives the loss behind the last update.
    task = Task(loss_fn, params, batches, int(steps) + 1, seeds=seeds, has_aux=has_aux)
    program = Program(lambda: make_rule(schedule), [{}], [], task)
    with progress("range test", task.steps, shown) as bar:
        block = Block(program)
        losses = block.curves()["loss"][0]
        going = alive = True
        while going and alive and block.done < task.steps:
            going = bar.advance(block.advance(PART))
            losses = block.curves()["loss"][0]
            alive = bool(np.isfinite(losses[:, block.done - 1]).any())
    counts = np.arange(steps)
    return RangeTest(
        rates=low * (high / low) ** (counts / (steps - 1)),
        losses=losses[:, 1:],
        start=losses[:, 0],
        window=max(1, round(steps / 6)) if window is None else int(window),
        interrupted=alive and block.done < task.steps,
        compile_seconds=program.compile_seconds,
        seconds=block.seconds,
    )


def _hann(window: int) -> np.ndarray:
    """Weights for as many steps, or one less, so that there is one in the middle."""
    odd = window - 1 + window % 2
    return np.hanning(odd + 2)[1:-1]


def _short(x: float) -> float:
    return float(f"{x:.4g}")
