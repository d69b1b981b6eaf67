"""Two modes: 32-bit, the default, and 64-bit, which needs a process of its own (see test_x64.py).

Tests marked `x64` run in the second alone, all others in the first alone.
"""

import jax
import pytest

# The laws about sharding need a mesh of more than one device.
jax.config.update("jax_num_cpu_devices", 2)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wide = bool(jax.config.read("jax_enable_x64"))
    chosen = [item for item in items if (item.get_closest_marker("x64") is not None) == wide]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen
