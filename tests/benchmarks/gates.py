"""What stands around an optimizer: a call that does nothing should cost nothing, and one that acts, the act.

Units: of a micro-step, adding the gradients to their sum, which is the least that accumulation can do; of the last one,
and of an average, AdamW alone; of a step that is skipped where the gradient is not finite, AdamW and the norm that
tells.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from contenders import ADAMW, Jitted, Step, Workload, optax_step, our_step
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

import jaxopt_rules as jr

PEERS = ("optax",)

NEVER = 10**9  # micro-steps to an update that is not reached

ADD, ADAMW_ALONE, ADAMW_AND_NORM = "add: acc + g", "ours: adamw", "ours: adamw and the norm"

# contender -> its unit, the bytes per parameter that it must move, and how large its ratio may be
PLAN: dict[str, tuple[str, int, float | None]] = {
    ADD: (ADD, 12, None),  # g, the sum in and out
    "ours: accumulate, keep": (ADD, 12, 1.3),
    "ours: accumulate, drop": (ADD, 16, 1.8),  # the norm must be known first: g is read twice
    "optax: MultiSteps": (ADD, 12, None),
    ADAMW_ALONE: (ADAMW_ALONE, 28, None),
    "ours: accumulate, keep, last": (ADAMW_ALONE, 36, None),  # AdamW's 28, and the mean in and out
    "ours: accumulate, drop, last": (ADAMW_ALONE, 40, None),
    "optax: MultiSteps, last": (ADAMW_ALONE, 36, None),
    "ours: average": (ADAMW_ALONE, 36, None),  # AdamW's 28, and the average in and out; the new θ is at hand
    "ours: lookahead": (ADAMW_ALONE, 28, None),  # as between two synchronizations, of which each sixth step is one
    "optax: incremental_update": (ADAMW_ALONE, 36, None),
    ADAMW_AND_NORM: (ADAMW_AND_NORM, 32, None),
    "ours: skip_nonfinite": (ADAMW_AND_NORM, 32, 1.05),
    "optax: apply_if_finite": (ADAMW_AND_NORM, 32, None),
}


def jobs(settings: Settings) -> list[Job]:
    return [Job("gates")]


def our_pairs() -> dict[str, tuple[Step, Callable[[Any], Any]]]:
    adamw = ADAMW.ours()
    rules = {
        "ours: accumulate, keep": jr.accumulate(adamw, NEVER, nonfinite="keep"),
        "ours: accumulate, drop": jr.accumulate(adamw, NEVER, nonfinite="drop"),
        ADAMW_ALONE: adamw,
        "ours: accumulate, keep, last": jr.accumulate(adamw, 1, nonfinite="keep"),
        "ours: accumulate, drop, last": jr.accumulate(adamw, 1, nonfinite="drop"),
        "ours: average": jr.average(adamw),
        "ours: lookahead": jr.lookahead(adamw),
        "ours: skip_nonfinite": jr.skip_nonfinite(adamw),
    }

    def add(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        return jax.tree.map(lambda acc, g: acc + g, params, grads), state

    def with_norm(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        # The barrier makes it the best that one could write: without it, XLA keeps each g² of the norm for the update.
        norm, params, grads = jax.lax.optimization_barrier((jr.global_norm(grads), params, grads))
        params, inner = adamw.apply(grads, state[0], params)
        return params, (inner, norm)

    return {
        ADD: (add, lambda params: ()),
        **{name: (our_step(rule), rule.init) for name, rule in rules.items()},
        ADAMW_AND_NORM: (with_norm, lambda params: (adamw.init(params), jr.global_norm(params))),
    }


def optax_pairs(optax: Any) -> dict[str, tuple[Step, Callable[[Any], Any]]]:
    adamw = ADAMW.optax(optax)
    wrapped = {
        "optax: MultiSteps": optax.MultiSteps(adamw, NEVER),
        "optax: MultiSteps, last": optax.MultiSteps(adamw, 1),
        "optax: apply_if_finite": optax.apply_if_finite(adamw, 5),
    }
    step = optax_step(optax, adamw)

    def averaged(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        params, inner = step(params, state[0], grads)
        return params, (inner, optax.incremental_update(params, state[1], 0.001))

    def init(params: Any) -> Any:
        return adamw.init(params), jax.tree.map(lambda p: p + 0, params)

    pairs = {name: (optax_step(optax, transformation), transformation.init) for name, transformation in wrapped.items()}
    return {**pairs, "optax: incremental_update": (averaged, init)}


def work(job: str, settings: Settings) -> Any:
    warm_up()
    workload = Workload(3, (64, 64)) if settings.quick else Workload(16, (1024, 512))
    params = workload.arrays(seed=0, scale=1.0)
    grads = {name: jnp.array(x) for name, x in workload.arrays(seed=1, scale=0.01).items()}
    pairs = our_pairs()
    if optax := settings.peer("optax"):
        pairs |= optax_pairs(optax)
    contenders = {name: Jitted(*pairs[name], params, grads) for name in PLAN if name in pairs}
    units = {name: PLAN[name][0] for name in contenders}
    moved = {name: PLAN[name][1] * workload.parameters for name in contenders}
    found = group(interleaved(contenders, settings.rounds), units, moved)
    return {"bandwidth": bandwidth(settings.bandwidth_megabytes), "groups": {str(workload): found}}


def report(runs: Runs, settings: Settings) -> Report:
    bound = limit(runs)
    ((workload, processes),) = groups(runs, "gates").items()
    rows, ratios = [], {}
    for name, summary in summaries(processes).items():
        unit, _, target = PLAN[name]
        moved = processes[0]["bytes"][name]
        cells = [*timing_cells(summary), "-" if target is None else f"{target:.2f}"]
        rows.append([unit, name, *cells, *bytes_cells(moved, summary.best, bound)])
        ratios.setdefault(unit, {})[name] = summary.of_median
    note = (
        "Ratios are to the unit. Bytes of an average: those of AdamW, and the average in and out; the new parameters "
        f"are at hand. Of lookahead: those between two synchronizations. {bandwidth_note(runs)}"
    )
    columns = ("unit", "contender", *TIMING_COLUMNS, "target", *BYTES_COLUMNS)
    figure = bars("Around a step", "time by that of the first of its group, median", ratios, named=False)
    return Report([Table(f"Gates and averages, {workload}", columns, rows, note)], {"gates.png": figure})
