"""How time grows, with the parameters and with the leaves that they are in, and where it is no longer bandwidth."""

from typing import Any

from contenders import CLIPPED_ADAMW, Workload, built
from measure import bandwidth, interleaved, warm_up
from processes import Job, Runs, Settings
from report import (
    BYTES_COLUMNS,
    TIMING_COLUMNS,
    Report,
    Table,
    bandwidth_note,
    bytes_cells,
    group,
    groups,
    limit,
    lines,
    new_figure,
    summaries,
    timing_cells,
)

PEERS = ("optax", "torch")

BOUND = 0.5  # of the limit: from there on a step is counted as bound by the memory
LEAVES = 16  # where the parameters grow
PARAMETERS = 2**22  # where the leaves grow


def sizes(job: str, settings: Settings) -> list[int]:
    if job == "parameters":
        return [10**3, 10**4] if settings.quick else [10**5, 10**6, 10**7, 10**8]
    # XLA takes minutes for a program over 4096 leaves.
    return [1, 4] if settings.quick else [1, 4, 16, 64, 256, 1024, *([4096] if settings.full else [])]


def workload(job: str, size: int, settings: Settings) -> Workload:
    if job == "parameters":
        return Workload(LEAVES, (size // LEAVES,))
    return Workload(size, ((2**12 if settings.quick else PARAMETERS) // size,))


def jobs(settings: Settings) -> list[Job]:
    return [Job("parameters"), Job("leaves")]


def work(job: str, settings: Settings) -> Any:
    warm_up()
    found = {}
    for size in sizes(job, settings):
        load = workload(job, size, settings)
        contenders = built(CLIPPED_ADAMW, load, settings)
        moved = dict.fromkeys(contenders, CLIPPED_ADAMW.bytes_each * load.parameters)
        found[str(size)] = group(interleaved(contenders, settings.rounds), moved=moved)
        del contenders
    return {"bandwidth": bandwidth(settings.bandwidth_megabytes), "groups": found}


def report(runs: Runs, settings: Settings) -> Report:
    bound = limit(runs)
    tables, ends = [], []
    figure = new_figure(11, 4.8)
    for ax, job in zip(figure.subplots(1, 2), ("parameters", "leaves"), strict=True):
        rows, curves, least, reached = [], {}, {}, {}
        for size, processes in groups(runs, job).items():
            for contender, summary in summaries(processes).items():
                moved = processes[0]["bytes"][contender]
                cells = timing_cells(summary) + bytes_cells(moved, summary.best, bound)
                rows.append([f"{int(size):,}", contender, *cells])
                curves.setdefault(contender, {})[int(size)] = 1e3 * summary.best
                least[int(size)] = 1e3 * moved / bound
                reached.setdefault(contender, {})[int(size)] = moved / summary.best / bound
        for contender, shares in reached.items():
            ends.append([job, contender, where_bound(job, shares)])
        held = f"in {LEAVES} leaves" if job == "parameters" else f"{workload(job, 1, settings).parameters:,} parameters"
        tables.append(
            Table(
                f"Growth with {job}, {held}, clip + AdamW",
                (job, "contender", *TIMING_COLUMNS, *BYTES_COLUMNS),
                rows,
                f"Ratios are to ours. {bandwidth_note(runs)}",
            )
        )
        lines(ax, curves, job, "milliseconds, best")
        ax.plot(least.keys(), least.values(), color="0.3", ls="--", lw=1, label="bytes / bandwidth", zorder=0)
        ax.legend(fontsize=8)
        ax.set_title(f"with {job}, {held}", fontsize=10)
    figure.suptitle("Time of a step, clip + AdamW", fontsize=11)
    title = f"Where it is bandwidth: {100 * BOUND:.0f}% of the limit and more"
    tables.append(Table(title, ("growing", "contender", "bound by the memory"), ends, text_columns=3))
    return Report(tables, {"growth.png": figure})


def where_bound(job: str, shares: dict[int, float]) -> str:
    """The sizes at which a step is bound by the memory, all in one piece from the end where it moves most at a time."""
    order = sorted(shares, reverse=job == "parameters")
    reached = []
    for size in order:
        if shares[size] < BOUND:
            break
        reached.append(size)
    if not reached:
        return "nowhere"
    if len(reached) == len(order):
        return "everywhere"
    return f"from {reached[-1]:,} on" if job == "parameters" else f"up to {reached[-1]:,}"
