"""Two modes: 32-bit, the default, and 64-bit, which needs a process of its own (see test_x64.py).

Tests marked `x64` run in the second alone, all others in the first alone. Those marked `thorough` take long for what
they add, and run where `-m thorough` asks for them, which CI does in both modes.
"""

import gc
import os
from collections.abc import Callable
from typing import Any

import jax
import pytest

import jaxopt_rules as jr

# XLA makes loops of fused operations in a way that takes twice as long to compile as the one before it, which the
# newest jax no longer has: CI runs the laws and the numbers with both.
FUSION_EMITTERS = "xla_cpu_use_fusion_emitters"
HAS_A_CHOICE = jax.__version_info__ < (0, 11)

# Programs of tests run for milliseconds: to compile them is what they cost. JAX reads it when it first needs a device.
FLAGS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
FLAGS |= {FUSION_EMITTERS: False} if HAS_A_CHOICE else {}
os.environ.setdefault("XLA_FLAGS", " ".join(f"--{flag}={value}".lower() for flag, value in FLAGS.items()))

# What XLA is told where a program is compiled for its values and runs once.
QUICK = FLAGS | {"xla_cpu_parallel_codegen_split_count": 1}

# The laws about sharding need a mesh of more than one device.
jax.config.update("jax_num_cpu_devices", 2)

# The lines of code that a program notes for each operation are for profilers, and take a tenth of the tests' time.
jax.config.update("jax_traceback_in_locations_limit", 0)


def quick_jit(function: Callable, **keywords) -> Callable:
    """`jax.jit` that compiles faster; for values, not for facts about programs or their speed."""
    return jax.jit(function, compiler_options=QUICK, **keywords)


def as_shipped(function: Callable, **keywords) -> Callable:
    """`jax.jit` for facts about programs, such as temporaries and copies, with the loops that users get."""
    return jax.jit(function, compiler_options={FUSION_EMITTERS: True} if HAS_A_CHOICE else None, **keywords)


def _step(rule: jr.Rule, by_pair: bool, params: Any, state: Any, grads: Any, extra: dict[str, Any]) -> tuple[Any, Any]:
    if not by_pair:
        return rule.apply(grads, state, params, **extra)
    updates, state = rule.update(grads, state, params, **extra)
    return jr.apply_updates(params, updates), state


_compiled_step = quick_jit(_step, static_argnums=(0, 1))


def stepped(rule: jr.Rule, params: Any, state: Any, grads: Any, *, by_pair: bool = False, **extra: Any) -> Any:
    """(parameters, state) behind one step, by a program that every test of an equal rule shares."""
    return _compiled_step(rule, by_pair, params, state, grads, extra)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wide = bool(jax.config.read("jax_enable_x64"))
    asked_for = "thorough" in config.getoption("markexpr")

    def runs(item: pytest.Item) -> bool:
        has_the_width = (item.get_closest_marker("x64") is not None) == wide
        return has_the_width and (asked_for or item.get_closest_marker("thorough") is None)

    config.hook.pytest_deselected(items=[item for item in items if not runs(item)])
    items[:] = filter(runs, items)


def pytest_collection_finish() -> None:
    """What was imported stays, and is not looked through for garbage; what is traced is looked through less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)
