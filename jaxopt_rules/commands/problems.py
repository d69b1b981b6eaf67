"""The options that say what is learnt: `--problem`, or `--data` and `--target`."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jaxopt_rules.commands import arguments
from jaxopt_rules.experiments.data import DATASETS, MAX_CATEGORIES, MAX_NUMERIC_CLASSES, Dataset, UserError, read_csv

if TYPE_CHECKING:
    from jaxopt_rules.experiments.problems import Problem

TABLES = {name.replace("_", "-"): load for name, load in DATASETS.items()}
TEXT = "source"
BATCHES = 10_000  # of a seed, at most
NAMES = ", ".join([*TABLES, TEXT])

CSV = f"""\
A CSV file has a header. Its target is a class where it is text, or whole
numbers of at most {MAX_NUMERIC_CLASSES} different values; any other numeric target is a
quantity: regression, with R2 in place of accuracy. Numeric columns are
standardized, text becomes one column for each text. Empty columns and
identifiers (a text of its own in every row, or more than {MAX_CATEGORIES} texts) are left
out, then rows with missing values are dropped."""

PROBLEMS = f"""\
The problem is a table of scikit-learn's (digits, wine, breast-cancer, diabetes)
or a CSV file, by an MLP of 64 hidden units, or the next character of Python's
own source, by a small transformer.

{CSV}"""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--problem", metavar="NAME", help=f"what to learn: {NAMES}; default: digits")
    parser.add_argument("--data", metavar="FILE", help="a CSV file, in place of --problem")
    parser.add_argument("--target", metavar="COLUMN", help="the column of FILE to predict")


def read_table(args: argparse.Namespace) -> Dataset | None:
    """The table that the options name; `None`: it is no table. Prints what was left out of a file."""
    if (args.data is None) != (args.target is None):
        raise UserError("--data and --target go together: the file, and its column to predict")
    if args.data is not None:
        if args.problem is not None:
            raise UserError("--data takes the place of --problem: give one of them")
        table = read_csv(args.data, args.target, args.seed)
        for note in table.notes:
            print(f"{table.name}: {note}")
        return table
    name = (args.problem or "digits").replace("_", "-")
    if name not in (*TABLES, TEXT):
        raise UserError(f"unknown problem {args.problem!r}; choose from {NAMES}")
    return None if name == TEXT else TABLES[name](args.seed)


def read_problem(args: argparse.Namespace) -> "Problem":
    """The problem that the options name."""
    from jaxopt_rules.experiments.problems import source_transformer, table_mlp

    table = read_table(args)
    return source_transformer(seed=args.seed) if table is None else table_mlp(table)


def batches_of(problem: "Problem", steps: int | None = None) -> Callable[[int], Any]:
    """The batches of each seed, for so many steps; `None`: as many as there may be."""
    # All are in memory. Where there are more steps than that, they come again.
    count = BATCHES if steps is None else min(steps, BATCHES)
    return lambda seed: problem.batches(seed, count)


def add_training_options(parser: argparse.ArgumentParser, *, seeds: int, steps: int, least_steps: int = 1) -> None:
    """Those of what trains rules on a problem."""
    add_options(parser)
    parser.add_argument(
        "--steps",
        metavar="N",
        type=arguments.integer(least_steps, arguments.MOST_STEPS),
        default=steps,
        help="updates of each; default: %(default)s",
    )
    parser.add_argument(
        "--seeds",
        metavar="N",
        type=arguments.seeds,
        default=seeds,
        help="how often each is trained, from weights of its own on batches of its own; default: %(default)s",
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=arguments.seed,
        default=0,
        help="the first of the seeds, and that of the split into training and test rows; default: %(default)s",
    )


def metrics(problem: "Problem") -> list[str]:
    """The names of what the problem measures at the end, and of the loss of the last steps."""
    import jax

    return ["loss", *jax.eval_shape(problem.evaluate, jax.eval_shape(problem.init, jax.random.key(0)))]


def read_metric(by: str, problem: "Problem") -> tuple[str, bool]:
    """The metric that `--by` names, and whether the largest is the best."""
    if by not in (known := metrics(problem)):
        raise UserError(f"unknown metric {by!r}; {problem.name} has {', '.join(known)}")
    return by, not by.endswith("loss")
