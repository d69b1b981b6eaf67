"""Sweeps: every point of a grid of hyperparameters, trained by one compiled program."""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property
from html import escape
from numbers import Real
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxopt_rules.experiments import plots
from jaxopt_rules.experiments.progress import Bar, progress
from jaxopt_rules.experiments.training import (
    PART,
    Block,
    Program,
    Task,
    as_numbers,
    diverged,
    last_losses,
    rule_of,
)
from jaxopt_rules.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

SHOWN = 12  # rows of a table in Jupyter
WIDTH, HEIGHT = 11, 4.2  # inches of both pictures together

# On CPU, members of one block share nothing: a few, whose arrays stay in the cache, run as fast as many, and most of
# their operations on one core. So each core has a block of its own.
CPU_WIDTH = 4


@dataclass(frozen=True, repr=False, eq=False)
class Sweep:
    """What a sweep found. It prints as a table, best first, and shows as a picture and a table in Jupyter."""

    points: tuple[dict[str, Any], ...]  # what `make_rule` was called with
    seeds: tuple[int, ...]
    curves: dict[str, np.ndarray]  # (points, seeds, steps)  the loss of each step, and what loss_fn gave beside it
    final: dict[str, np.ndarray]  # (points, seeds)  the mean loss of the last tenth of the steps, and of `evaluate`
    done: np.ndarray  # (points, seeds)  steps made
    by: str  # the entry of `final` that points are ranked by
    largest: bool  # whether the largest is the best
    programs: int  # that were compiled
    built_with: tuple[str, ...]  # hyperparameters that a rule must know when it is built: a program for each value
    compile_seconds: float
    seconds: float  # without compilation

    @property
    def names(self) -> tuple[str, ...]:
        """Of the hyperparameters that differ."""
        return tuple(self.points[0])

    @property
    def steps(self) -> int:
        return self.curves["loss"].shape[-1]

    @cached_property
    def diverged(self) -> np.ndarray:
        """(points, seeds)  Which members end at what is not finite, or far above the loss that they began with."""
        return diverged(self.curves["loss"], self.final["loss"], self.done)

    @property
    def finished(self) -> np.ndarray:
        """(points, seeds)  Which members made all of their steps."""
        return self.done == self.steps

    @cached_property
    def order(self) -> list[int]:
        """The points from the best to the worst, by the mean over the seeds, and by the loss where that is equal;
        behind them those that diverged, then those that were interrupted."""
        keys = self.final[self.by].mean(axis=1) * (-1 if self.largest else 1), self.final["loss"].mean(axis=1)
        value, loss = (np.where(np.isfinite(key), key, np.inf) for key in keys)
        left, bad = np.any(self.done < self.steps, axis=1), np.any(self.diverged, axis=1)
        return sorted(range(len(self.points)), key=lambda k: (left[k], bad[k], value[k], loss[k]))

    @property
    def best(self) -> dict[str, Any]:
        """The best point: `make_rule(**result.best)` is its rule.

        Raises:
          ValueError: no point was trained to the end, or all diverged.
        """
        if not self._has_a_best:
            raise ValueError(f"there is no best point: {self._counted()}")
        return dict(self.points[self.order[0]])

    @property
    def _has_a_best(self) -> bool:
        first = self.order[0]
        return bool(self._good[first] and np.all(np.isfinite(self.final[self.by][first])))

    @property
    def at_the_edge(self) -> list[str]:
        """The hyperparameters whose best value is the lowest, unless that is 0, or the highest of at least three: a
        better one may lie outside of the grid."""
        if not self._has_a_best:
            return []
        best = self.points[self.order[0]]
        numeric = {name: axis.values for name, axis in self._axes.items() if axis.numeric and len(axis.values) > 2}
        return [name for name, (low, *_, high) in numeric.items() if best[name] in (low or high, high)]

    @property
    def table(self) -> Table:
        """A row for each point, best first: its hyperparameters, means over the seeds (and `..._std`, the standard
        deviation), and a note where it diverged or was interrupted."""
        spread = len(self.seeds) > 1
        metrics = sorted(self.final, key=lambda name: name != self.by)
        columns = [*self.names, *itertools.chain(*([m, f"{m}_std"] if spread else [m] for m in metrics)), "note"]
        rows = []
        for k in self.order:
            values = itertools.chain(
                *(
                    [float(self.final[m][k].mean()), float(self.final[m][k].std(ddof=1))]
                    if spread
                    else [float(self.final[m][k, 0])]
                    for m in metrics
                )
            )
            rows.append((*map(_cell, self.points[k].values()), *values, self._note(k)))
        return Table(tuple(columns), tuple(rows))

    def _note(self, k: int) -> str:
        if not self.finished[k].all():
            return f"interrupted at step {self.done[k].min()}" if self.done[k].min() else "not trained"
        bad = int(self.diverged[k].sum())
        return "" if not bad else "diverged" if bad == len(self.seeds) else f"diverged {bad}/{len(self.seeds)}"

    def _counted(self) -> str:
        members = self.done.size
        parts = [f"{members} member{'s' * (members > 1)} of {self.steps} step{'s' * (self.steps > 1)}"]
        if bad := int((self.diverged & self.finished).sum()):
            parts.append(f"{bad} diverged")
        if left := int((~self.finished).sum()):
            parts.append(f"{left} interrupted")
        return ", ".join(parts)

    def __repr__(self) -> str:
        return f"{self._summary()}\n{self.table}"

    def _summary(self) -> str:
        programs = "one program" if self.programs == 1 else f"{self.programs} programs"
        programs += f", one for each {' and '.join(self.built_with)}" if self.built_with else ""
        ran = f"{programs}, compiled in {self.compile_seconds:.1f} s, ran for {self.seconds:.1f} s"
        edge = " and ".join(self.at_the_edge)
        hint = f"; the best {edge} is at the edge of the grid" if edge else ""
        return f"Sweep: {self._counted()}; {ran}{hint}"

    def _repr_html_(self) -> str:
        table = self.table
        short = Table(table.columns, table.cells[:SHOWN])
        more = len(table.cells) - SHOWN
        rest = f"<p>and {more} more: <code>result.table</code></p>" if more > 0 else ""
        picture = plots.shown(WIDTH, HEIGHT, self._draw)
        return f"<p>{escape(self._summary())}</p>{picture}{short._repr_html_()}{rest}"

    # -----------------------------------------------------------------------------------------------------------------
    # Pictures
    # -----------------------------------------------------------------------------------------------------------------

    def plot(self) -> np.ndarray:
        """What the hyperparameters do to the result, and the curves of the losses, side by side. Returns the axes."""
        return plots.drawn(WIDTH, HEIGHT, self._draw)

    def _draw(self, figure: "Figure") -> Sequence["Axes"]:
        left, right = figure.subplots(1, 2)
        varied = self._varied
        if len(varied) < 2:
            self.line(ax=left)
        elif math.prod(len(self._axes[name].values) for name in varied[:2]) > 4 * len(self.points):
            self.scatter(ax=left)
        else:
            self.heat_map(ax=left)
        self.plot_curves(ax=right)
        return left, right

    @cached_property
    def _axes(self) -> dict[str, "_Axis"]:
        return {name: _Axis.of([point[name] for point in self.points]) for name in self.names}

    @property
    def _varied(self) -> list[str]:
        """The hyperparameters of more than one value, those of most values first."""
        several = [name for name in self.names if len(self._axes[name].values) > 1]
        return sorted(several, key=lambda name: -len(self._axes[name].values))

    @cached_property
    def _good(self) -> np.ndarray:
        """(points)  Whether all members made all of their steps, and none diverged."""
        return np.all(self.finished, axis=1) & ~np.any(self.diverged, axis=1)

    def line(self, name: str | None = None, ax: "Axes | None" = None) -> "Axes":
        """The result against one hyperparameter, the best over all others, with the range over the seeds.

        Raises:
          KeyError: no hyperparameter has this name.
        """
        ax = ax or plots.new_axes()
        name = self._named(name, *self._varied, *self.names)
        axis = self._axes[name]
        best = [self._best_with({name: i}) for i in range(len(axis.values))]
        shown = [(x, k) for x, k in zip(axis.places, best, strict=True) if k is not None]
        if shown:
            x = [x for x, _ in shown]
            y = self.final[self.by][[k for _, k in shown]]
            ax.plot(x, y.mean(axis=1), color="C0", marker="o", markersize=4, linestyle="-" if axis.numeric else "none")
            if len(self.seeds) > 1 and axis.numeric:
                ax.fill_between(x, y.min(axis=1), y.max(axis=1), color="C0", alpha=0.2, linewidth=0)
        for x, k in zip(axis.places, best, strict=True):
            if k is None:
                ax.plot(x, 0.03, "x", color="C3", transform=ax.get_xaxis_transform())
        _set_scale(ax, "x", axis)
        if plots.spans_decades([self.final[self.by][k].mean() for _, k in shown]):
            ax.set_yscale("log")
        others = [other for other in self._varied if other != name]
        plots.style(ax, xlabel=plots.words(name), ylabel=plots.words(self.by), title=_over(others))
        return ax

    def heat_map(self, x: str | None = None, y: str | None = None, ax: "Axes | None" = None) -> "Axes":
        """The result for each pair of values of two hyperparameters, the best over all others. × where it diverged.

        Args:
          x, y: their names; `None`: those of most values.

        Raises:
          KeyError: no hyperparameter has this name.
          ValueError: there are fewer than two hyperparameters.
        """
        from matplotlib.patches import Rectangle

        x, y = self._pair(x, y)
        ax = ax or plots.new_axes(6.4, 4.8)
        columns, rows = self._axes[x], self._axes[y]
        mean = self.final[self.by].mean(axis=1)
        best = [[self._best_with({x: j, y: i}) for j in range(len(columns.values))] for i in range(len(rows.values))]
        cells = np.array([[np.nan if k is None else mean[k] for k in row] for row in best])
        norm, colors = self._colors(cells)
        drawn = ax.imshow(cells, origin="lower", aspect="auto", cmap=colors, norm=norm)
        if np.isfinite(cells).any():
            ax.figure.colorbar(drawn, ax=ax, label=plots.words(self.by))
        for (i, j), value in np.ndenumerate(cells):
            if best[i][j] is None:
                if self._points_with({x: j, y: i}):
                    ax.text(j, i, "×", ha="center", va="center", color="C3")
            elif len(columns.values) <= 9 and len(rows.values) <= 12:
                dark = (norm(value) < 0.5) == self.largest
                ax.text(j, i, f"{value:.2g}", ha="center", va="center", color="w" if dark else "k", fontsize=8)
            if best[i][j] == self.order[0]:
                ax.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="C3", linewidth=2.5))
        _set_ticks(ax, "x", columns)
        _set_ticks(ax, "y", rows)
        others = [name for name in self._varied if name not in (x, y)]
        ax.set(xlabel=plots.words(x), ylabel=plots.words(y), title=_over(others))
        return ax

    def scatter(self, x: str | None = None, y: str | None = None, ax: "Axes | None" = None) -> "Axes":
        """The result at each pair of values of two hyperparameters, for points that are no grid. × where it diverged.

        Args:
          x, y: their names; `None`: those of most values.

        Raises:
          KeyError: no hyperparameter has this name.
          ValueError: there are fewer than two hyperparameters.
        """
        x, y = self._pair(x, y)
        ax = ax or plots.new_axes(6.4, 4.8)
        axes = self._axes[x], self._axes[y]
        places = np.array([[axis.places[i] for i in axis.index] for axis in axes])
        mean = np.where(self._good, self.final[self.by].mean(axis=1), np.nan)
        norm, colors = self._colors(mean)
        ax.plot(*places[:, ~self._good], "x", color="C3", markersize=4)
        # The best on top.
        order = [k for k in reversed(self.order) if self._good[k]]
        if order:
            drawn = ax.scatter(*places[:, order], c=mean[order], cmap=colors, norm=norm, s=30)
            ax.figure.colorbar(drawn, ax=ax, label=plots.words(self.by))
            ax.scatter(*places[:, order[-1:]], s=110, facecolors="none", edgecolors="C3", linewidths=2)
        for which, axis in zip("xy", axes, strict=True):
            _set_scale(ax, which, axis)
        plots.style(ax, xlabel=plots.words(x), ylabel=plots.words(y))
        return ax

    def plot_curves(self, by: str | None = None, name: str = "loss", ax: "Axes | None" = None) -> "Axes":
        """A curve for each point, the mean over its seeds, in the colours of one hyperparameter.

        Those that diverged are grey, the best is thick.

        Args:
          by: the hyperparameter of the colours; `None`: that of most values.
          name: of the curves: "loss", or of what `loss_fn` gave beside it.

        Raises:
          KeyError: there are no curves of this name, or no hyperparameter.
        """
        import matplotlib as mpl
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap, LogNorm, Normalize

        if name not in self.curves:
            raise KeyError(f"there are no curves {name!r}, but {', '.join(self.curves)}")
        by = self._named(by, *self._varied, *self.names)
        ax = ax or plots.new_axes()
        axis = self._axes[by]
        log = axis.numeric and plots.spans_decades(axis.places)
        norm = (LogNorm if log else Normalize)(min(axis.places), max(axis.places))
        # Its yellow is hard to see on white.
        cmap = ListedColormap(mpl.colormaps["viridis"](np.linspace(0, 0.9, 256)))
        bad = np.any(self.diverged, axis=1)
        width = max(1, self.steps // 50)
        shown: list[np.ndarray] = []  # what sets the height of the picture
        for k in reversed(self.order):
            with np.errstate(invalid="ignore", over="ignore"):
                mean = self.curves[name][k].mean(axis=0)
            first = k == self.order[0] and not bad[k]
            color = "0.6" if bad[k] else cmap(norm(axis.places[axis.index[k]]))
            smooth = plots.running_mean(mean, width)
            marker = "." if self.steps == 1 else None
            ax.plot(smooth, color=color, linewidth=2.5 if first else 1, linestyle=":" if bad[k] else "-", marker=marker)
            if not bad[k] or bad.all():
                shown.append(smooth)
        finite = np.array(shown)[np.isfinite(shown)]
        if finite.size:
            low, high = float(finite.min()), float(finite.max())
            if plots.spans_decades(finite):
                ax.set_yscale("log")
                ax.set_ylim(low / 1.2, high * 1.2)
            elif high > low:
                ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        if axis.numeric and len(axis.values) > 1:
            ax.figure.colorbar(ScalarMappable(norm, cmap), ax=ax, label=plots.words(by))
        elif 1 < len(axis.values) <= 12:
            for label, place in zip(axis.labels, axis.places, strict=True):
                ax.plot([], [], color=cmap(norm(place)), label=label)
            ax.legend(title=plots.words(by), frameon=False, fontsize="small")
        of = f", mean of {width} steps" if width > 1 else ""
        plots.style(ax, xlabel="step", ylabel=f"{plots.words(name)}{of}", xlim=(0, max(1, self.steps - 1)))
        return ax

    def _colors(self, values: np.ndarray) -> tuple["Normalize", str]:
        """A scale of colours for these, in which the best are light."""
        from matplotlib.colors import LogNorm, Normalize

        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        scale = LogNorm if plots.spans_decades(finite) else Normalize
        return scale(low, high), "viridis" if self.largest else "viridis_r"

    def _points_with(self, places: Mapping[str, int]) -> list[int]:
        """Those with these values, given by their numbers on the axes; the best first."""
        hit = np.all([self._axes[name].index == i for name, i in places.items()], axis=0)
        return [k for k in self.order if hit[k]] if hit.any() else []

    def _best_with(self, places: Mapping[str, int]) -> int | None:
        return next((k for k in self._points_with(places) if self._good[k]), None)

    def _pair(self, x: str | None, y: str | None) -> tuple[str, str]:
        if len(self.names) < 2:
            raise ValueError("this picture needs two hyperparameters; draw line() for one")
        names = list(dict.fromkeys([*self._varied, *self.names]))
        x = self._named(x, *(name for name in names if name != y))
        return x, self._named(y, *(name for name in names if name != x))

    def _named(self, name: str | None, *defaults: str) -> str:
        if name is None:
            return defaults[0]
        if name not in self.names:
            raise KeyError(f"the sweep has no hyperparameter {name!r}; it has {', '.join(self.names)}")
        return name


@dataclass(frozen=True, eq=False)
class _Axis:
    """The values of one hyperparameter."""

    values: list[Any]  # different ones: numbers in their order, others as they were given
    index: np.ndarray  # (points)  which of them each point has
    numeric: bool

    @classmethod
    def of(cls, given: list[Any]) -> "_Axis":
        values: list[Any] = []
        numbers: dict[Any, int] = {}
        index = []
        for value in given:
            place = numbers.get(value) if _is_number(value) else _place(value, values)
            if place is None:
                place = len(values)
                values.append(value)
            if _is_number(value):
                numbers[value] = place
            index.append(place)
        numeric = all(_is_number(value) and math.isfinite(value) for value in values)
        if not numeric:
            return cls(values, np.array(index), False)
        order = np.argsort(np.array(values, float))
        return cls([values[k] for k in order], np.argsort(order)[index], True)

    @property
    def places(self) -> list[float]:
        """Where they stand on an axis of a picture."""
        return [float(value) for value in self.values] if self.numeric else list(map(float, range(len(self.values))))

    @property
    def labels(self) -> list[str]:
        return [plots.label(_label(value), 24) for value in self.values]


def _place(value: Any, values: Sequence[Any]) -> int | None:
    return next((k for k, other in enumerate(values) if _same(value, other)), None)


def _same(one: Any, other: Any) -> bool:
    """Whether these are the same value: not 1 and True, and arrays only if they are one object."""
    if one is other or (_is_number(one) and _is_number(other)):
        return bool(one is other or one == other)
    return type(one) is type(other) and not isinstance(one, np.ndarray | jax.Array) and bool(one == other)


def _set_scale(ax: "Axes", which: str, axis: _Axis) -> None:
    if not axis.numeric:
        _set_ticks(ax, which, axis)
    elif plots.spans_decades(axis.places):
        ax.set(**{f"{which}scale": "log"})


def _set_ticks(ax: "Axes", which: str, axis: _Axis) -> None:
    """The values at the places 0, 1, ..., as many as there is room for."""
    every = math.ceil(len(axis.values) / 16)
    labels = axis.labels[::every]
    turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    long = which == "x" and (len(labels) > 6 or max(map(len, labels)) * len(labels) > 50)
    places = range(0, len(axis.values), every)
    (ax.set_xticks if which == "x" else ax.set_yticks)(places, labels, **(turned if long else {}))


def sweep(
    make_rule: Callable[..., Any],
    grid: Mapping[str, Iterable[Any]] | Iterable[Mapping[str, Any]],
    loss_fn: Callable[..., Any],
    params: Any,
    batches: Any,
    steps: int | None = None,
    *,
    seeds: int | Iterable[int] = 1,
    chunk: int | None = None,
    has_aux: bool = False,
    evaluate: Callable[[Any], Any] | None = None,
    by: str | None = None,
    largest: bool = False,
    shown: bool = True,
) -> Sweep:
    """Trains every point of a grid, from every seed, in one compiled program.

        result = sweep(
            lambda learning_rate, weight_decay: adamw(Warmup(learning_rate, 20), weight_decay=weight_decay),
            {"learning_rate": np.geomspace(1e-4, 1e-1, 8), "weight_decay": [0.0, 0.01, 0.1]},
            loss_fn, params, batches, steps=300,
        )
        rule = adamw(**result.best)

    Hyperparameters are scalars in the state, so members that differ in them are one program under `jax.vmap`; their
    numbers are those of separate runs, up to the rounding of products of matrices, which XLA sums in another order.
    What a rule has to know when it is built (a flag, a text, a rule, the steps of a schedule) may be in the grid, too:
    there is one program for each of its values.

    Ctrl-C ends it with what there is: members that are not `finished` are marked.

    Args:
      make_rule: called with a point's values by name, some of them traced; gives a rule, or an (init, update) pair from
        elsewhere.
      grid: {name: values}, of which every combination is a point; or points, such as drawn at random, one by one.
      loss_fn: `loss_fn(params, batch) -> loss`, or with `has_aux` `(loss, {name: scalar})`, which become curves.
      params: the parameters at the start, or a function of a PRNG key that makes them.
      batches: arrays with an axis of batches in front; a list or another iterable of batches; or a function of a seed
        that gives one of these.
      steps: updates of each member; `None`: as many as there are batches. Where there are fewer, they come again.
      seeds: those that `params` and `batches` are called with: these, or as many, from 0. Members of one seed see the
        same.
      chunk: how many members are trained at a time. It bounds the memory: each has parameters, gradients, a state and
        activations of its own. `None`: on CPU 4 for each core, and 4 that are
        made ready meanwhile, since more gain nothing; elsewhere as many as take a quarter of the free memory, without
        activations.
      evaluate: `evaluate(params) -> scalar or {name: scalar}`, taken at the end, of what `eval_params` gives.
      by: what points are ranked by, an entry of `final`: "loss" or one of `evaluate`. `None`: the first of those.
      largest: whether the largest is the best, as of an accuracy.
      shown: whether a progress bar is.

    Raises:
      ValueError: the grid is empty or its points have different names; `by` is not known; or as `Task` says.
      TypeError: `make_rule` gives no rule; or as `Task` says.
    """
    points = _points(grid)
    task = Task(loss_fn, params, batches, steps, seeds=seeds, has_aux=has_aux, evaluate=evaluate)
    if chunk is not None and not (isinstance(chunk, int | np.integer) and chunk >= 1):
        raise ValueError(f"chunk must be an integer >= 1, not {chunk!r}")
    if not callable(make_rule):
        raise TypeError(
            "make_rule is a function of the hyperparameters that gives a rule, adamw or "
            f"lambda rate: chain(clip_by_global_norm(1.0), adamw(rate)), not {make_rule!r}"
        )
    measured = ["loss", *task.evaluated_names]
    by = by if by is not None else measured[min(1, len(measured) - 1)]
    if by not in measured:
        raise ValueError(f"by must be one of {', '.join(measured)}, not {by!r}")
    found = _Found(len(points), task, measured)
    began = time.perf_counter()
    with progress("sweep", len(points) * len(task.seeds) * task.steps, shown) as bar:
        programs = _programs(make_rule, points, task)
        for members, program in programs:
            if not _train(program, members, chunk, found, bar):
                break
    seconds, compiling = time.perf_counter() - began, sum(program.compile_seconds for _, program in programs)
    return Sweep(
        points=tuple(points),
        seeds=task.seeds,
        # Without any where Ctrl-C came before the first was trained.
        curves=found.curves or {"loss": np.full((*found.done.shape, task.steps), np.nan)},
        final=found.final,
        done=found.done,
        by=by,
        largest=largest,
        programs=len(programs),
        built_with=tuple(
            name
            for name in points[0]
            if name not in programs[0][1].values and len(_Axis.of([point[name] for point in points]).values) > 1
        ),
        compile_seconds=compiling,
        seconds=seconds - compiling,
    )


def _points(grid: Any) -> list[dict[str, Any]]:
    if isinstance(grid, Mapping):
        values = {name: _listed(name, several) for name, several in grid.items()}
        if empty := [name for name, several in values.items() if not several]:
            raise ValueError(f"the grid has no value for {', '.join(empty)}")
        points = [dict(zip(values, combined, strict=True)) for combined in itertools.product(*values.values())]
    else:
        points = list(grid)
        if unlike := [point for point in points if not isinstance(point, Mapping)]:
            raise TypeError(
                f"the grid is {{name: values}}, or points such as {{'learning_rate': 0.1}}, not {unlike[0]!r}"
            )
    if not points or not points[0]:
        raise ValueError("the grid is empty; it is {name: values}, or points such as {'learning_rate': 0.1}")
    if unlike := [point for point in points if point.keys() != points[0].keys()]:
        raise ValueError(
            f"the points name different hyperparameters: {', '.join(points[0])} and {', '.join(unlike[0])}"
        )
    return [{name: _python(point[name]) for name in points[0]} for point in points]


def _listed(name: str, values: Any) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable) or getattr(values, "shape", None) == ():
        raise TypeError(
            f"the grid has a list of values for each name; that of {name} is {values!r}: write [{values!r}]"
        )
    return list(values)


