"""The learning rate range test: one run under a growing rate, which shows with which ones a model can be trained."""

import math
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxopt_rules.experiments import plots
from jaxopt_rules.experiments.progress import progress
from jaxopt_rules.experiments.training import PART, Block, Program, Task
from jaxopt_rules.schedules import Exponential
from jaxopt_rules.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST_STEPS = 10  # that tell something about noise
DOUBT = 3.3  # standard errors that noise reaches in less than one test of a hundred
LEAST_FALL = 1e-4  # of the loss; what is less may be rounding
LARGE_NOISE = 0.05  # of the loss: the standard error of its mean over the beginning


@dataclass(frozen=True, repr=False, eq=False)
class RangeTest:
    """What a range test found. It prints its findings, and shows as a picture in Jupyter."""

    rates: np.ndarray  # (steps)  the learning rate of each update
    losses: np.ndarray  # (seeds, steps)  the loss behind that update; NaN where none was made
    start: np.ndarray  # (seeds)  the loss before the first
    window: int  # the number of steps that smoothing takes together
    rate_used: bool  # whether the rule asked the schedule for its rate
    interrupted: bool
    compile_seconds: float
    seconds: float  # without compilation

    @cached_property
    def loss(self) -> np.ndarray:
        """(steps)  The mean over the seeds."""
        with np.errstate(invalid="ignore", over="ignore"):
            return self.losses.mean(axis=0, dtype=float)

    @property
    def _sixth(self) -> int:
        """How many steps tell a level from its noise."""
        return max(round(len(self.rates) / 6), LEAST_STEPS)

    @property
    def _beginning(self) -> np.ndarray:
        """The finite ones among the first losses, behind rates so low that little is learnt."""
        first = np.append(self.start.mean(dtype=float), self.loss[: self._sixth])
        return first[: _first(~np.isfinite(first))]

    def _limit(self, multiple: float) -> float:
        """Above the level of the beginning by so many times that, and by more than noise makes of it."""
        level = np.mean(self._beginning)
        with np.errstate(over="ignore"):
            error = np.std(self._beginning) / math.sqrt(self._sixth)
        return float(level + max(multiple * abs(level), 2 * DOUBT * error))

    @cached_property
    def stop(self) -> int:
        """The number of updates up to where the loss diverged.

        It is not finite there; or for a sixth of the steps, or up to the end, its running mean and a quarter of the
        losses are above the mean at the beginning, by more than three times that and more than noise makes of it.
        Single losses tell nothing: those of small batches differ by orders of magnitude.
        """
        finite = _first(~np.isfinite(self.loss)) if len(self._beginning) else 0
        values = self.loss[:finite]
        if finite == 0:
            return 0
        limit = self._limit(3)
        high = _smooth(values, self._sixth) > limit
        # By the end of each run of high means, which lasts to the end of all if no low one follows.
        ends = np.array([k + _first(~high[k:]) for k in range(finite)])
        lasting = (ends - np.arange(finite) >= self._sixth) | (ends == finite)
        many = np.array([np.quantile(values[k : k + self._sixth], 0.75) > limit for k in range(finite)])
        # The means rise before the losses do.
        return _first(high & lasting & many & (values > limit))

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
        smooth[: self.stop] = _smooth(self.loss[: self.stop], self.window)
        return smooth

    @cached_property
    def _places(self) -> tuple[int, int] | None:
        """Where the smoothed loss falls most steeply, and where it is least; `None`: it does not fall."""
        smooth, before = self.smoothed[: self.stop], self._beginning
        if len(smooth) < 3 or not self.rate_used:
            return None
        level, rise = np.mean(before), self._limit(1)
        # Behind losses that are clearly higher than at the beginning, lower ones come and go.
        least = int(np.argmin(smooth[: max(_first(smooth > rise), 1)]))
        if least == 0 or not level - smooth[least] > LEAST_FALL * abs(level):
            return None
        # Ranks, since a mean is at the mercy of the largest loss: few batches cause most of it where they are small.
        around = (
            self.loss[max(0, begin) : min(begin + length, self.stop)]
            for length in (LEAST_STEPS, self._sixth)
            for begin in (least - length // 2, least - length + 1)
        )
        if not any(_doubt_of_equality(before, behind) > DOUBT for behind in around):
            return None
        # What falls before the loss is at the level of the beginning for the last time is noise.
        above = np.flatnonzero(smooth[:least] >= level)
        begin = above[-1] if above.size else 0
        return int(begin + np.argmin(np.gradient(smooth)[begin : least + 1])), least

    @property
    def steepest(self) -> float | None:
        """The rate at which the smoothed loss falls most, per factor of the rate, before its minimum.

        `None`: the losses around the minimum are not lower than those at the beginning, by the rank sum test.
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
        if not self.rate_used:
            return "make_rule does not use the learning rate that it is given"
        if self._places is None and self.diverged_at is not None and self.stop <= self._sixth:
            return f"the loss diverges at once: low = {low} is too high, or the rule is no good at any rate"
        if self.interrupted:
            return "interrupted"
        if self._places is None:
            before = self._beginning
            if len(self.rates) < 2 * LEAST_STEPS:
                return f"{len(self.rates)} steps are too few to tell a fall of the loss from its noise"
            if np.std(before) > LARGE_NOISE * math.sqrt(len(before)) * abs(np.mean(before)):
                return "the loss is too noisy to tell whether it falls: give seeds, larger batches or more steps"
            below = high if self.diverged_at is None else f"{self.diverged_at:.3g}, where it diverges"
            return f"the loss does not fall between {low} and {below}, by more than its noise"
        steepest, least = self._places
        if steepest <= max(self.window, self._sixth) // 2:
            return f"the loss falls most at the beginning: low = {low} is too high"
        if self.diverged_at is None and least >= len(self.rates) - 1 - self.window // 2:
            return f"the loss still falls at the end: high = {high} is too low"
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
        return f"<p>{escape(self._summary())}</p>{plots.shown(6.4, 4.0, draw)}{table}"

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
        loss falls. Below 20 no fall can be told from noise.
      low, high: the first and the last learning rate.
      seeds: those that `params` and `batches` are called with, or as many, from 0; their mean loss is taken.
      window: how many steps the smoothing takes together. `None`: a sixth of them.
      shown: whether a progress bar is.

    Returns:
      A `RangeTest`: `suggestion`, `steepest`, `minimum`, the curves, and `plot()`.

    Raises:
      TypeError: `make_rule` is a rule, or gives none; or as `Task` says.
      ValueError: `low` and `high` are no range, `steps` is no integer from 3 or `window` none from 1; or as
        `Task` says.
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
    if not (window is None or (isinstance(window, int | np.integer) and window >= 1)):
        raise ValueError(f"window must be an integer of at least 1, not {window!r}")
    asked: list[bool] = []

    class Rate(Exponential):
        def __call__(self, count: ArrayLike) -> Array:
            asked.append(True)
            return super().__call__(count)

    schedule = Rate(low, int(steps) - 1, high / low)
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
        rate_used=bool(asked),
        interrupted=alive and block.done < task.steps,
        compile_seconds=program.compile_seconds,
        seconds=block.seconds,
    )


def _hann(window: int) -> np.ndarray:
    """Weights for as many steps, or one less, so that there is one in the middle."""
    odd = window - 1 + window % 2
    return np.hanning(odd + 2)[1:-1]


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The centred mean with Hann's weights; at the ends, of those neighbours that there are."""
    if not len(values):
        return values
    weights = _hann(min(window, len(values)))
    begin = len(weights) // 2
    total, count = (np.convolve(x, weights)[begin : begin + len(values)] for x in (values, np.ones(len(values))))
    return total / count


def _first(which: np.ndarray) -> int:
    """The place of the first that is true; behind the last where none is."""
    return int(np.argmax(which)) if which.any() else len(which)


def _doubt_of_equality(before: np.ndarray, behind: np.ndarray) -> float:
    """By how many standard errors more values of `before` are above those of `behind` than chance has it.

    The rank sum test of Mann and Whitney, in its normal approximation.
    """
    above = np.mean((before[:, None] > behind) + 0.5 * (before[:, None] == behind))
    n, m = len(before), len(behind)
    return float((above - 0.5) / math.sqrt((n + m + 1) / (12 * n * m)))


def _short(x: float) -> float:
    return float(f"{x:.4g}")
