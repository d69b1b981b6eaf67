"""`Optimizer.update(model)`: what Python costs around the compiled call, for few and for many parameters.

The arrays are tiny, so that nothing but calls is measured. The bare call takes and donates the same flat lists as the
one inside of `update`; what `update` takes longer is our Python. The identity, which only hands its arguments back, is
what any call over so many arrays costs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from contenders import ADAMW, Torch, Workload
from measure import bandwidth, interleaved, warm_up
from processes import Job, Runs, Settings
from report import TIMING_COLUMNS, Report, Table, group, groups, lines, new_figure, summaries, timing_cells

import jaxopt_rules as jr

PEERS = ("optax", "flax", "torch")

ELEMENTS = 64
COUNTS = (6, 24, 100, 1000)
BARE, BARE_DONATING = "jit, bare", "jit, bare, donating"
OURS, OURS_DONATING = "ours: update", "ours: update, donate=True"


class Bag:
    """A model: parameters by name."""

    def __init__(self, params: dict[str, jr.Parameter]) -> None:
        self._params = params

    def params(self) -> dict[str, jr.Parameter]:
        return self._params


def ours(params: dict[str, np.ndarray], grads: dict[str, np.ndarray], donate: bool) -> Callable[[], object]:
    model = Bag({name: jr.Parameter(x, grads[name]) for name, x in params.items()})
    optimizer = jr.Optimizer(ADAMW.ours(), donate=donate)

    def call() -> None:
        optimizer.update(model)
        jax.block_until_ready([parameter.data for parameter in model.params().values()])

    return call


def flat(
    params: dict[str, np.ndarray], grads: dict[str, np.ndarray], donate: tuple[int, ...], identity: bool = False
) -> Callable[[], object]:
    """A compiled call on lists of state, parameters and gradients, alone or as the identity on the first two."""
    rule = ADAMW.ours()
    datas, gs = ([jnp.array(x) for x in tree.values()] for tree in (params, grads))
    leaves, treedef = jax.tree.flatten(rule.init(dict(zip(params, datas, strict=True))))

    def step(leaves: list[Any], datas: list[Any], gs: list[Any]) -> tuple[list[Any], list[Any]]:
        if identity:
            return leaves, datas
        named, named_grads = dict(zip(params, datas, strict=True)), dict(zip(params, gs, strict=True))
        named, state = rule.apply(named_grads, jax.tree.unflatten(treedef, leaves), named)
        return jax.tree.leaves(state), list(named.values())

    # Without keep_unused, the identity would not be handed the gradients.
    program = jax.jit(step, donate_argnums=donate, keep_unused=True)

    def call() -> None:
        nonlocal leaves, datas
        leaves, datas = program(leaves, datas, gs)
        jax.block_until_ready(datas)

    return call


def flax_updates(
    nnx: Any, optax: Any, params: dict[str, np.ndarray], grads: dict[str, np.ndarray]
) -> dict[str, Callable[[], object]]:
    from jaxopt_rules.interop.nnx import Optimizer  # needs flax

    class Module(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.List([nnx.Param(jnp.array(x)) for x in params.values()])

    def eagerly(model: Any, optimizer: Any, gs: Any) -> None:
        optimizer.update(model, gs)

    compiled = nnx.jit(eagerly)

    def caller(kind: Any, rule: Any, update: Callable[[Any, Any, Any], object]) -> Callable[[], object]:
        model = Module()
        optimizer = kind(model, rule, wrt=nnx.Param)
        values, treedef = jax.tree.flatten(nnx.state(model, nnx.Param))
        gs = jax.tree.unflatten(treedef, [jnp.array(g) for g in grads.values()])
        if len(values) != len(grads):
            raise AssertionError(f"{len(values)} arrays in the module, {len(grads)} gradients")

        def call() -> None:
            update(model, optimizer, gs)
            jax.block_until_ready([parameter[...] for parameter in model.w])

        return call

    return {
        "flax: nnx.Optimizer.update": caller(nnx.Optimizer, ADAMW.optax(optax), eagerly),
        "flax: the same in nnx.jit": caller(nnx.Optimizer, ADAMW.optax(optax), compiled),
        "ours: interop.nnx.Optimizer.update": caller(Optimizer, ADAMW.ours(), eagerly),
        "ours: the same in nnx.jit": caller(Optimizer, ADAMW.ours(), compiled),
    }


def jobs(settings: Settings) -> list[Job]:
    return [Job("calls")]


def work(job: str, settings: Settings) -> Any:
    warm_up()
    found = {}
    for count in (2, 4) if settings.quick else COUNTS:
        workload = Workload(count, (ELEMENTS,))
        params, grads = workload.arrays(seed=0, scale=1.0), workload.arrays(seed=1, scale=0.01)
        contenders = {
            "jit, identity": flat(params, grads, (0, 1), identity=True),
            BARE: flat(params, grads, (0,)),
            BARE_DONATING: flat(params, grads, (0, 1)),
            OURS: ours(params, grads, donate=False),
            OURS_DONATING: ours(params, grads, donate=True),
        }
        units = dict.fromkeys(contenders, BARE) | {OURS_DONATING: BARE_DONATING}
        if settings.has("flax") and (optax := settings.peer("optax")):
            contenders |= flax_updates(settings.peer("flax.nnx"), optax, params, grads)
        if torch := settings.peer("torch"):
            contenders["torch: AdamW.step"] = Torch(torch, ADAMW.torch, params, grads)
        units = {name: units.get(name, OURS) for name in contenders}
        found[str(count)] = group(interleaved(contenders, settings.rounds), units)
    return {"bandwidth": bandwidth(settings.bandwidth_megabytes), "groups": found}


def report(runs: Runs, settings: Settings) -> Report:
    rows, curves = [], {}
    for count, processes in groups(runs, "calls").items():
        found = summaries(processes)
        for name, summary in found.items():
            unit = processes[0]["unit"][name]
            python = ["-", "-"]
            if name in (OURS, OURS_DONATING):
                more = summary.best - found[unit].best
                python = [f"{1e6 * more:.0f}", f"{100 * more / summary.best:.0f}%"]
            rows.append([f"{count} parameters", name, unit, *timing_cells(summary), *python])
            curves.setdefault(name, {})[int(count)] = 1e3 * summary.median
    columns = ("model", "contender", "ratio to", *TIMING_COLUMNS, "our Python, µs", "its share")
    figure = new_figure(8, 5)
    ax = figure.subplots()
    lines(ax, curves, f"parameters, of {ELEMENTS} elements", "milliseconds, median")
    ax.set_title("One update of a mutable model", fontsize=11)
    note = "Our Python: the best update less the best bare call over the same lists with the same donation."
    return Report([Table("Mutating updates", columns, rows, note, text_columns=3)], {"mutating.png": figure})
