"""64 learning rates: by `experiments.sweep`, in one program, in one that runs once for each, in a program for each.

The last is what a rate as a constant of Python amounts to. Digits by an MLP 64-64-10, 300 steps of 128 rows. Seconds
are from nothing to the losses, compilation included, each way in processes of its own.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contenders import Step, optax_step, our_step
from measure import warm_up
from processes import Job, Runs, Settings
from report import Report, Table, bars

import jaxopt_rules as jr
from jaxopt_rules.experiments import sweep
from jaxopt_rules.experiments.problems import Problem, digits_mlp

PEERS = ("optax",)

DECAY = 0.01
COMPILED = 4  # so many programs stand for one of each rate
CLOSE = 1e-3  # how far the losses of two ways in the last step may be apart, relative
SWEEP, ONE_VMAP = "experiments.sweep", "one program, vmap"
ONE_PROGRAM, EACH = "one program, run for each", "a program for each"


def rates(settings: Settings) -> np.ndarray:
    return np.geomspace(1e-4, 1e-2, 8 if settings.quick else 64).astype(np.float32)


def problem(settings: Settings) -> tuple[Problem, Any, np.ndarray]:
    """Digits by an MLP 64-64-10, the parameters at the start, and the batches of 128."""
    chosen = digits_mlp()
    return chosen, chosen.init(jax.random.key(0)), chosen.batches(0, 5 if settings.quick else 300)


def ways(library: str, module: Any, settings: Settings) -> dict[str, Callable[[np.ndarray], list[float]]]:
    """The ways of a library, each from rates to losses in the last step."""
    chosen, params, batches = problem(settings)

    def trained(step: Step, state: Any) -> jax.Array:
        def body(carry: Any, batch: jax.Array) -> Any:
            params, state = carry
            loss, grads = jax.value_and_grad(chosen.loss_fn)(params, batch)
            return step(params, state, grads), loss

        return jax.lax.scan(body, (params, state), batches)[1][-1]

    def pair(rate: Any) -> tuple[Step, Any]:
        if library == "ours":
            rule = jr.adamw(rate, weight_decay=DECAY)
            return our_step(rule), rule.init(params)
        transformation = module.adamw(rate, weight_decay=DECAY)
        return optax_step(module, transformation), transformation.init(params)

    def live() -> tuple[Step, Any]:
        if library == "ours":
            return pair(0.0)
        transformation = module.inject_hyperparams(module.adamw)(learning_rate=0.0, weight_decay=DECAY)
        return optax_step(module, transformation), transformation.init(params)

    def with_rate(state: Any, rate: float) -> Any:
        if library == "ours":
            return jr.set_hyperparams(state, learning_rate=rate)
        return state._replace(hyperparams=state.hyperparams | {"learning_rate": jnp.asarray(rate)})

    def final(rate: Any) -> jax.Array:
        return trained(*pair(rate))

    def one_sweep(rates: np.ndarray) -> list[float]:
        def make_rule(learning_rate: Any) -> jr.Rule:
            return jr.adamw(learning_rate, weight_decay=DECAY)

        found = sweep(make_rule, {"learning_rate": rates}, chosen.loss_fn, params, batches, shown=False)
        return found.curves["loss"][:, 0, -1].tolist()

    def one_vmap(rates: np.ndarray) -> list[float]:
        return np.asarray(jax.jit(jax.vmap(final))(jnp.asarray(rates))).tolist()

    def one_program(rates: np.ndarray) -> list[float]:
        step, state = live()
        program = jax.jit(lambda state: trained(step, state))
        return [float(program(with_rate(state, rate))) for rate in rates]

    def each(rates: np.ndarray) -> list[float]:
        return [float(jax.jit(lambda rate=rate: final(rate))()) for rate in rates.tolist()]

    ours = {SWEEP: one_sweep} if library == "ours" else {}
    return ours | {ONE_VMAP: one_vmap, ONE_PROGRAM: one_program, EACH: each}


def jobs(settings: Settings) -> list[Job]:
    others = [f"{library}: {way}" for way in (ONE_VMAP, ONE_PROGRAM, EACH) for library in ("ours", "optax")]
    return [Job(name) for name in (f"ours: {SWEEP}", *others) if settings.has("optax") or name.startswith("ours")]


def work(job: str, settings: Settings) -> Any:
    library, way = job.split(": ")
    module = None if library == "ours" else settings.peer(library)
    chosen = rates(settings)
    picked = np.linspace(0, len(chosen) - 1, COMPILED if way == EACH else len(chosen)).round().astype(int)
    warm_up()
    run = ways(library, module, settings)[way]
    start = time.perf_counter()
    losses = run(chosen[picked])
    taken = time.perf_counter() - start
    return {"seconds": taken * len(chosen) / len(picked), "rates": chosen[picked].tolist(), "losses": losses}


def report(runs: Runs, settings: Settings) -> Report:
    base = runs[f"ours: {SWEEP}"]
    best = min(found["seconds"] for found in base)
    median = statistics.median(found["seconds"] for found in base)
    expected = dict(zip(base[0]["rates"], base[0]["losses"], strict=True))
    rows, bests = [], {}
    for job, processes in runs.items():
        found = [process["seconds"] for process in processes]
        apart = max(
            abs(loss / expected[rate] - 1)
            for process in processes
            for rate, loss in zip(process["rates"], process["losses"], strict=True)
        )
        if not apart <= CLOSE:
            raise AssertionError(f"sweep, {job}: a final loss is {apart:.1e} off, more than {CLOSE:.0e}")
        counted = len(processes[0]["rates"])
        cells = [min(found), statistics.median(found), min(found) / best, statistics.median(found) / median]
        measured = "all" if counted == len(expected) else f"{counted}, times {len(expected) / counted:g}"
        rows.append([job, measured, *(f"{x:.2f}" for x in cells), f"{apart:.1e}"])
        bests[job] = min(found)
    columns = ("way", "rates measured", "best s", "median s", "ratio of bests", "of medians", "losses apart")
    note = f"Ratios are to `experiments.sweep`. No loss in the last step is {CLOSE:.0e} of itself apart from its."
    title = f"Sweep: {len(expected)} learning rates, compilation included"
    return Report(
        [Table(title, columns, rows, note)],
        {"sweep.png": bars(title, "seconds, best", {"": bests}, named=False, log=True)},
    )
