"""The benchmarks come to their end with a row for every contender. No test asks for a time."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"

CONTENDERS = {
    "steps": {"ours"},
    "gates": {
        "add: acc + g",
        "ours: accumulate, keep",
        "ours: accumulate, drop",
        "ours: adamw",
        "ours: accumulate, keep, last",
        "ours: accumulate, drop, last",
        "ours: average",
        "ours: lookahead",
        "ours: adamw and the norm",
        "ours: skip_nonfinite",
    },
    "mutating": {
        "jit, identity",
        "jit, bare",
        "jit, bare, donating",
        "ours: update",
        "ours: update, donate=True",
    },
    "compilation": {"ours"},
    "sweep": {
        "ours: experiments.sweep",
        "ours: one program, vmap",
        "ours: one program, run for each",
        "ours: a program for each",
    },
    "memory": {"ours"},
    "growth": {"ours"},
}


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHMARKS, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def measured(x: Any) -> Iterator[float]:
    """All numbers but the facts of programs, of which some are 0."""
    if isinstance(x, int | float):
        yield x
    elif isinstance(x, list):
        for member in x:
            yield from measured(member)
    elif isinstance(x, dict):
        for name, member in x.items():
            if name != "programs":
                yield from measured(member)


@pytest.mark.thorough
@pytest.mark.parametrize("section", CONTENDERS)
def test_a_section_has_a_row_for_every_contender(section, tmp_path):
    done = run(section, "--quick", "--alone", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "results.json").read_text())["sections"][section]
    numbers = list(measured(written["runs"]))
    assert numbers
    assert all(math.isfinite(x) and x > 0 for x in numbers)
    cells = {cell for row in written["tables"][0]["rows"] for cell in row}
    assert cells >= CONTENDERS[section]
    assert not {cell for cell in cells if cell.startswith(("optax", "torch", "flax"))}
    assert all(table["rows"] for table in written["tables"])
    text = (tmp_path / "results.md").read_text()
    assert all(table["title"] in text for table in written["tables"])
    assert (tmp_path / f"{section}.png").stat().st_size


@pytest.mark.thorough
def test_an_unknown_section_is_named():
    done = run("stepz")
    assert done.returncode == 2
    assert "unknown section 'stepz'; choose from steps, gates," in done.stderr
