"""Two modes: 32-bit, the default, and 64-bit, which needs a process of its own (see test_x64.py).

Tests marked `x64` run in the second alone, all others in the first alone. Those marked `thorough` take long for what
they add, and run where `-m thorough` asks for them, which CI does in both modes.
"""

import os
from collections.abc import Callable
from functools import cache
from typing import Any

# Programs of tests run for milliseconds: to compile them is what they cost. It concerns machine code alone, and so
# neither temporaries nor copies. JAX reads it when it first needs a device.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

import jax
import pytest

import jaxopt_rules as jr

# The laws about sharding need a mesh of more than one device.
jax.config.update("jax_num_cpu_devices", 2)


# What XLA is told where a program is compiled for its values and runs once: to compile it is what it costs.
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,  # not known to jax 0.12
    "xla_cpu_parallel_codegen_split_count": 1,
}


@cache
def quick_options() -> dict[str, int | bool]:
    """Those that this version of XLA knows."""

    def known(option: str) -> bool:
        try:
            jax.jit(lambda: 0, compiler_options={option: QUICK[option]})()
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" in str(error):
                return False
            raise
        return True

    return {option: QUICK[option] for option in QUICK if known(option)}


def quick_jit(function: Callable, **keywords) -> Callable:
    """`jax.jit` that compiles several times as fast; for values, not for facts about programs or their speed."""
    return jax.jit(function, compiler_options=quick_options(), **keywords)


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
    chosen = [
        item
        for item in items
        if (item.get_closest_marker("x64") is not None) == wide
        and (asked_for or item.get_closest_marker("thorough") is None)
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen
