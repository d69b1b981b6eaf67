"""The command line: `python -m jaxopt_rules compare`."""

import argparse
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
    parser = _Parser(prog=PROGRAM, description="Experiments with the optimizers of jaxopt_rules.", allow_abbrev=False)
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
    return parser


def _compare(args: argparse.Namespace) -> None:
    from jaxopt_rules.experiments import compare

    if (args.data is None) != (args.target is None):
        raise UserError("--data and --target go together: the file, and its column to predict")
    dataset = digits(args.seed) if args.data is None else read_csv(args.data, args.target, args.seed)
    compare.run(dataset, args.optimizers, args.steps, args.seed, args.out)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit code: 0, 2 for what the user can mend, 130 when interrupted."""
    try:
        args = _parser().parse_args(argv)
        args.run(args)
    except UserError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        return _refuse(f'this needs {missing}: pip install "jaxopt_rules[experiments]"')
    except KeyboardInterrupt:
        return 130
    return 0


def _refuse(message: str) -> int:
    # Messages from elsewhere may have several lines.
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    # R² and the names of columns are not worth failing for where output can hold ASCII alone.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
