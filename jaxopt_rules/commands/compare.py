"""`compare`: the documented optimizers, or any rules, side by side."""

import argparse
from pathlib import Path
from typing import Any

from jaxopt_rules.commands import arguments, pictures, problems, rules
from jaxopt_rules.commands.arguments import INTERRUPTED, RULES, add_command
from jaxopt_rules.experiments.data import UserError

DESCRIPTION = f"""\
Train the same model with each of some rules, from the same weights on the same
batches, and several times over: from the weights and on the batches of each
seed. Prints a table, best first, and writes loss.png.

{RULES} It is called what it is
written as, or NAME in NAME=RULE.

Without rules: each of the documented optimizers, with and without the
documented hooks (weight_decay(1e-4), clip_grad(1.0)), from one seed.

{problems.PROBLEMS}
"""

EXAMPLES = (
    "compare",
    "compare --optimizers sgd,adam --steps 300 --out runs/short",
    "compare --data houses.csv --target price",
    'compare "adamw(1e-3)" "lion(1e-4)" "heavy ball=sgd(0.1, momentum=0.9)" --problem wine',
    'compare "adamw(Cosine(3e-3, 300))" "schedule_free_adamw(3e-3)" --steps 300 --seeds 2 --by accuracy',
)

STEPS, SEEDS = 300, 3  # of each rule
DOCUMENTED, DOCUMENTED_STEPS = "sgd,momentum,adam,adamw", 1000


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip().lower() for name in text.split(",")))


def add_to(commands: Any) -> None:
    parser = add_command(
        commands,
        "compare",
        run,
        help="train one model with each of some rules",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    parser.add_argument("rules", metavar="RULE", nargs="*", help="or NAME=RULE; without: the documented optimizers")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("runs/compare"),
        help="where loss.png goes; default: %(default)s",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--steps",
        metavar="N",
        type=arguments.steps,
        help=f"updates with each; default: {STEPS}, of the documented optimizers {DOCUMENTED_STEPS}",
    )
    length.add_argument(
        "--seconds", metavar="S", type=arguments.positive, help="as many updates as each makes in this time"
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=arguments.seed,
        default=0,
        help="of the split, weights and batches; of several seeds the first; default: %(default)s",
    )
    parser.add_argument(
        "--seeds", metavar="N", type=arguments.seeds, help=f"how often each is trained; default: {SEEDS}"
    )
    parser.add_argument(
        "--by", metavar="METRIC", help="what the best is the best by: loss, test_loss, accuracy, R2; default: test_loss"
    )
    parser.add_argument(
        "--optimizers", metavar="NAMES", type=_names, help=f"which documented ones; default: {DOCUMENTED}"
    )
    problems.add_options(parser)


def run(args: argparse.Namespace) -> int:
    return _compare_rules(args) if args.rules else _compare_documented(args)


def _compare_documented(args: argparse.Namespace) -> int:
    from jaxopt_rules.experiments import documented

    for option in ("seconds", "seeds", "by"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option} is for rules: name some, such as 'adamw(1e-3)'")
    table = problems.read_table(args)
    if table is None:
        raise UserError(f"the documented optimizers learn tables; name rules to learn {args.problem}")
    names = args.optimizers or _names(DOCUMENTED)
    documented.run(table, names, args.steps or DOCUMENTED_STEPS, args.seed, args.out)
    return 0


def _compare_rules(args: argparse.Namespace) -> int:
    from jaxopt_rules.experiments.comparison import compare

    if args.optimizers is not None:
        raise UserError("--optimizers chooses from the documented optimizers: give no rules beside it")
    named = {name: written.rule() for name, written in rules.read_named(args.rules).items()}
    pictures.prepare(args.out)
    problem = problems.read_problem(args)
    by, largest = problems.read_metric(args.by or "test_loss", problem)
    for name, rule in named.items():
        rules.check(rule, problem, name)
    steps = None if args.seconds else args.steps or STEPS
    result = compare(
        named,
        problem.loss_fn,
        problem.init,
        problems.batches_of(problem, steps),
        steps,
        seconds=args.seconds,
        seeds=range(args.seed, args.seed + (args.seeds or SEEDS)),
        evaluate=problem.evaluate,
        by=by,
        largest=largest,
    )
    picture = args.out / "loss.png"
    pictures.save(result.plot, picture)
    print(problem)
    print(result)
    print(f"\npicture: {picture}")
    return INTERRUPTED if result.interrupted else 0
