"""What the commands' options have in common."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jaxopt_rules.experiments.data import UserError

PROGRAM = "python -m jaxopt_rules"
INTERRUPTED = 130  # the exit code after Ctrl-C
MOST_STEPS = 10**7

RULES = """\
RULE is written as in Python, with the public names of jaxopt_rules (and jnp, re
and inf), in quotes that keep it from the shell."""


class Parser(argparse.ArgumentParser):
    """Reports an error as a `UserError`, in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    help: str,
    description: str,
    examples: Sequence[str] = (),
) -> Parser:
    """A parser for the command. `run` gives the exit code."""
    shown = "\n".join(f"  {PROGRAM} {example}" for example in examples)
    parser = commands.add_parser(
        name,
        help=help,
        description=description,
        epilog=f"examples:\n{shown}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def integer(least: int, most: int) -> Callable[[str], int]:
    """The type of an option that is an integer."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be an integer from {least} to {most}, not {text!r}")
        return value

    return read


def positive(text: str) -> float:
    """The type of an option that is a positive number."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, not {text!r}")
    return value


steps = integer(1, MOST_STEPS)
seed = integer(0, 2**31 - 1)
seeds = integer(1, 1000)
