"""The command line: `python -m jaxopt_rules compare`, `sweep`, `range-test`, `explain` and `conformance`."""

import io
import os
import sys
from collections.abc import Sequence

from jaxopt_rules.commands import compare, conformance, explain, range_test, sweep
from jaxopt_rules.commands.arguments import INTERRUPTED, PROGRAM, Parser
from jaxopt_rules.experiments.data import UserError

# What the commands may lack, by the names of modules: the package, and the extra that has it.
EXTRAS = {
    "sklearn": ("scikit-learn", "experiments"),
    "pandas": ("pandas", "experiments"),
    "rich": ("rich", "experiments"),
    "matplotlib": ("matplotlib", "experiments"),
    "safetensors": ("safetensors", "checkpoints"),
}

CLOSED_PIPE = 141  # the exit code that shells give to programs whose output is not read to its end


def _parser() -> Parser:
    parser = Parser(
        prog=PROGRAM,
        description="Experiments with the optimizers of jaxopt_rules, and how exact they are.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in (compare, sweep, range_test, explain, conformance):
        command.add_to(commands)
    return parser


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
        package, extra = EXTRAS[missing]
        return _refuse(f'this needs {package}: pip install "jaxopt_rules[{extra}]"')
    except KeyboardInterrupt:
        return INTERRUPTED


def _refuse(message: str) -> int:
    # Messages from elsewhere may have several lines.
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _as_program() -> int:
    # Letters of names and notes are not worth failing for where output can hold ASCII alone.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        code = main()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Who read the output, such as `head`, has enough.
        _drop_output()
        return CLOSED_PIPE
    except OSError as error:  # such as a full disk
        _drop_output()
        return _refuse(str(error))


def _drop_output() -> None:
    # Python would write what is left when it ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(_as_program())