def _programs(
    make_rule: Callable[..., Any], points: list[dict[str, Any]], task: Task
) -> list[tuple[list[int], Program]]:
    """The programs that are needed, each with the points that it trains."""
    varied = [
        name
        for name, value in points[0].items()
        if all(_is_number(point[name]) for point in points) and any(point[name] != value for point in points)
    ]
    try:
        return _grouped(make_rule, points, varied, task)
    except (TypeError, ValueError):
        live = [name for name in varied if _can_be_traced(make_rule, points, name, task)]
        if live == varied:
            raise
        return _grouped(make_rule, points, live, task)


def _grouped(
    make_rule: Callable[..., Any], points: list[dict[str, Any]], live: list[str], task: Task
) -> list[tuple[list[int], Program]]:
    groups: list[tuple[dict[str, Any], list[int]]] = []
    for k, point in enumerate(points):
        fixed = {name: value for name, value in point.items() if name not in live}
        for known, members in groups:
            if all(_same(known[name], value) for name, value in fixed.items()):
                members.append(k)
                break
        else:
            groups.append((fixed, [k]))
    return [(members, Program(make_rule, [points[k] for k in members], live, task)) for _, members in groups]


def _can_be_traced(make_rule: Callable[..., Any], points: list[dict[str, Any]], name: str, task: Task) -> bool:
    """Whether a rule need not know this number when it is built."""
    start, dtype = task.start(), as_numbers([point[name] for point in points]).dtype
    try:
        jax.eval_shape(
            lambda value: rule_of(make_rule, points[0] | {name: value}).init(start), jax.ShapeDtypeStruct((), dtype)
        )
    except (TypeError, ValueError):
        return False
    return True


