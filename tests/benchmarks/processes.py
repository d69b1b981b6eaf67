"""Fresh processes: each job of a section runs in several, one at a time, and hands its numbers back as JSON."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

Runs = dict[str, list[Any]]  # job -> what each of its processes found


@dataclass(frozen=True)
class Settings:
    """What a run was asked for."""

    rounds: int = 10
    processes: int = 3
    quick: bool = False  # tiny sizes: whether it works, not how fast it is
    full: bool = False  # sizes that take minutes to compile, too
    alone: bool = False  # without other libraries

    def peer(self, name: str) -> Any:
        """Another library, or `None` where it is not installed or not asked for."""
        return importlib.import_module(name) if self.has(name) else None

    def has(self, name: str) -> bool:
        return not self.alone and importlib.util.find_spec(name) is not None

    @property
    def bandwidth_megabytes(self) -> int:
        return 16 if self.quick else 256


@dataclass(frozen=True)
class Job:
    """What one process does: a name that the section's `work` understands, and what XLA is told besides."""

    name: str
    xla_flags: str = ""
    once: bool = False  # facts that are the same in every process


class Disturbance:
    """How much of the processors others have had meanwhile: what noise to expect in the numbers."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), _everyone(), _ours()

    def share(self) -> float | None:
        """From 0 to 1; `None` where the system does not tell."""
        start, everyone, ours = self._start
        now = _everyone()
        if everyone is None or now is None:
            return None
        others = (now - everyone) - (_ours() - ours)
        return max(0.0, others / ((time.perf_counter() - start) * (os.cpu_count() or 1)))


def _everyone() -> float | None:
    """Processor seconds of all processes, and of those outside that have taken a virtual processor away."""
    try:
        user, nice, system, _, _, interrupts, soft, steal = Path("/proc/stat").read_text().split()[1:9]
    except OSError:
        return None
    return sum(map(int, (user, nice, system, interrupts, soft, steal))) / os.sysconf("SC_CLK_TCK")


def _ours() -> float:
    """Processor seconds of this process, and of those that it has started and that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Failed(Exception):
    """A process has not come to its end."""


def run(section: str, jobs: Sequence[Job], settings: Settings, started: Callable[[str], object]) -> Runs:
    """All processes of a section. Jobs take turns, so that a disturbance of the machine meets more than one of them."""
    runs: Runs = {job.name: [] for job in jobs}
    for number in range(settings.processes):
        for job in jobs:
            if number == 0 or not job.once:
                started(f"{section}: {job.name}, process {number + 1}")
                runs[job.name].append(_in_fresh_process(section, job, settings))
    return runs


def _in_fresh_process(section: str, job: Job, settings: Settings) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        request = {"section": section, "job": job.name, "settings": asdict(settings), "found": str(found)}
        done = subprocess.run(
            [sys.executable, str(Path(__file__).parent), "--worker", json.dumps(request)],
            env={**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {job.xla_flags}".strip()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise Failed(f"{section}, {job.name}: exit code {done.returncode}\n{done.stdout[-4000:]}")
        return json.loads(found.read_text())


def work(text: str) -> None:
    """The other side: does what a request says, in this process."""
    request = json.loads(text)
    module: ModuleType = importlib.import_module(request["section"])
    found = module.work(request["job"], Settings(**request["settings"]))
    Path(request["found"]).write_text(json.dumps(found))
