"""`range-test`: which learning rates a rule can take."""

import argparse
from pathlib import Path
from typing import Any

from jaxopt_rules.commands import pictures, problems, rules
from jaxopt_rules.commands.arguments import INTERRUPTED, RULES, add_command, positive
from jaxopt_rules.experiments.data import UserError
from jaxopt_rules.schedules import Exponential

RATE = "learning_rate"

DESCRIPTION = f"""\
Train a rule once while its learning rate grows from step to step, and see where
the loss falls fastest and where it begins to rise. Prints the rate that this
suggests and writes range_test.png.

{RULES} The name learning_rate in it
stands for the rate, a schedule; a constructor alone takes it as an argument.

{problems.PROBLEMS}
"""

EXAMPLES = (
    "range-test adamw",
    'range-test "chain(clip_by_global_norm(1.0), sgd(learning_rate, momentum=0.9))" --high 100',
    "range-test lion --problem breast-cancer --steps 200 --seeds 3",
)


def add_to(commands: Any) -> None:
    parser = add_command(
        commands,
        "range-test",
        run,
        help="train once while the learning rate grows, and see which it can take",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    parser.add_argument("rule", metavar="RULE", help="in which learning_rate stands for the rate")
    parser.add_argument(
        "--low", metavar="RATE", type=positive, default=1e-7, help="the first rate; default: %(default)s"
    )
    parser.add_argument(
        "--high", metavar="RATE", type=positive, default=10.0, help="the last rate; default: %(default)s"
    )
    problems.add_training_options(parser, seeds=1, steps=100, least_steps=3)
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("runs/range_test"),
        help="where range_test.png goes; default: %(default)s",
    )


def run(args: argparse.Namespace) -> int:
    from jaxopt_rules.experiments.range_test import learning_rate_range_test

    if args.low >= args.high:
        raise UserError(f"--low {args.low:g} must be below --high {args.high:g}")
    written = rules.read(args.rule, [RATE])
    rule = written.rule(learning_rate=Exponential(args.low, 1, 2.0))
    pictures.prepare(args.out)
    problem = problems.read_problem(args)
    rules.check(rule, problem, args.rule)
    result = learning_rate_range_test(
        lambda rate: written(learning_rate=rate),
        problem.loss_fn,
        problem.init,
        problems.batches_of(problem, args.steps + 1),
        args.steps,
        low=args.low,
        high=args.high,
        seeds=range(args.seed, args.seed + args.seeds),
    )
    picture = args.out / "range_test.png"
    pictures.save(result.plot, picture)
    print(problem)
    print(result)
    print(f"\npicture: {picture}")
    return INTERRUPTED if result.interrupted else 0
