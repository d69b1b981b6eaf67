"""Histories: what happens in each step of one run, recorded inside the compiled loop."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxopt_rules import trees
from jaxopt_rules.compose import FROZEN
from jaxopt_rules.experiments import plots
from jaxopt_rules.experiments.progress import progress
from jaxopt_rules.experiments.training import PART, Block, Program, Step, Task
from jaxopt_rules.numerics import global_norm, is_inexact, quotient, widened
from jaxopt_rules.rule import Rule, as_rule, definition_of, is_pair
from jaxopt_rules.select import Selector, check_by, label
from jaxopt_rules.state import hyperparameter_entries, hyperparams, metrics
from jaxopt_rules.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Groups = Mapping[str, Selector]

# ---------------------------------------------------------------------------------------------------------------------
# One step
# ---------------------------------------------------------------------------------------------------------------------


def observe(before: Any, after: Any, grads: Any, state: Any, groups: Groups | Rule | None = None) -> dict[str, Array]:
    """What one step did, as a flat dict of scalars, for a jitted step or a scan of one's own.

        def body(carry, batch):
            params, state = carry
            loss, grads = jax.value_and_grad(loss_fn)(params, batch)
            new, state = rule.apply(grads, state, params)
            return (new, state), {"loss": loss, **observe(params, new, grads, state, rule)}

        (params, state), series = jax.lax.scan(body, (params, rule.init(params)), batches)
        History.of(series).plot()

    For each group of parameters, in float32 or wider:

        grad_norm.<group>      √(Σ |g|²), of the gradients as they are given
        param_norm.<group>     √(Σ |θ|²), before the step
        update_ratio.<group>   √(Σ |θ′ − θ|²) / √(Σ |θ|²), of what was really applied: with rounding to the parameters'
                               dtype, clipping, decay, and 0 for a step that was not taken; 0 where all θ are 0

    Of the state, `metrics(state)`: learning rates, and what rules record. And for each rule that records the
    `grad_norm` that it holds to a `max_norm`, as `clip_by_global_norm` does: that `max_norm`, and `clipped`, 1 where
    the norm was above it, else 0. Where there are several, their names begin as those of `metrics`.

    Args:
      before, after: the parameters before and behind the step.
      grads: the gradients, a tree like the parameters. Parameters without one (`None`) are in no sum.
      state: the rule's, behind the step.
      groups: {label: selector}, disjoint, as `by` of `partition`: what none selects is in the group "rest". Or the
        rule, whose own groups these are (see `explain`), without what it keeps frozen. `None`, or a rule without
        groups: all in one, "all".

    Raises:
      ValueError: the trees differ, or the groups do not fit the parameters.
      TypeError: `groups` is neither.
    """
    olds, treedef = trees.flatten(before)
    news = trees.align(treedef, after, "the parameters behind the step", "those before it")
    gs = trees.align(treedef, grads, "the gradients", "the parameters")
    owners = _owners(groups, trees.paths(before), olds)
    members: dict[str, list[int]] = {}
    for k, owner in enumerate(owners):
        if owner is not None and is_inexact(olds[k]) and is_inexact(gs[k]):
            members.setdefault(owner, []).append(k)
    observed = {}
    for name, ks in members.items():
        norm = global_norm([olds[k] for k in ks])
        change = global_norm([_difference(news[k], olds[k]) for k in ks])
        observed[f"grad_norm.{name}"] = global_norm([gs[k] for k in ks])
        observed[f"param_norm.{name}"] = norm
        observed[f"update_ratio.{name}"] = quotient(change, norm, otherwise=0)
    return observed | metrics(state) | _clips(state)


def _difference(new: Array, old: Array) -> Array:
    wide = widened(old.dtype)
    return new.astype(wide) - old.astype(wide)


def _clips(state: Any) -> dict[str, Array]:
    values, found = hyperparams(state), {}
    for name, entry in hyperparameter_entries(state).items():
        norm = getattr(entry.family.state, "metrics", {}).get("grad_norm")
        if entry.name == "max_norm" and norm is not None:
            found[name] = values[name]
            found[f"{name.removesuffix('max_norm')}clipped"] = jnp.float32(norm > values[name])
    return found


def _owners(groups: Any, paths: list[str], leaves: list[Any]) -> list[str | None]:
    """The group of each leaf; `None` for what is in none."""
    if groups is None:
        return ["all"] * len(leaves)
    if is_pair(groups):
        return _own_groups(as_rule(groups, "observe"), paths, leaves)
    if not isinstance(groups, Mapping) or not groups:
        raise TypeError(f"groups is {{label: selector}}, a rule, or None, not {groups!r}")
    labels = list(groups) if "rest" in groups else [*groups, "rest"]
    check_by(groups, "observe", labels)
    return label(groups, paths, leaves, labels)


def _own_groups(rule: Rule, paths: list[str], leaves: list[Any]) -> list[str | None]:
    shares = definition_of(rule).shares(paths, leaves)
    frozen = [share.rate == FROZEN.rate and FROZEN.group in share.group.split("/") for share in shares]
    others = "rest" if any(share.group for share, cold in zip(shares, frozen, strict=True) if not cold) else "all"
    return [None if cold else share.group or others for share, cold in zip(shares, frozen, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------------

# The quantities that have pictures of their own, in their order. Of others each has one.
QUANTITIES = ("loss", "learning_rate", "grad_norm", "update_ratio", "param_norm", "clipped")
PER_GROUP = ("grad_norm", "update_ratio", "param_norm")
_LINES = ("-", (0, (4, 1)), ":")  # of ten groups each
COUNTED = ("skipped", "in_a_row", "max_norm")  # shown in the pictures of others


@dataclass(frozen=True, repr=False, eq=False)
class History:
    """What each step of a run recorded. It prints as a table, and shows as pictures in Jupyter.

    `pandas.DataFrame(history.series)` has a row for each step.
    """

    series: dict[str, np.ndarray]  # (steps)
    params: Any = None  # at the end, to go on with
    state: Any = None
    final: dict[str, float] = field(default_factory=dict)  # what `evaluate` gave at the end
    interrupted: bool = False

    @classmethod
    def of(cls, series: Mapping[str, Any], params: Any = None, state: Any = None) -> "History":
        """A history of a loop of one's own.

            (params, state), series = jax.lax.scan(body, (params, state), batches)
            history = History.of(series, params, state)

        Args:
          series: {name: numbers of each step}, under the names of `observe`, and "loss".
          params, state: at the end.

        Raises:
          ValueError: there is no series, one has more than one axis, or two differ in length.
        """
        arrays = {name: _plain(x) for name, x in series.items()}
        if not arrays or any(x.ndim != 1 for x in arrays.values()):
            shapes = ", ".join(f"{name} {x.shape}" for name, x in arrays.items())
            raise ValueError(f"a history is made of series with one number for each step, not of {shapes or 'nothing'}")
        lengths = {name: len(x) for name, x in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the series differ in length: {lengths}")
        return cls(arrays, params, state)

    @property
    def steps(self) -> int:
        """Those that were made."""
        return len(next(iter(self.series.values())))

    @property
    def clip_fraction(self) -> dict[str, float]:
        """The part of the steps in which each clip acted, by the name of its series: {"clipped": 0.2}."""
        return {
            name: float(self.series[name].mean()) if self.steps else float("nan") for name in self._of_kind("clipped")
        }

    @property
    def skipped(self) -> np.ndarray:
        """(steps)  Which steps were not taken by a rule that records it (`skip_nonfinite`, `skip_spikes`)."""
        skipped = np.zeros(self.steps, bool)
        for name in self._of_kind("skipped"):
            skipped |= np.diff(self.series[name], prepend=0) > 0
        return skipped

    @property
    def table(self) -> Table:
        """A row for each series: its first and last number, its least, mean and greatest; without what is no number."""
        rows = []
        for name, x in self.series.items():
            finite = x[np.isfinite(x)].astype(float)
            numbers = [finite.min(), finite.mean(), finite.max()] if finite.size else [np.nan] * 3
            ends = [x[0], x[-1]] if len(x) else [np.nan] * 2
            rows.append((name, *(float(f"{float(number):.5g}") for number in (*ends, *numbers))))
        return Table(("series", "first", "last", "least", "mean", "greatest"), tuple(rows))

    def __repr__(self) -> str:
        return f"{self._summary()}\n{self.table}"

    def _summary(self) -> str:
        parts = [f"{self.steps} steps"]
        parts += [f"{name} in {fraction:.0%}" for name, fraction in self.clip_fraction.items()]
        parts += [f"{int(self.skipped.sum())} skipped"] if self._of_kind("skipped") else []
        parts += [f"{plots.words(name)} {value:.4g}" for name, value in self.final.items()]
        return f"History: {', '.join(parts)}{'; interrupted' if self.interrupted else ''}"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self._summary())}</p>{plots.shown(*self._size(), self._draw)}"

    # -----------------------------------------------------------------------------------------------------------------
    # Pictures
    # -----------------------------------------------------------------------------------------------------------------

    def plot(self) -> np.ndarray:
        """A small picture for each quantity, those of groups in one: what there is of the loss, learning rates, norms,
        update ratios, clipped steps and other series. Ticks in red at the top mark steps that were skipped. Returns
        the axes."""
        return plots.drawn(*self._size(), self._draw)

    def _size(self) -> tuple[float, float]:
        rows, columns = _grid(len(list(self._panels())))
        width = 3.8 * columns
        return width, 2.6 * rows + 0.3 + plots.room([*self._labels.values()], width)

    @cached_property
    def _labels(self) -> dict[str, str]:
        """What legends call each group. Of one group, or none, they say nothing."""
        groups = dict.fromkeys(_group(name) for name in self.series)
        return {group: plots.label(group or "all") for group in sorted(groups, key=lambda group: group == "")}

    def _look(self, group: str) -> dict[str, Any]:
        """Of its curves, in all pictures."""
        if not group and len(self._labels) > 1:
            return {"color": "0.5"}
        k = list(self._labels).index(group)
        return {"color": f"C{k % 10}", "linestyle": _LINES[k // 10 % len(_LINES)]}

    def _draw(self, figure: "Figure") -> np.ndarray:
        panels = list(self._panels())
        rows, columns = _grid(len(panels))
        axes = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
        common = plots.crowded([*self._labels.values()])
        lines = {}
        for ax, quantity in zip(axes, panels, strict=False):
            found = self._draw_series(quantity, ax)
            lines = found | lines
            if not common:
                self._add_legend(ax, found)
        if common:
            groups = [group for group in self._labels if group in lines]
            plots.legend_of_all(figure, [lines[g] for g in groups], [self._labels[g] for g in groups])
        for ax in axes[len(panels) :]:
            ax.remove()
        for ax in axes[max(0, len(panels) - columns) : len(panels)]:
            ax.set_xlabel("step")
            ax.tick_params(labelbottom=True)
        return axes[: len(panels)]

    def _add_legend(self, ax: "Axes", lines: "Mapping[str, Line2D]") -> None:
        labels = [self._labels[group] for group in lines]
        if labels != ["all"]:
            plots.legend(ax, list(lines.values()), labels, 6.4)

    def _panels(self) -> Iterator[str]:
        """The quantities that are drawn."""
        present = dict.fromkeys(_kind(name) for name in self.series)
        yield from (kind for kind in QUANTITIES if kind in present)
        yield from (kind for kind in present if kind not in QUANTITIES and kind not in COUNTED)

    def _of_kind(self, kind: str) -> list[str]:
        return [name for name in self.series if _kind(name) == kind]

    def plot_series(self, quantity: str, ax: "Axes | None" = None) -> "Axes":
        """One quantity against the steps: `loss`, `learning_rate`, `grad_norm`, `update_ratio`, or any other name.

        Of gradient norms, dashed lines are the norms that they are clipped to. Of update ratios, the dashed line is
        1e-3, which Karpathy's rule of thumb takes for healthy. `clipped` is the mean of the last fiftieth of the steps.

        Raises:
          KeyError: there is no such series.
        """
        names = self._of_kind(quantity)
        if not names:
            raise KeyError(f"the history has no {quantity!r}, but {', '.join(dict.fromkeys(map(_kind, self.series)))}")
        labels = [self._labels[group] for group in dict.fromkeys(map(_group, names))]
        ax = ax or plots.new_axes(height=4.0 + plots.room(labels, 6.4))
        self._add_legend(ax, self._draw_series(quantity, ax))
        return ax

    def _draw_series(self, quantity: str, ax: "Axes") -> dict[str, "Line2D"]:
        """Draws it without a legend. Gives the line of each group."""
        names, lines = self._of_kind(quantity), {}
        if "grad_norm.all" in names:
            # What rules recorded of all gradients is the same.
            names = [name for name in names if name != "grad_norm"]
        x = np.arange(1, self.steps + 1)
        width = max(1, self.steps // 50) if quantity == "clipped" else 1
        limits = [self.series[name] for name in self._of_kind("max_norm")] if quantity == "grad_norm" else []
        shown = np.concatenate([*(self.series[name] for name in names), *limits]).astype(float)
        positive = shown[np.isfinite(shown) & (shown > 0)]
        # A schedule that ends at 0 is known by its course, and not by its last few steps.
        wide = quantity != "learning_rate" and plots.spans_decades(positive)
        log = not np.any(shown < 0) and (quantity == "update_ratio" or wide)
        of_groups = [name for name in names if name.partition(".")[0] in PER_GROUP and "." in name]
        for name in sorted(names, key=lambda name: name in of_groups):
            curve = plots.running_mean(self.series[name], width)
            # What rules recorded of all gradients stands behind the groups.
            behind = bool(of_groups) and name not in of_groups
            group = _group(name)
            look = {**self._look(group), "linewidth": 2.5 if behind else 1.2}
            y = np.where(curve > 0, curve, np.nan) if log else curve
            (lines[group],) = ax.plot(x, y, marker=plots.marker(y), **look)
        for limit in limits:
            ax.plot(x, limit, color="0.3", linestyle="--", linewidth=1)
        if quantity == "update_ratio":
            ax.axhline(1e-3, color="0.3", linestyle="--", linewidth=1)
        if log and positive.size:
            ax.set_yscale("log")
        elif quantity == "learning_rate":
            ax.set_ylim(bottom=0)
        if quantity == "clipped":
            ax.set_ylim(-0.03, 1.03)
        if quantity == "loss" and self.skipped.any():
            ticks = x[self.skipped]
            ax.plot(ticks, np.full(len(ticks), 0.97), "|", color="C3", transform=ax.get_xaxis_transform())
        of = f", mean of {width} steps" if width > 1 else ""
        plots.style(ax, title=f"{plots.label(plots.words(quantity), 40)}{of}")
        ax.title.set_fontsize("medium")
        return lines


def _plain(x: Any) -> np.ndarray:
    """As NumPy has it: of dtypes that are JAX's own, float32."""
    values = np.asarray(x)
    return values if values.dtype.kind in "fiub" else values.astype(np.float32)


def _kind(name: str) -> str:
    """The quantity that a series is of: `update_ratio` of `update_ratio.matrix`, `grad_norm` of `matrix.grad_norm`."""
    first, _, rest = name.partition(".")
    return first if first in PER_GROUP or not rest else name.rpartition(".")[2]


def _group(name: str) -> str:
    first, _, rest = name.partition(".")
    return rest if first in PER_GROUP else name.rpartition(".")[0]


def _grid(count: int) -> tuple[int, int]:
    """Rows and columns that leave few places empty."""
    columns = min((3, 4, 2), key=lambda columns: -count % columns) if count > 3 else count
    return -(-count // columns), columns


def history(
    rule: Any,
    loss_fn: Callable[..., Any],
    params: Any,
    batches: Any,
    steps: int | None = None,
    *,
    groups: Groups | None = None,
    seed: int = 0,
    has_aux: bool = False,
    evaluate: Callable[[Any], Any] | None = None,
    shown: bool = True,
) -> History:
    """Trains once and records each step, in the compiled loop and without callbacks.

        rule = chain(clip_by_global_norm(1.0), adamw(Cosine(1e-3, 300)))
        seen = history(rule, problem.loss_fn, problem.init, problem.batches(0, 300))
        seen.plot()
        seen.series["update_ratio.all"]

    Recorded are the loss, what `loss_fn` gives beside it, and all that `observe` describes. Ctrl-C ends it with what
    there is.

    Args:
      rule: a rule, or an (init, update) pair from elsewhere.
      loss_fn: `loss_fn(params, batch) -> loss`, or with `has_aux` `(loss, {name: scalar})`.
      params: the parameters at the start, or a function of a PRNG key that makes them. They are not changed.
      batches: arrays with an axis of batches in front; an iterable of batches; or a function of a seed that gives one
        of these.
      steps: how many; `None`: as many as there are batches. Where there are fewer, they come again.
      groups: {label: selector}, as `by` of `partition`; what none selects is in "rest". `None`: those of the rule.
      seed: that `params` and `batches` are called with.
      evaluate: `evaluate(params) -> scalar or {name: scalar}`, taken at the end, of what `eval_params` gives.
      shown: whether a progress bar is.

    Returns:
      A `History`, with `series`, and with the `params` and the `state` at the end, to go on with.

    Raises:
      TypeError: `rule` is no rule; or as `Task` says.
      ValueError: the groups do not fit the parameters, two series have one name; or as `Task` says.
    """
    known = as_rule(rule, "history")
    task = Task(loss_fn, params, batches, steps, seeds=[seed], has_aux=has_aux, evaluate=evaluate)

    def record(step: Step) -> dict[str, Array]:
        observed = observe(step.before, step.after, step.grads, step.state, known if groups is None else groups)
        if twice := sorted(step.aux.keys() & observed.keys()):
            raise ValueError(f"what loss_fn gives beside the loss needs another name than {', '.join(twice)}")
        return {"loss": step.loss, **step.aux, **observed}

    program = Program(lambda: known, [{}], [], task, record)
    with progress("history", task.steps, shown) as bar:
        block = Block(program)
        going = True
        while going and block.done < task.steps:
            going = bar.advance(block.advance(PART))
    series = {name: _plain(curve[0, 0, : block.done]) for name, curve in block.curves().items()}
    trained, state = block.member()
    return History(
        series=dict(itertools.chain([("loss", series["loss"])], series.items())),
        params=trained,
        state=state,
        final={name: float(x[0, 0]) for name, x in block.evaluate().items()},
        interrupted=block.done < task.steps,
    )