class _Found:
    """What is known of the members so far."""

    def __init__(self, points: int, task: Task, measured: Iterable[str]) -> None:
        self._shape, self._steps = (points, len(task.seeds)), task.steps
        self.done = np.zeros(self._shape, int)
        self.curves: dict[str, np.ndarray] = {}
        self.final = {name: np.full(self._shape, np.nan) for name in measured}

    def take(self, block: Block, cells: tuple[np.ndarray, ...]) -> None:
        new = self.done[cells] < block.done
        self.done[cells] = np.where(new, block.done, self.done[cells])
        curves = block.curves()
        for name, curve in curves.items():
            known = self.curves.setdefault(name, np.full((*self._shape, self._steps), np.nan, _real_dtype(curve)))
            known[cells] = np.where(new[..., None], curve, known[cells])
        final = {"loss": last_losses(curves["loss"], block.done)}
        if block.done == self._steps:
            final |= block.evaluate()
        for name, value in final.items():
            self.final[name][cells] = np.where(new, value, self.final[name][cells])


def _train(program: Program, points: list[int], chunk: int | None, found: _Found, bar: Bar) -> bool:
    """Trains the members of a program, `chunk` at a time. Returns whether all of them are finished."""
    seeds, steps = len(program.task.seeds), program.task.steps
    workers, blocks, width = _side_by_side(program, chunk)
    parts = itertools.product(_parts(seeds, width), _parts(len(points), max(1, width // seeds)))
    running: dict[Future[int], tuple[Block, tuple[np.ndarray, ...], int]] = {}
    going = True
    with ThreadPoolExecutor(workers) as pool:
        while True:
            for of_seeds, of_points in itertools.islice(parts, blocks - len(running) if going else 0):
                block, cells = Block(program, of_points, of_seeds), np.ix_(np.array(points)[of_points], of_seeds)
                while going and not block.is_compiled(PART):
                    going = bar.advance(0, "compiling")
                if not going:
                    break
                fresh = int(np.count_nonzero(found.done[cells] == 0))
                running[pool.submit(block.advance, PART)] = block, cells, fresh
            if not running:
                return going
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                block, cells, fresh = running.pop(future)
                going = bar.advance(future.result() * fresh) and going
                if going and block.done < steps:
                    running[pool.submit(block.advance, PART)] = block, cells, fresh
                else:
                    found.take(block, cells)


def _side_by_side(program: Program, chunk: int | None) -> tuple[int, int, int]:
    """How many blocks are trained at once, how many are there at once, and how many members each has."""
    device = jax.devices()[0]
    if device.platform == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        chunk = chunk or (cores + 1) * CPU_WIDTH
        workers = min(cores, chunk)
        width = min(CPU_WIDTH, chunk // workers)
        # One more is made ready meanwhile.
        return workers, min(workers + 1, chunk // width), width
    known = device.memory_stats() or {}
    free = known.get("bytes_limit", 2**34) - known.get("bytes_in_use", 0)
    return 1, 1, chunk or max(1, free // 4 // program.member_bytes)


def _parts(count: int, size: int) -> list[np.ndarray]:
    """0, ..., count − 1 in as few parts as do not exceed `size`, all of one length: the last may overlap."""
    parts = math.ceil(count / size)
    length = math.ceil(count / parts)
    return [np.arange(length) + min(k * length, count - length) for k in range(parts)]


def _real_dtype(curve: np.ndarray) -> np.dtype:
    return curve.dtype if np.issubdtype(curve.dtype, np.inexact) else np.dtype(float)


def _is_number(x: Any) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool | np.bool_)


def _python(x: Any) -> Any:
    """Numbers of NumPy and JAX as Python's, which print shorter and have all digits."""
    return x.item() if isinstance(x, np.generic | np.ndarray | jax.Array) and np.ndim(x) == 0 else x


def _cell(x: Any) -> Any:
    return x if _is_number(x) or x is None else getattr(x, "__name__", str(x))


def _label(x: Any) -> str:
    return f"{x:.3g}" if _is_number(x) else getattr(x, "__name__", str(x))


def _over(names: Sequence[str]) -> str:
    return f"best over {' and '.join(map(plots.words, names))}" if names else ""
