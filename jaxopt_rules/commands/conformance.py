"""`conformance`: how far the rules are from independent implementations of them."""

import argparse
import contextlib
import io
import sys
from typing import Any

from jaxopt_rules.commands.arguments import add_command
from jaxopt_rules.experiments.data import UserError

# Modules are not called as what is installed: `adopt` is of `torch-adopt`, and another package bears its name.
_GROUPS = "see the dependency groups oracles and oracles-no-deps in pyproject.toml"

DESCRIPTION = """\
Run every rule against every independent implementation of it that is
installed, in float64, from the same start on the same gradients. Prints a line
for each pair: rule, implementation, convention, steps, and the largest relative
difference of the paths that the parameters took. Exit code 1 if one is larger
than the bound stated for it.
"""

EXAMPLES = ("conformance", "conformance --rule adam --oracle torch")


def add_to(commands: Any) -> None:
    parser = add_command(
        commands,
        "conformance",
        run,
        help="run every rule against independent implementations",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    parser.add_argument("--rule", metavar="NAME", help="only the pairs whose name begins so")
    parser.add_argument("--oracle", metavar="NAME", help="only implementations whose name begins so, such as torch")


def run(args: argparse.Namespace) -> int:
    import jax

    jax.config.update("jax_enable_x64", True)
    from jaxopt_rules.conformance import PAIRS, run

    meant = [p for p in PAIRS if p.name.startswith(args.rule or "") and p.oracle.startswith(args.oracle or "")]
    if not meant:
        raise UserError(f"there is no pair of rule {args.rule or '*'} and oracle {args.oracle or '*'}")
    installed = [pair for pair in meant if pair.installed]
    missing = sorted({pair.package for pair in meant} - {pair.package for pair in installed})
    if not installed:
        raise UserError(f"nothing to compare with is installed of {', '.join(missing)}; {_GROUPS}")
    widths = [max(len(getattr(pair, column)) for pair in installed) for column in ("name", "oracle", "convention")]
    failed = 0
    for pair in installed:
        with contextlib.redirect_stdout(io.StringIO()):  # some implementations speak when they are made
            outcome = run(pair)
        failed += not outcome.passed
        names = (pair.name, pair.oracle, pair.convention)
        row = [f"{text:<{width}}" for text, width in zip(names, widths, strict=True)]
        verdict = "" if outcome.passed else f"  exceeds {pair.bound:.1e}"
        print(*row, f"{pair.problem.steps:>4}", f"{outcome.difference:.1e}{verdict}", sep="  ", flush=True)
    if missing:
        print(f"not installed: {', '.join(missing)}; {_GROUPS}", file=sys.stderr)
    return 1 if failed else 0
