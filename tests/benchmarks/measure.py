"""How steps are timed: in turns, each after a call that does not count, and beside what the memory can do.

Three things would falsify a plain loop around one contender after another:

- XLA's thread pool lands in one of two modes, a factor of 1.6 to 2 apart, when a process starts, and stays in it. So
  a ratio is taken within one process, over rounds in which every contender has its turn, and there are several.
- PyTorch's threads spin for a few milliseconds behind a parallel region, and caches hold what ran last. So there is a
  pause in front of each turn, its first call is not counted, and each round begins with another contender.
- A collection of garbage can fall into any call. So there is none while the clock runs.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np

PAUSE = 0.005  # seconds in front of a turn
TURN = 0.02  # seconds that a turn should take, within the bounds on its calls
CALLS = (3, 30)
SLOW, SLOW_ROUNDS = 0.5, 3  # what takes longer than this many seconds has one call in each of so many rounds

Seconds = dict[str, list[list[float]]]  # contender -> round -> call


def interleaved(contenders: Mapping[str, Callable[[], object]], rounds: int) -> Seconds:
    """The seconds of each call. A contender returns when its work is done, not when it has been dispatched."""
    plan = {}
    for name, call in contenders.items():
        call()  # compiles
        once = seconds(call)
        slow = once > SLOW
        calls = 1 if slow else min(max(round(TURN / once), CALLS[0]), CALLS[1])
        plan[name] = calls, min(rounds, SLOW_ROUNDS) if slow else rounds
    found: Seconds = {name: [] for name in contenders}
    order = list(contenders)
    with without_collection():
        for k in range(rounds):
            first = k % len(order)
            for name in order[first:] + order[:first]:
                calls, turns = plan[name]
                if k < turns:
                    time.sleep(PAUSE)
                    contenders[name]()
                    found[name].append([seconds(contenders[name]) for _ in range(calls)])
    return found


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextmanager
def without_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def bandwidth(megabytes: int, calls: int = 10) -> dict[str, float]:
    """Bytes per second that this process reads and writes, by XLA's threads and by one of NumPy's. The best of some."""
    size = megabytes * 2**20 // 4
    source, target = np.ones(size, np.float32), np.zeros(size, np.float32)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = add(jnp.array(source))

    def add_one() -> None:
        nonlocal x
        x = add(x).block_until_ready()

    moved = 2 * source.nbytes
    contenders = {"in place": add_one, "copy": lambda: np.copyto(target, source)}
    return {name: moved / min(map(min, found)) for name, found in interleaved(contenders, math.ceil(calls / 3)).items()}


def warm_up() -> None:
    """Lets JAX set itself up, so that no program that is looked at pays for it."""
    jax.jit(lambda x: jnp.sum(x * 2) + 1)(jnp.ones((4, 4))).block_until_ready()
