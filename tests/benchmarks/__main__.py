"""Measures this library beside Optax, PyTorch and Flax: `python tests/benchmarks`.

Peers that are not installed are left out; `pip install -e . --group benchmarks` installs all that is needed.
"""

import argparse
import importlib
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from processes import Disturbance, Failed, Job, Settings, run, work
from report import WIDTH, save
from rich.console import Console

SECTIONS = ("steps", "gates", "mutating", "compilation", "sweep", "memory", "growth")
PACKAGES = ("jax", "jaxlib", "numpy", "optax", "flax", "torch")

EPILOG = """\
Every job runs in several fresh processes, one at a time, and in each the
contenders take turns. Best is that of all calls in all processes; a ratio of
medians is taken within each process, and of these ratios the median. Leave the
machine alone meanwhile: each section says how much of it others had, and "its range" is that
of the ratios in the processes.
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python tests/benchmarks",
        description="Measure our optimizers beside those of Optax, PyTorch and Flax.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    defaults = Settings()
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--rounds", type=positive, default=defaults.rounds, help="turns of each; default: %(default)s")
    parser.add_argument(
        "--processes", type=positive, default=defaults.processes, help="of each job; default: %(default)s"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmarks"), help="where all is written; default: %(default)s"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one process, two rounds: whether all works")
    parser.add_argument("--full", action="store_true", help="up to 4096 leaves, which take minutes to compile")
    parser.add_argument("--alone", action="store_true", help="without other libraries")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker is not None:
        work(args.worker)
        return 0
    if unknown := [name for name in args.sections if name not in SECTIONS]:
        parser.error(f"unknown section {unknown[0]!r}; choose from {', '.join(SECTIONS)}")
    settings = Settings(
        rounds=2 if args.quick else args.rounds,
        processes=1 if args.quick else args.processes,
        quick=args.quick,
        full=args.full,
        alone=args.alone,
    )
    return measure_all(list(dict.fromkeys(args.sections)) or list(SECTIONS), settings, args.out)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer from 1, not {text!r}")
    return int(text)


def measure_all(names: list[str], settings: Settings, out: Path) -> int:
    """Runs the sections, and writes what each has found as soon as it has."""
    out.mkdir(parents=True, exist_ok=True)
    console, progress = Console(), Console(stderr=True)
    console.width = max(console.width, WIDTH)
    written = {"machine": machine(), "settings": asdict(settings), "sections": {}}
    text = ["# Benchmarks", "", *(f"- {name}: {value}" for name, value in written["machine"].items())]
    for name in names:
        section = importlib.import_module(name)
        missing = [peer for peer in section.PEERS if not settings.has(peer)]
        start, disturbance = time.perf_counter(), Disturbance()
        jobs: list[Job] = section.jobs(settings)
        try:
            runs = run(name, jobs, settings, lambda line: progress.print(line, style="dim", highlight=False))
        except Failed as failure:
            progress.print(str(failure), markup=False, highlight=False)
            return 1
        others = disturbance.share()
        report = section.report(runs, settings)
        remarks = [f"{name} took {time.perf_counter() - start:.0f} s"]
        if others is not None:
            remarks.append(f"other processes had {100 * others:.0f}% of the processors")
        if missing and not settings.alone:
            remarks.append(f"not installed, left out: {', '.join(missing)}")
        for table in report.tables:
            console.print(table.rich())
        console.print("; ".join(remarks), markup=False, highlight=False)
        console.print()
        text += ["", f"## {name.capitalize()}", *(f"\n{table.markdown()}" for table in report.tables)]
        text += ["", "; ".join(remarks) + "."]
        tables = [{"title": table.title, "columns": table.columns, "rows": table.rows} for table in report.tables]
        written["sections"][name] = {"others": others, "runs": runs, "tables": tables}
        (out / "results.json").write_text(json.dumps(written, indent=1) + "\n")
        (out / "results.md").write_text("\n".join(text) + "\n")
        for file, figure in report.figures.items():
            save(figure, out / file)
    console.print(f"written to {out}", markup=False, highlight=False, soft_wrap=True)
    return 0


def machine() -> dict[str, Any]:
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
