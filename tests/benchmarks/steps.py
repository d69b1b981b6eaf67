"""One training step's optimizer, compiled and donated: milliseconds, the bandwidth that they are, and the program.

An optimizer computes little and moves much: its limit is the memory. `bytes` are those that no implementation can
avoid, so that a step at 100% of the limit could not be faster.
"""

import re
from typing import Any

import jax
from contenders import RECIPES, Workload, built, optax_step, our_step
from measure import bandwidth, interleaved, warm_up
from processes import Job, Runs, Settings
from report import (
    BYTES_COLUMNS,
    TIMING_COLUMNS,
    Report,
    Table,
    bandwidth_note,
    bars,
    bytes_cells,
    group,
    groups,
    limit,
    summaries,
    timing_cells,
)

PEERS = ("optax", "torch")

LARGE, MEDIUM = Workload(64, (1024, 512)), Workload(16, (1024, 512))
WORKLOADS = (LARGE, Workload(100, (512, 512)), MEDIUM, Workload(100, (256, 256)), Workload(400, (64, 64)))
TINY = (Workload(3, (64, 64)),)

# XLA's CPU backend computes the three results of AdamW in three loops; this option, off by default, joins them.
FUSED = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion=true"

# job -> the recipes that it runs, each on which workloads
PLAN = {
    "clip + AdamW": {"clip + AdamW": WORKLOADS},
    "AdamW": {"AdamW": (LARGE, MEDIUM)},
    "others": dict.fromkeys(("momentum", "Lion", "Adafactor"), (LARGE, MEDIUM)),
    "multi-output fusion": dict.fromkeys(("clip + AdamW", "AdamW"), (LARGE, MEDIUM)),
}
PROGRAMS = {"programs": "", "programs, multi-output fusion": FUSED}


def jobs(settings: Settings) -> list[Job]:
    runs = [Job(name, FUSED if name == "multi-output fusion" else "") for name in PLAN]
    return runs + [Job(name, flags, once=True) for name, flags in PROGRAMS.items()]


def work(job: str, settings: Settings) -> Any:
    warm_up()
    return {"programs": programs(settings)} if job in PROGRAMS else times(job, settings)


def times(job: str, settings: Settings) -> Any:
    # Where XLA is told something that PyTorch is not, PyTorch has run in another job.
    libraries = ("optax",) if job == "multi-output fusion" else PEERS
    found = {}
    for name, workloads in PLAN[job].items():
        recipe = RECIPES[name]
        for workload in TINY if settings.quick else workloads:
            contenders = built(recipe, workload, settings, libraries)
            moved = (
                {} if recipe.bytes_each is None else dict.fromkeys(contenders, recipe.bytes_each * workload.parameters)
            )
            found[f"{name}, {workload}"] = group(interleaved(contenders, settings.rounds), moved=moved)
            del contenders
    return {"bandwidth": bandwidth(settings.bandwidth_megabytes), "groups": found}


def programs(settings: Settings) -> Any:
    """What XLA makes of each step. Facts, not times."""
    workload = TINY[0] if settings.quick else MEDIUM
    params = workload.structs()
    optax = settings.peer("optax")
    found = {}
    for name, recipe in RECIPES.items():
        rule = recipe.ours()
        pairs = {"ours": (our_step(rule), rule.init)}
        if optax:
            transformation = recipe.optax(optax)
            pairs["optax"] = (optax_step(optax, transformation), transformation.init)
        for library, (step, init) in pairs.items():
            state = jax.eval_shape(init, params)
            compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
            text = compiled.as_text()
            found[f"{name}|{library}"] = {
                "temp bytes": compiled.memory_analysis().temp_size_in_bytes,
                "bytes of gradients": 4 * workload.parameters,
                "fusions": len(re.findall(r"\bfusion\(", text)),
                "copies": len(re.findall(r"= \w+\[\d[^\]]*\]\S* copy\(", text)),
            }
    return found


def report(runs: Runs, settings: Settings) -> Report:
    bound = limit(runs)
    rows, shares = [], {}
    for job in PLAN:
        for name, processes in groups(runs, job).items():
            title = f"{name}, multi-output" if job == "multi-output fusion" else name
            for contender, summary in summaries(processes).items():
                moved = processes[0]["bytes"].get(contender)
                cells = timing_cells(summary) + bytes_cells(moved, summary.best, bound)
                rows.append([title, contender, *cells])
                if moved is not None:
                    shares.setdefault(title, {})[contender] = 100 * moved / summary.best / bound
    note = (
        "Ratios are to ours, of times: above 1 is slower. Multi-output: XLA is told to fuse what has several results, "
        f"as it does not by default. {bandwidth_note(runs)}"
    )
    columns = ("step", "contender", *TIMING_COLUMNS, *BYTES_COLUMNS)
    facts = Table(
        f"Programs, {TINY[0] if settings.quick else MEDIUM}",
        ("step", "contender", "temp bytes", "of the gradients", "fusions", "copies of arrays"),
        [program_row(name, x, job) for job in PROGRAMS for name, x in runs[job][0]["programs"].items()],
    )
    figure = bars("Bandwidth that a step reaches", "percent of this machine's limit, best call", shares)
    return Report([Table("Steps", columns, rows, note), facts], {"steps.png": figure})


def program_row(name: str, facts: Any, job: str) -> list[str]:
    recipe, library = name.split("|")
    flagged = ", multi-output fusion" if PROGRAMS[job] else ""
    temp = facts["temp bytes"]
    share = f"{100 * temp / facts['bytes of gradients']:.1f}%"
    return [f"{recipe}{flagged}", library, f"{temp:,}", share, str(facts["fusions"]), str(facts["copies"])]
