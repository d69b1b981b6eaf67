"""`sweep`: every point of a grid of hyperparameters."""

import argparse
import csv
from itertools import product
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxopt_rules.commands import pictures, problems, rules
from jaxopt_rules.commands.arguments import INTERRUPTED, RULES, add_command
from jaxopt_rules.experiments.data import UserError

if TYPE_CHECKING:
    from jaxopt_rules.tables import Table

SHOWN = 20  # rows of the table

DESCRIPTION = f"""\
Train a rule at every point of a grid of hyperparameters, all of them in one
compiled program wherever only numbers differ. Prints a table, best first, and
the best rule, and writes sweep.png and sweep.csv.

{RULES} Names in it that --over gives
stand for their values; a constructor alone takes them as arguments.

VALUES are low:high:number, which is geometric, lin:low:high:number, of equal
distances, or a list as in Python: numbers, true and false, None, texts, rules.

{problems.PROBLEMS}
"""

EXAMPLES = (
    "sweep adamw --over learning_rate=1e-4:1:9",
    'sweep "sgd(rate, momentum=beta)" --over rate=1e-3:1:4 --over beta=0.5,0.9 --by accuracy',
    'sweep "chain(clip_by_global_norm(c), lion(1e-3))" --over c=lin:0.5:2:4 --problem wine --seeds 3',
    'sweep "adam(s)" --over "s=Cosine(1e-2, 300),Linear(1e-2, 300)" --data houses.csv --target price',
)


def add_to(commands: Any) -> None:
    parser = add_command(
        commands,
        "sweep",
        run,
        help="train a rule at every point of a grid of hyperparameters",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    parser.add_argument("rule", metavar="RULE", help="in which names stand for values")
    parser.add_argument(
        "--over",
        metavar="NAME=VALUES",
        type=rules.read_axis,
        action="append",
        required=True,
        help="the values of a name; once for each name",
    )
    problems.add_training_options(parser, seeds=1, steps=300)
    parser.add_argument(
        "--by",
        metavar="METRIC",
        default="test_loss",
        help="what the best is the best by: loss (the mean of the last tenth of the steps), test_loss, accuracy or R2; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("runs/sweep"),
        help="where sweep.png and sweep.csv go; default: %(default)s",
    )


def run(args: argparse.Namespace) -> int:
    from jaxopt_rules.experiments.sweeps import sweep

    names = [axis.name for axis in args.over]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--over gives {twice[0]} twice; give all of its values at once")
    written = rules.read(args.rule, names)
    grid = {axis.name: axis.values for axis in args.over}
    kinds = _kinds(written, grid)
    pictures.prepare(args.out)
    problem = problems.read_problem(args)
    by, largest = problems.read_metric(args.by, problem)
    for rule in kinds:
        rules.check(rule, problem, args.rule)
    result = sweep(
        written,
        grid,
        problem.loss_fn,
        problem.init,
        problems.batches_of(problem, args.steps),
        args.steps,
        seeds=range(args.seed, args.seed + args.seeds),
        evaluate=problem.evaluate,
        by=by,
        largest=largest,
    )
    rows, picture = args.out / "sweep.csv", args.out / "sweep.png"
    # Before anything is printed, to a reader who may not wait for the end.
    _write(result.table, rows)
    pictures.save(result.plot, picture)
    print(problem)
    lines = repr(result).splitlines()
    above = len(lines) - len(result.points)  # a sentence and the head of the table
    print(*lines[: above + SHOWN], sep="\n")
    if len(result.points) > SHOWN:
        print(f"and {len(result.points) - SHOWN} more in {rows}")
    print()
    try:
        print(f"best: {written.filled(_texts(args.over, result.best))}")
    except ValueError as error:  # all diverged, or none is finished
        print(error)
    print(f"all points: {rows}")
    print(f"picture: {picture}")
    return 0 if result.finished.all() else INTERRUPTED


def _kinds(written: rules.Written, grid: dict[str, Any]) -> list[rules.Rule]:
    """Refuses values that no rule can be made with. Gives one rule for all points that differ in numbers alone."""
    kinds = {}
    for point in product(*grid.values()):
        rule = written.rule(**dict(zip(grid, point, strict=True)))
        kinds[tuple(None if isinstance(x, Real) and not isinstance(x, bool) else repr(x) for x in point)] = rule
    return list(kinds.values())


def _texts(axes: list[rules.Axis], point: dict[str, Any]) -> dict[str, str]:
    """What stands for the values of a point."""
    # Not by equality, which takes 1 for True.
    return {axis.name: axis.texts[[*map(repr, axis.values)].index(repr(point[axis.name]))] for axis in axes}


def _write(table: "Table", path: Path) -> None:
    from jaxopt_rules.experiments.output import replaced

    with replaced(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([table.columns, *table.cells])
