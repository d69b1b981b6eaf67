"""Runs the tests marked `x64` in a process of their own, with 64-bit types enabled from its start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_64_bit_process():
    # The options of PYTEST_ADDOPTS hold for both processes; what pytest tells its workers is not for another pytest.
    environment = {
        name: value for name, value in os.environ.items() if name == "PYTEST_ADDOPTS" or not name.startswith("PYTEST_")
    }
    tests = Path(__file__).parent
    # Those have none, and are skipped as a whole where their libraries are absent.
    others = [f"--ignore-glob={tests}/test_{name}.py" for name in ("interop_*", "optax_*")]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "2", "-m", "x64 and not oracle", *others, str(tests)],
        env=environment | {"JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        pytest.fail(f"{run.stdout[-20_000:]}\n{run.stderr[-2_000:]}", pytrace=False)
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
