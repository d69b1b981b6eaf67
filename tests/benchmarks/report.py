"""What a run says: statistics over processes, tables for the terminal and as Markdown, and plots."""

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from processes import Runs
from rich.table import Table as RichTable

WIDTH = 180  # characters that the widest table needs
COLORS = {"ours": "C0", "optax": "C1", "torch": "C2", "flax": "C4"}


@dataclass(frozen=True)
class Table:
    """A table of text; the first `text_columns` stand on the left, numbers on the right."""

    title: str
    columns: Sequence[str]
    rows: list[list[str]]
    note: str = ""
    text_columns: int = 2

    def rich(self) -> RichTable:
        shown = RichTable(title=self.title, caption=self.note or None, caption_justify="left", title_justify="left")
        for i, column in enumerate(self.columns):
            shown.add_column(column, justify="left" if i < self.text_columns else "right")
        firsts = [row[0] for row in self.rows]
        repeats = len(set(firsts)) < len(firsts)
        for k, row in enumerate(self.rows):
            again = k > 0 and firsts[k - 1] == row[0]
            shown.add_row("" if again else row[0], *row[1:], end_section=repeats and firsts[k + 1 : k + 2] != [row[0]])
        return shown

    def markdown(self) -> str:
        ruler = ["---" if i < self.text_columns else "---:" for i in range(len(self.columns))]
        lines = [f"| {' | '.join(row)} |" for row in (self.columns, ruler, *self.rows)]
        return "\n".join([f"**{self.title}**", "", *lines, *(["", self.note] if self.note else [])])


@dataclass(frozen=True)
class Report:
    """What a section says."""

    tables: list[Table]
    figures: dict[str, Figure] = field(default_factory=dict)  # file name -> figure


# ---------------------------------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """One contender over all processes, in seconds, and against the one that is its unit."""

    best: float
    median: float  # of all calls in all processes
    of_best: float  # best by the unit's best: what the program can do
    of_median: float  # the median of the ratios that the medians have within one process: what it does
    spread: tuple[float, float]  # the least and the largest of those ratios


def summaries(processes: Sequence[Mapping[str, Any]]) -> dict[str, Summary]:
    """Of a group of contenders: what each process found as `seconds`, and the `unit` of each contender."""

    def calls(process: Mapping[str, Any], name: str) -> list[float]:
        return [x for turn in process["seconds"][name] for x in turn]

    def best(name: str) -> float:
        return min(min(calls(process, name)) for process in processes)

    def median(process: Mapping[str, Any], name: str) -> float:
        return statistics.median(calls(process, name))

    found = {}
    for name in processes[0]["seconds"]:
        unit = processes[0]["unit"][name]
        ratios = [median(process, name) / median(process, unit) for process in processes]
        found[name] = Summary(
            best=best(name),
            median=statistics.median([x for process in processes for x in calls(process, name)]),
            of_best=best(name) / best(unit),
            of_median=statistics.median(ratios),
            spread=(min(ratios), max(ratios)),
        )
    return found


def group(seconds: Any, unit: str | Mapping[str, str] = "ours", moved: Mapping[str, int] | None = None) -> Any:
    """What a worker says of one group of contenders: their times, whom each is compared with, the bytes of a call."""
    units = dict.fromkeys(seconds, unit) if isinstance(unit, str) else dict(unit)
    return {"seconds": seconds, "unit": units, "bytes": dict(moved or {})}


def limit(runs: Runs) -> float:
    """Bytes per second: the most that any process of a section has measured."""
    return max(max(process["bandwidth"].values()) for process in timed(runs))


def timed(runs: Runs) -> list[Any]:
    return [process for found in runs.values() for process in found if "bandwidth" in process]


def groups(runs: Runs, job: str) -> dict[str, list[Any]]:
    """The groups of a job, each with what its processes found."""
    return {name: [process["groups"][name] for process in runs[job]] for name in runs[job][0]["groups"]}


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------

TIMING_COLUMNS = ("best ms", "median ms", "ratio of bests", "of medians", "its range")
BYTES_COLUMNS = ("MB", "GB/s", "of limit")


def timing_cells(summary: Summary) -> list[str]:
    low, high = summary.spread
    return [
        milliseconds(summary.best),
        milliseconds(summary.median),
        f"{summary.of_best:.2f}",
        f"{summary.of_median:.2f}",
        f"{low:.2f}-{high:.2f}",
    ]


def bytes_cells(moved: int | None, seconds: float, bound: float) -> list[str]:
    if moved is None:
        return ["-", "-", "-"]
    return [f"{moved / 1e6:.1f}", f"{moved / seconds / 1e9:.1f}", f"{100 * moved / seconds / bound:.0f}%"]


def bandwidth_note(runs: Runs) -> str:
    found = timed(runs)
    each = {name: max(process["bandwidth"][name] for process in found) for name in found[0]["bandwidth"]}
    return (
        f"The limit is this machine's: {each['in place'] / 1e9:.1f} GB/s for x + 1 in place by XLA, "
        f"{each['copy'] / 1e9:.1f} GB/s for a copy by one thread of NumPy; the larger one, of the best process. "
        "More than 100% is possible where arrays stay in the cache."
    )


def milliseconds(seconds: float) -> str:
    """With three digits, and no fewer than those in front of the point."""
    value = 1e3 * seconds
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


# ---------------------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------------------


def color(contender: str) -> str:
    """One for each library, whatever follows its name."""
    return COLORS.get(contender.split()[0].rstrip(":,"), "C7")


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def bars(
    title: str, label: str, values: Mapping[str, Mapping[str, float]], *, named: bool = True, log: bool = False
) -> Figure:
    """A bar for each contender of each group, with its value at its end."""
    rows = [(name, contender, value) for name, members in values.items() for contender, value in members.items()]
    figure = new_figure(9, 1.2 + 0.26 * len(rows) + 0.2 * len(values))
    ax = figure.subplots()
    ticks, labels, y, before = [], [], 0.0, None
    for name, contender, value in rows:
        first, before = name != before, name
        y += 1.6 if first else 1.0
        ax.barh(y, value, height=0.85, color=color(contender))
        ax.annotate(f"{value:.3g}", (value, y), (3, 0), textcoords="offset points", va="center", fontsize=8)
        ticks.append(y)
        labels.append(f"{name}   {contender}" if named and first else contender)
    ax.set_yticks(ticks, labels, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel(label)
    ax.set_title(title, fontsize=11)
    ax.margins(x=0.12, y=0.02)
    ax.grid(axis="x", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    if log:
        ax.set_xscale("log")
    return figure


def lines(ax: Any, curves: Mapping[str, Mapping[float, float]], x_label: str, y_label: str) -> None:
    """Log-log curves with a mark at each point."""
    styles = ("-", "--", ":", "-.")
    drawn: list[str] = []
    for name, points in curves.items():
        style = styles[drawn.count(color(name)) % len(styles)]
        drawn.append(color(name))
        ax.plot(points.keys(), points.values(), marker="o", ls=style, ms=4, color=color(name), label=name)
    ax.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.grid(alpha=0.3, which="both", lw=0.4)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8)


def save(figure: Figure, path: Path) -> None:
    """The file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(temporary, format="png", dpi=150)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
