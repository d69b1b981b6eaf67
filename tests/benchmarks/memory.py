"""The peak of a step, by XLA's account and by the process's own, in units of parameters, gradients and state.

1.00 is a step that needs nothing but what it is given. Each contender has processes of its own: what an allocator
keeps, and what compilation took, is otherwise in the peak of the next.
"""

import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from contenders import CLIPPED_ADAMW, Workload, optax_step, our_step
from measure import warm_up
from processes import Job, Runs, Settings
from report import Report, Table, bars

PEERS = ("optax", "torch")
STEPS = 3


def jobs(settings: Settings) -> list[Job]:
    return [Job(name) for name in ("ours", "optax", "torch") if name == "ours" or settings.has(name)]


def work(job: str, settings: Settings) -> Any:
    workload = Workload(4, (512, 512)) if settings.quick else Workload(64, (1024, 512))
    if job == "torch":
        torch = settings.peer("torch")
        # A first step imports what PyTorch needs for one.
        torch_step(torch, Workload(1, (4,)))()
        program, build = None, lambda: torch_step(torch, workload)
    else:
        program, build = compiled(job, workload, settings)
    before = resident()
    step = build()
    # PyTorch makes its state, and any allocator its pools, in the first steps.
    step()
    step()
    whole = reset_peak()
    for _ in range(STEPS):
        step()
    return {
        "needed": 16 * workload.parameters,  # θ, g, m, v
        "program": program,
        "process": peak() - before,
        "since": "the steps alone" if whole else "all since the start of the process",
    }


def compiled(library: str, workload: Workload, settings: Settings) -> tuple[int, Callable[[], Callable[[], None]]]:
    """The bytes that XLA names, and what makes the arrays. It compiles first: that is no part of a step."""
    if library == "ours":
        rule = CLIPPED_ADAMW.ours()
        step, init = our_step(rule), rule.init
    else:
        optax = settings.peer(library)
        transformation = CLIPPED_ADAMW.optax(optax)
        step, init = optax_step(optax, transformation), transformation.init
    warm_up()
    params = workload.structs()
    state = jax.eval_shape(init, params)
    program = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    account = program.memory_analysis()
    total = (
        account.argument_size_in_bytes
        + account.output_size_in_bytes
        - account.alias_size_in_bytes
        + account.temp_size_in_bytes
    )

    def build() -> Callable[[], None]:
        params = {name: jnp.full(x.shape, 1.0) for name, x in workload.structs().items()}
        grads = {name: jnp.full(x.shape, 0.01) for name, x in params.items()}
        state = init(params)

        def call() -> None:
            nonlocal params, state
            params, state = program(params, state, grads)
            jax.block_until_ready((params, state))

        return call

    return total, build


def torch_step(torch: Any, workload: Workload) -> Callable[[], object]:
    params = [torch.nn.Parameter(torch.full(workload.shape, 1.0)) for _ in range(workload.leaves)]
    for parameter in params:
        parameter.grad = torch.full(workload.shape, 0.01)
    return CLIPPED_ADAMW.torch(torch, params)


def resident() -> int:
    """Bytes of this process that are in memory now."""
    status = _status("VmRSS")
    return maximum() if status is None else status


def reset_peak() -> bool:
    """Lets the peak begin anew, where the system permits it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak() -> int:
    """The most bytes that this process has had in memory since then."""
    status = _status("VmHWM")
    return maximum() if status is None else status


def maximum() -> int:
    # macOS counts in bytes, Linux in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(field: str) -> int | None:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return 1024 * int(re.findall(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)[0])


def report(runs: Runs, settings: Settings) -> Report:
    needed = runs["ours"][0]["needed"]
    least = {name: min(found["process"] for found in processes) for name, processes in runs.items()}
    rows, shares = [], {}
    for name, processes in runs.items():
        program = processes[0]["program"]
        rows.append(
            [
                name,
                f"{needed / 1e6:,.1f}",
                "-" if program is None else f"{program / 1e6:,.1f}",
                "-" if program is None else f"{program / needed:.2f}",
                f"{least[name] / 1e6:,.1f}",
                f"{least[name] / needed:.2f}",
                f"{least[name] / least['ours']:.2f}",
            ]
        )
        shares[name] = least[name] / needed
    columns = (
        "clip + AdamW",
        "θ, g, state MB",
        "program MB",
        "of θ, g, state",
        "process MB",
        "of θ, g, state",
        "ratio to ours",
    )
    note = (
        "Program: arguments, outputs that do not take their place, and temporaries. Process: growth of resident memory "
        f"to the peak of {runs['ours'][0]['since']}, the least of the processes."
    )
    title = f"Peak memory of a step, {needed / 16e6:.1f}M parameters"
    figure = bars(title, "by the bytes of parameters, gradients and state", {"": shares}, named=False)
    return Report([Table(title, columns, rows, note, text_columns=1)], {"memory.png": figure})
