"""Seconds from a Python function to a program: tracing and lowering, which are ours, and XLA's compilation.

Caches are per process, so each contender has processes of its own, in which nothing but a tiny program has been
compiled before.
"""

import statistics
from typing import Any

import jax
from contenders import CLIPPED_ADAMW, Workload, optax_step, our_step
from measure import seconds, warm_up
from processes import Job, Runs, Settings
from report import Report, Table, lines, new_figure

PEERS = ("optax",)
STAGES = ("trace", "lower", "compile")


def counts(settings: Settings) -> tuple[int, ...]:
    return (2, 4) if settings.quick else (100, 400, 1000)


def jobs(settings: Settings) -> list[Job]:
    libraries = [name for name in ("ours", "optax") if name == "ours" or settings.has(name)]
    return [Job(f"{count} {library}") for count in counts(settings) for library in libraries]


def work(job: str, settings: Settings) -> Any:
    count, library = job.split()
    params = Workload(int(count), (64, 64)).structs()
    if library == "ours":
        rule = CLIPPED_ADAMW.ours()
        step, init = our_step(rule), rule.init
    else:
        optax = settings.peer(library)
        transformation = CLIPPED_ADAMW.optax(optax)
        step, init = optax_step(optax, transformation), transformation.init
    state = jax.eval_shape(init, params)
    warm_up()
    stage: Any = jax.jit(step, donate_argnums=(0, 1))

    def advance(method: str, *args: Any) -> None:
        nonlocal stage
        stage = getattr(stage, method)(*args)

    return {
        "trace": seconds(lambda: advance("trace", params, state, params)),
        "lower": seconds(lambda: advance("lower")),
        "compile": seconds(lambda: advance("compile")),
    }


def report(runs: Runs, settings: Settings) -> Report:
    # Of a process, what is in front of XLA, and all of it.
    def front(found: Any) -> float:
        return found["trace"] + found["lower"]

    def whole(found: Any) -> float:
        return sum(found[stage] for stage in STAGES)

    def of(what: Any, job: str) -> float:
        return min(map(what, runs[job]))

    rows, curves = [], {}
    for job, processes in runs.items():
        count, library = job.split()
        base = f"{count} ours"
        medians = [
            statistics.median(map(what, processes)) / statistics.median(map(what, runs[base]))
            for what in (front, whole)
        ]
        stages = [f"{min(found[stage] for found in processes):.3f}" for stage in STAGES]
        rows.append(
            [
                f"{count} leaves",
                library,
                *stages,
                f"{1e3 * of(front, job) / int(count):.2f}",
                f"{of(front, job) / of(front, base):.2f}",
                f"{medians[0]:.2f}",
                f"{of(whole, job) / of(whole, base):.2f}",
                f"{medians[1]:.2f}",
            ]
        )
        curves.setdefault(f"{library}: trace and lower", {})[int(count)] = of(front, job)
        curves.setdefault(f"{library}: compile", {})[int(count)] = of(lambda found: found["compile"], job)
    columns = (
        "clip + AdamW",
        "contender",
        *(f"{stage} s" for stage in STAGES),
        "trace + lower, ms per leaf",
        "ratio, trace + lower",
        "of medians",
        "ratio, total",
        "of medians",
    )
    less, more = counts(settings)[-2:]
    grown = {
        library: [
            of(what, f"{more} {library}") / of(what, f"{less} {library}") * less / more for what in (front, whole)
        ]
        for library in dict.fromkeys(job.split()[1] for job in runs)
    }
    linearity = Table(
        f"Linearity: seconds per leaf at {more} leaves by those at {less}",
        ("contender", "trace + lower", "total"),
        [[library, *(f"{x:.2f}" for x in ratios)] for library, ratios in grown.items()],
        text_columns=1,
    )
    figure = new_figure(7, 4.5)
    ax = figure.subplots()
    lines(ax, curves, "leaves of 64 × 64", "seconds, best")
    ax.set_title("From function to program, clip + AdamW", fontsize=11)
    note = "Best of the processes, each fresh; ratios are to ours."
    return Report([Table("Compilation", columns, rows, note), linearity], {"compilation.png": figure})
