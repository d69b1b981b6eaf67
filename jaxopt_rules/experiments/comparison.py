"""Comparisons: several rules on the same starts and the same batches, with the same budget."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from html import escape
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jaxopt_rules.experiments import plots
from jaxopt_rules.experiments.progress import Bar, progress
from jaxopt_rules.experiments.training import PART, TAIL, Block, Program, Task, diverged, last_losses
from jaxopt_rules.rule import Rule, as_rule
from jaxopt_rules.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_WIDTH = 13  # of the pictures
MOST_STEPS = 100_000  # of a run that is limited by seconds, whose curves are given their memory at the start


@dataclass(frozen=True, repr=False, eq=False)
class Run:
    """What one rule of a comparison did, from all seeds."""

    rule: Rule
    curves: dict[str, np.ndarray]  # (seeds, steps)  the loss of each step, and what loss_fn gave beside it
    times: np.ndarray  # (steps)  seconds of training behind each step, of all seeds together; without compilation
    final: dict[str, np.ndarray]  # (seeds)  the mean loss of the last tenth of the steps, and of `evaluate`
    finished: bool  # whether it made all steps, or had all its seconds
    compile_seconds: float
    state_bytes: int  # of one seed

    @property
    def steps(self) -> int:
        """Those that were made."""
        return len(self.times)

    @property
    def seconds(self) -> float:
        """Of training, of all seeds together; without compilation."""
        return float(self.times[-1]) if self.steps else 0.0

    @property
    def ms_per_step(self) -> float:
        """Of all seeds together; NaN where no step was made."""
        return 1e3 * self.seconds / self.steps if self.steps else math.nan

    @cached_property
    def diverged(self) -> np.ndarray:
        """(seeds)  Which have a loss that is not finite, or end above twice the one they began with."""
        return diverged(self.curves["loss"], self.final["loss"], self.steps)


@dataclass(frozen=True, repr=False, eq=False)
class Comparison:
    """What a comparison found. It prints as a table, best first, and shows as pictures and a table in Jupyter."""

    runs: dict[str, Run]  # by the names of the rules
    seeds: tuple[int, ...]
    steps: int  # the most that a rule could make
    seconds: float | None  # the budget of each rule, where it was one of time
    by: str  # the entry of `final` that rules are ranked by
    largest: bool  # whether the largest is the best

    @cached_property
    def order(self) -> list[str]:
        """The rules from the best to the worst, by the mean over the seeds, and by the loss where that is equal;
        behind them those that diverged, then those that were interrupted."""

        def key(name: str) -> tuple[bool, bool, float, float]:
            run = self.runs[name]
            means = run.final[self.by].mean() * (-1 if self.largest else 1), run.final["loss"].mean()
            value, loss = (float(x) if np.isfinite(x) else math.inf for x in means)
            return not run.finished, bool(run.diverged.any()), value, loss

        return sorted(self.runs, key=key)

    @property
    def interrupted(self) -> bool:
        """Whether it was ended by Ctrl-C."""
        return not all(run.finished for run in self.runs.values())

    @property
    def table(self) -> Table:
        """A row for each rule, best first.

        Means over the seeds (`..._std`: their standard deviation); the steps that were made; `ms_per_step`,
        milliseconds of training for a step of all seeds together; `compile_s`, seconds to compile; `bytes`, the state
        of one seed; and a note where it diverged, was interrupted, or ran out of steps before its seconds had passed.
        """
        spread = len(self.seeds) > 1
        metrics = sorted(next(iter(self.runs.values())).final, key=lambda name: name != self.by)
        rows = []
        for name in self.order:
            run = self.runs[name]
            values = [run.final[m] for m in metrics]
            pairs = ([x.mean(), x.std(ddof=1)] if spread else [x.mean()] for x in values)
            numbers = [float(f"{x:.6g}") for x in itertools.chain(*pairs)]
            costs = float(f"{run.ms_per_step:.4g}"), float(f"{run.compile_seconds:.3g}"), run.state_bytes
            rows.append((name, *numbers, run.steps, *costs, self._note(run)))
        return Table(_columns(metrics, spread), tuple(rows))

    def _note(self, run: Run) -> str:
        notes = []
        if bad := int(run.diverged.sum()):
            notes.append("diverged" if bad == len(self.seeds) else f"diverged {bad}/{len(self.seeds)}")
        if not run.finished:
            notes.append("interrupted" if run.steps else "not trained")
        elif self.seconds is not None and run.seconds < self.seconds and run.steps == self.steps:
            notes.append(f"all its steps in {run.seconds:.3g} s")
        return ", ".join(notes)

    def __repr__(self) -> str:
        return f"{self._summary()}\n{self.table}"

    def _summary(self) -> str:
        count = len(self.seeds)
        seeds = "1 seed" if count == 1 else f"{count} seeds"
        budget = f"{self.steps} steps each" if self.seconds is None else f"{self.seconds:g} s of training each"
        state = "; interrupted" if self.interrupted else ""
        return f"Comparison: {len(self.runs)} rules, {seeds}, {budget}; ranked by {plots.words(self.by)}{state}"

    def _repr_html_(self) -> str:
        picture = plots.shown(_WIDTH, self._height(), self._draw)
        return f"<p>{escape(self._summary())}</p>{picture}{self.table._repr_html_()}"

    # -----------------------------------------------------------------------------------------------------------------
    # Pictures
    # -----------------------------------------------------------------------------------------------------------------

    def plot(self) -> np.ndarray:
        """The loss against steps and against seconds, and the final values, side by side. Returns the three axes."""
        return plots.drawn(_WIDTH, self._height(), self._draw)

    def _height(self) -> float:
        return max(4.2, 1.2 + 0.3 * len(self.runs))

    def _draw(self, figure: "Figure") -> np.ndarray:
        axes = left, middle, right = figure.subplots(1, 3)
        self._draw_curves(left, "steps", "loss")
        self._draw_curves(middle, "seconds", "loss")
        middle.set_ylabel("")
        # It has the names, in the colours of the curves.
        self.plot_final(ax=right)
        return axes

    def plot_curves(
        self, against: Literal["steps", "seconds"] = "steps", name: str = "loss", ax: "Axes | None" = None
    ) -> "Axes":
        """A curve for each rule: the mean over its seeds, in a band from the least to the greatest of them.

        Curves are running means, over a fiftieth of the steps. Those of rules of which a seed diverged are dotted, and
        leave the picture.

        Args:
          against: "steps", or "seconds" of training of all seeds together, without compilation.
          name: of the curves: "loss", or of what `loss_fn` gave beside it.

        Raises:
          ValueError: `against` is neither.
          KeyError: there are no curves of this name.
        """
        if against not in ("steps", "seconds"):
            raise ValueError(f'against is "steps" or "seconds", not {against!r}')
        known = next(iter(self.runs.values())).curves
        if name not in known:
            raise KeyError(f"there are no curves {name!r}, but {', '.join(known)}")
        names = {key: plots.label(key) for key in self.order if self.runs[key].steps}
        ax = ax or plots.new_axes(height=4.0 + plots.room([*names.values()], 6.4))
        lines = self._draw_curves(ax, against, name)
        plots.legend(ax, [lines[key] for key in names], [*names.values()], 6.4)
        return ax

    def _draw_curves(self, ax: "Axes", against: str, name: str) -> dict[str, "Line2D"]:
        """Draws them without a legend. Gives the line of each rule."""
        lines = {}
        widths = {key: max(1, run.steps // 50) for key, run in self.runs.items()}
        smooth = {key: self._smoothed(key, name, widths[key]) for key in self.runs}
        for key in reversed(self.order):
            run, curves = self.runs[key], smooth[key]
            if not run.steps:
                continue
            bad = bool(run.diverged.any())
            x = np.arange(1, run.steps + 1) if against == "steps" else run.times
            with np.errstate(invalid="ignore", over="ignore"):
                mean = curves.mean(axis=0)
            look = {"linestyle": ":" if bad else "-", "linewidth": 1.5, "marker": plots.marker(mean)}
            (lines[key],) = ax.plot(x, mean, color=self._color(key), **look)
            if len(self.seeds) > 1 and not bad:
                ax.fill_between(
                    x, curves.min(axis=0), curves.max(axis=0), color=self._color(key), alpha=0.18, linewidth=0
                )
        self._set_height(ax, smooth)
        width = max(widths.values())
        of = f", mean of {width} steps" if width > 1 else ""
        if len(set(widths.values())) > 1:
            of = ", running mean"
        units = "step" if against == "steps" else "seconds of training"
        plots.style(ax, xlabel=units, ylabel=f"{plots.words(name)}{of}")
        ax.set_xlim(left=0)
        return lines

    def _smoothed(self, key: str, name: str, width: int) -> np.ndarray:
        curves = self.runs[key].curves
        if not self.runs[key].steps:
            return curves[name]
        return np.array([plots.running_mean(curve, width) for curve in curves[name]])

    def _set_height(self, ax: "Axes", smooth: Mapping[str, np.ndarray]) -> None:
        """By the curves of those that did not diverge."""
        good = [smooth[key] for key, run in self.runs.items() if run.steps and not run.diverged.any()]
        values = np.concatenate([x.ravel() for x in good or smooth.values()])
        finite = values[np.isfinite(values)]
        if not finite.size:
            plots.remark(ax, "no finite values")
            return
        low, high = float(finite.min()), float(finite.max())
        positive = finite[finite > 0]
        if low >= 0 and plots.spans_decades(positive):
            # What is 0 in the end is below the picture.
            ax.set_yscale("log")
            ax.set_ylim(max(float(positive.min()), 1e-12 * high) / 1.2, high * 1.5)
        elif high > low:
            ax.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))

    def _color(self, key: str) -> str:
        return f"C{list(self.runs).index(key) % 10}"

    def plot_final(self, name: str | None = None, ax: "Axes | None" = None) -> "Axes":
        """The final values: a dot for each seed, a line for their mean, the best rule on top. × where a seed diverged.

        Args:
          name: of the value: "loss", or of what `evaluate` gave. `None`: the one that rules are ranked by.

        Raises:
          KeyError: there are no values of this name.
        """
        name = self.by if name is None else name
        final = {key: run.final for key, run in self.runs.items()}
        if any(name not in values for values in final.values()):
            raise KeyError(f"there are no final values {name!r}, but {', '.join(final[self.order[0]])}")
        ax = ax or plots.new_axes(6.4, 1.2 + 0.4 * len(self.runs))
        good = {key: final[key][name][~run.diverged & (run.steps > 0)] for key, run in self.runs.items()}
        for row, key in enumerate(self.order):
            values, color = good[key], self._color(key)
            ax.plot(values, np.full(len(values), row), "o", color=color, alpha=0.5, markersize=5, markeredgewidth=0)
            if len(values) and not self.runs[key].diverged.any():
                ax.plot(values.mean(), row, "|", color=color, markersize=18, markeredgewidth=2.5)
            if self.runs[key].diverged.any():
                ax.plot(0.97, row, "x", color="C3", transform=ax.get_yaxis_transform())
        shown = np.concatenate(list(good.values()))
        if plots.spans_decades(shown[np.isfinite(shown)]):
            ax.set_xscale("log")
        elif not shown.size:
            ax.set_xticks([])
        else:
            ax.locator_params(axis="x", nbins=5)
        rows = len(self.order)
        best = "largest" if self.largest else "least"
        of = f" of the last {TAIL:.0%} of the steps" if name == "loss" else ""
        title = f"{best} is best" if name == self.by else ""
        ax.set_yticks(range(rows), [plots.label(key) for key in self.order], fontsize="small")
        for tick, key in zip(ax.get_yticklabels(), self.order, strict=True):
            tick.set_color(self._color(key))
        plots.style(ax, xlabel=f"{plots.words(name)}{of}", ylim=(rows - 0.5, -0.5), title=title)
        return ax


def _columns(metrics: Iterable[str], spread: bool) -> tuple[str, ...]:
    """Of the table."""
    measured = itertools.chain(*([m, f"{m}_std"] if spread else [m] for m in metrics))
    return "rule", *measured, "steps", "ms_per_step", "compile_s", "bytes", "note"


def compare(
    rules: Mapping[str, Any],
    loss_fn: Callable[..., Any],
    params: Any,
    batches: Any,
    steps: int | None = None,
    *,
    seconds: float | None = None,
    seeds: int | Iterable[int] = 3,
    has_aux: bool = False,
    evaluate: Callable[[Any], Any] | None = None,
    by: str | None = None,
    largest: bool = False,
    shown: bool = True,
) -> Comparison:
    """Trains several rules on the same starts and the same batches, with the same budget of steps or of seconds.

        result = compare(
            {"adamw": adamw(3e-3), "momentum": momentum(0.1), "optax": optax.nadam(3e-3)},
            problem.loss_fn, problem.init, lambda seed: problem.batches(seed, 300), evaluate=problem.evaluate,
        )

    It compares rules as they are: each deserves a learning rate that was looked for, with `sweep`.

    The seeds of a rule are trained side by side, in a program of its own. Rules take turns of a quarter of a second, so
    that a slow moment of the machine meets all of them. Compilation is no part of the seconds, and is reported.

    Under a budget of seconds a fast rule makes more steps. A schedule counts steps, and so ends when it always does;
    when all batches were seen, they come again.

    Ctrl-C ends it with what there is. Since rules take turns, that is as fair a comparison in seconds.

    Args:
      rules: {name: rule}; an (init, update) pair from elsewhere, such as of Optax, is a rule, too.
      loss_fn: `loss_fn(params, batch) -> loss`, or with `has_aux` `(loss, {name: scalar})`, which become curves.
      params: the parameters at the start, or a function of a PRNG key that makes them.
      batches: arrays with an axis of batches in front; an iterable of batches; or a function of a seed that gives one
        of these.
      steps: updates of each rule; `None`: as many as there are batches. Where there are fewer, they come again.
      seconds: in place of steps, the seconds of training that each rule has, for all its seeds together. `steps` is
        then the most that it makes, 100,000 if not given: as many losses have their memory from the start, and so many
        batches are taken of an iterable.
      seeds: those that `params` and `batches` are called with: these, or as many, from 0.
      evaluate: `evaluate(params) -> scalar or {name: scalar}`, taken at the end, of what `eval_params` gives.
      by: what rules are ranked by: "loss", the mean of the last tenth of the steps, or one of `evaluate`. `None`: the
        first of those.
      largest: whether the largest is the best, as of an accuracy.
      shown: whether a progress bar is.

    Returns:
      A `Comparison`: `runs[name]` has the curves, times and final values of a rule, `table` what they come to.

    Raises:
      TypeError: `rules` is no dict, or holds what is no rule; or as `Task` says.
      ValueError: there are no rules, `seconds` is not above 0, `by` is not known, or `evaluate` gives a name that a
        column of the table has; or as `Task` says. What a rule itself raises carries its name as a note.
    """
    if not isinstance(rules, Mapping):
        raise TypeError(f"rules is a dict of rules by name, {{'adam': adam(1e-3)}}, not {type(rules).__name__}")
    if not rules:
        raise ValueError("there are no rules to compare; rules is {name: rule}")
    if unnamed := [name for name in rules if not isinstance(name, str)]:
        raise TypeError(f"the name of a rule is a text, not {unnamed[0]!r}")
    if seconds is not None and not (isinstance(seconds, Real) and seconds > 0 and math.isfinite(seconds)):
        raise ValueError(f"seconds must be a finite number above 0, not {seconds!r}")
    seconds = None if seconds is None else float(seconds)
    known = {name: _named(name, as_rule, rule, "compare") for name, rule in rules.items()}
    most = MOST_STEPS if steps is None and seconds is not None else steps
    task = Task(loss_fn, params, batches, most, seeds=seeds, has_aux=has_aux, evaluate=evaluate)
    measured = ["loss", *task.evaluated_names]
    columns = _columns(measured, len(task.seeds) > 1)
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise ValueError(f"what evaluate gives needs another name than {', '.join(twice)}, as the table has of its own")
    by = measured[:2][-1] if by is None else by
    if by not in measured:
        raise ValueError(f"by must be one of {', '.join(measured)}, not {by!r}")
    budget = task.steps if seconds is None else seconds
    with progress("compare", len(rules) * budget, shown) as bar:
        runners = {}
        for name, rule in known.items():
            bar.advance(0, f"compiling {name}")
            runners[name] = _named(name, _Runner, rule, task)
        _take_turns(runners, seconds, bar)
    runs = {name: runner.run(seconds) for name, runner in runners.items()}
    return Comparison(runs=runs, seeds=task.seeds, steps=task.steps, seconds=seconds, by=by, largest=largest)


def _named(name: str, make: Callable[..., Any], *args: Any) -> Any:
    try:
        return make(*args)
    except Exception as error:
        error.add_note(f"in compare, the rule {name!r}")
        raise


class _Runner:
    """A rule that is trained turn by turn."""

    def __init__(self, rule: Rule, task: Task) -> None:
        self._rule, self._task = rule, task
        self._program = Program(lambda: rule, [{}], [], task)
        self._block = Block(self._program)
        # One after another: of several at once, each would take longer.
        self._block.wait()
        self._known = [(0, 0.0)]  # steps, and the seconds behind them

    def going_on(self, seconds: float | None) -> bool:
        done, used = self._known[-1]
        return done < self._task.steps and (seconds is None or used < seconds)

    def turn(self, seconds: float | None) -> tuple[int, float]:
        """Trains for a part of what is left. Returns how many steps it was, and how long it took."""
        before = self._block.seconds
        steps = self._block.advance(PART if seconds is None else min(PART, seconds - before))
        self._known.append((self._block.done, self._block.seconds))
        return steps, self._block.seconds - before

    def run(self, seconds: float | None) -> Run:
        done, used = zip(*self._known, strict=True)
        curves = {name: curve[0, :, : done[-1]] for name, curve in self._block.curves().items()}
        nothing = np.full(len(self._task.seeds), np.nan)
        final = {"loss": last_losses(curves["loss"], done[-1])}
        final |= {name: x[0].astype(float) if done[-1] else nothing for name, x in self._block.evaluate().items()}
        return Run(
            rule=self._rule,
            curves=curves,
            times=np.interp(np.arange(1, done[-1] + 1), done, used),
            final=final,
            finished=not self.going_on(seconds),
            compile_seconds=self._program.compile_seconds,
            state_bytes=self._program.state_bytes,
        )


def _take_turns(runners: Mapping[str, _Runner], seconds: float | None, bar: Bar) -> None:
    while left := {name: runner for name, runner in runners.items() if runner.going_on(seconds)}:
        for name, runner in left.items():
            steps, taken = runner.turn(seconds)
            if not bar.advance(steps if seconds is None else taken, name):
                return
