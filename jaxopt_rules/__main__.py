"""The command line: `python -m jaxopt_rules compare` and `python -m jaxopt_rules conformance`."""

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from jaxopt_rules.experiments.data import MAX_CATEGORIES, MAX_NUMERIC_CLASSES, UserError, digits, read_csv

PROGRAM = "python -m jaxopt_rules"

EXTRAS = {"sklearn", "pandas", "rich", "matplotlib"}

COMPARE = f"""\
Train a small MLP with each of the documented optimizers, with and without the
documented hooks (weight_decay(1e-4), clip_grad(1.0)), from the same weights on
the same batches. Prints a table and writes loss.png.

Data is scikit-learn's digits, or a CSV file with a header. Its target is a
class where it is text, or whole numbers of at most {MAX_NUMERIC_CLASSES} different values; any
other numeric target is a quantity: regression, with R² in place of accuracy.
Numeric columns are standardized, text becomes one column for each text. Empty
columns and identifiers (a text of its own in every row, or more than {MAX_CATEGORIES} texts)
are left out, then rows with missing values are dropped.
"""

# Modules are not called as what is installed: `adopt` is of `torch-adopt`, and another package bears its name.
_GROUPS = "see the dependency groups oracles and oracles-no-deps in pyproject.toml"

CONFORMANCE = """\
Run every rule against every independent implementation of it that is
installed, in float64, from the same start on the same gradients. Prints a line
for each pair: rule, implementation, convention, steps, and the largest relative
difference of the paths that the parameters took. Exit code 1 if one is larger
than the bound stated for it.
"""

EXAMPLES = f"""\
examples:
  {PROGRAM} compare
  {PROGRAM} compare --optimizers sgd,adam --steps 300 --out runs/short
  {PROGRAM} compare --data houses.csv --target price
"""


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line, through `main`."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _integer(text: str, least: int, most: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"must be an integer from {least} to {most}, not {text!r}")
    return value


def _steps(text: str) -> int:
    return _integer(text, 1, 10**7)


def _seed(text: str) -> int:
    return _integer(text, 0, 2**31 - 1)


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip().lower() for name in text.split(",")))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Experiments with the optimizers of jaxopt_rules, and how exact they are.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    compare = commands.add_parser(
        "compare",
        help="train one model with each documented optimizer",
        description=COMPARE,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    names = "sgd,momentum,adam,adamw"
    compare.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("runs/compare"),
        help="where loss.png goes; default: %(default)s",
    )
    compare.add_argument(
        "--optimizers", metavar="NAMES", type=_names, default=names, help="separated by commas; default: %(default)s"
    )
    compare.add_argument(
        "--steps", metavar="N", type=_steps, default=1000, help="updates with each; default: %(default)s"
    )
    compare.add_argument(
        "--seed", metavar="N", type=_seed, default=0, help="of the split, weights and batches; default: %(default)s"
    )
    compare.add_argument("--data", metavar="FILE", help="a CSV file; default: digits")
    compare.add_argument("--target", metavar="COLUMN", help="the column of FILE to predict")
    compare.set_defaults(run=_compare)
    conformance = commands.add_parser(
        "conformance",
        help="run every rule against independent implementations",
        description=CONFORMANCE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    conformance.add_argument("--rule", metavar="NAME", help="only the pairs whose name begins so")
    conformance.add_argument(
        "--oracle", metavar="NAME", help="only implementations whose name begins so, such as torch"
    )
    conformance.set_defaults(run=_conformance)
    return parser


def _conformance(args: argparse.Namespace) -> int:
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


def _compare(args: argparse.Namespace) -> int:
    from jaxopt_rules.experiments import documented

    if (args.data is None) != (args.target is None):
        raise UserError("--data and --target go together: the file, and its column to predict")
    dataset = digits(args.seed) if args.data is None else read_csv(args.data, args.target, args.seed)
    documented.run(dataset, args.optimizers, args.steps, args.seed, args.out)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns the exit code: 0; 1 if a pair exceeds its bound; 2 for what the user can mend; 130 when interrupted.
    """
    try:
        args = _parser().parse_args(argv)
        return args.run(args)
    except UserError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        return _refuse(f'this needs {missing}: pip install "jaxopt_rules[experiments]"')
    except KeyboardInterrupt:
        return 130


def _refuse(message: str) -> int:
    # Messages from elsewhere may have several lines.
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    # R² and the names of columns are not worth failing for where output can hold ASCII alone.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
