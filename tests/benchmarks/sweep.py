"""Many learning rates: in one program, in one program that runs once for each, and in one program for each.

The last is what a rate as a constant of Python amounts to. Seconds are from nothing to the losses, compilation
included, each way in processes of its own.
"""

import itertools
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

PEERS = ("optax",)

DECAY = 0.01
COMPILED = 4  # so many programs stand for one of each rate
CLOSE = 1e-3  # how far the final losses of two ways may be apart, relative
ONE_VMAP, ONE_PROGRAM, EACH = "one program, vmap", "one program, run for each", "a program for each"


def rates(settings: Settings) -> np.ndarray:
    return np.geomspace(1e-4, 1e-2, 8 if settings.quick else 64).astype(np.float32)


def data() -> tuple[Any, jax.Array, jax.Array]:
    """Parameters of a small MLP, and a batch."""
    rng = np.random.default_rng(0)
    sizes = (64, 64, 64, 10)
    params = [
        {"w": jnp.asarray(rng.standard_normal((n, m), np.float32) / n**0.5), "b": jnp.zeros(m)}
        for n, m in itertools.pairwise(sizes)
    ]
    x = jnp.asarray(rng.standard_normal((128, sizes[0]), np.float32))
    return params, x, jnp.asarray(rng.standard_normal((128, sizes[-1]), np.float32))


def loss_fn(params: Any, x: jax.Array, t: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return jnp.mean((x @ params[-1]["w"] + params[-1]["b"] - t) ** 2)


def trained(step: Step, params: Any, state: Any, x: jax.Array, t: jax.Array, steps: int) -> jax.Array:
    """The loss behind so many steps."""

    def body(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        return step(params, state, jax.grad(loss_fn)(params, x, t)), None

    (params, _), _ = jax.lax.scan(body, (params, state), length=steps)
    return loss_fn(params, x, t)


def ways(library: str, module: Any, steps: int) -> dict[str, Callable[[np.ndarray], list[float]]]:
    """The three ways of a library, each from rates to final losses."""
    params, x, t = data()

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
        step, state = pair(rate)
        return trained(step, params, state, x, t, steps)

    def one_vmap(rates: np.ndarray) -> list[float]:
        return np.asarray(jax.jit(jax.vmap(final))(jnp.asarray(rates))).tolist()

    def one_program(rates: np.ndarray) -> list[float]:
        step, state = live()
        program = jax.jit(lambda state: trained(step, params, state, x, t, steps))
        return [float(program(with_rate(state, rate))) for rate in rates]

    def each(rates: np.ndarray) -> list[float]:
        return [float(jax.jit(lambda rate=rate: final(rate))()) for rate in rates.tolist()]

    return {ONE_VMAP: one_vmap, ONE_PROGRAM: one_program, EACH: each}


def jobs(settings: Settings) -> list[Job]:
    libraries = [name for name in ("ours", "optax") if name == "ours" or settings.has(name)]
    return [Job(f"{library}: {way}") for way in (ONE_VMAP, ONE_PROGRAM, EACH) for library in libraries]


def work(job: str, settings: Settings) -> Any:
    library, way = job.split(": ")
    module = None if library == "ours" else settings.peer(library)
    chosen = rates(settings)
    picked = np.linspace(0, len(chosen) - 1, COMPILED if way == EACH else len(chosen)).round().astype(int)
    warm_up()
    sweep = ways(library, module, 5 if settings.quick else 100)[way]
    start = time.perf_counter()
    losses = sweep(chosen[picked])
    taken = time.perf_counter() - start
    return {"seconds": taken * len(chosen) / len(picked), "rates": chosen[picked].tolist(), "losses": losses}


def report(runs: Runs, settings: Settings) -> Report:
    base = runs[f"ours: {ONE_VMAP}"]
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
    note = f"Ratios are to our vmap. The largest relative difference of a final loss from it is held below {CLOSE:.0e}."
    title = f"Sweep: {len(expected)} learning rates, compilation included"
    return Report(
        [Table(title, columns, rows, note)],
        {"sweep.png": bars(title, "seconds, best", {"": bests}, named=False, log=True)},
    )
