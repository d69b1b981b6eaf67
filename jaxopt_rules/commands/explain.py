"""`explain`: what a rule does with each parameter, and the memory that it takes."""

import argparse
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_rules.commands import problems, rules
from jaxopt_rules.commands.arguments import RULES, add_command
from jaxopt_rules.experiments.data import UserError
from jaxopt_rules.explain import explain
from jaxopt_rules.state import memory

DESCRIPTION = f"""\
Show what a rule does with each parameter of a model (its group, what decays,
what its rate is multiplied by, the slots that are kept for it), and the memory
that its state takes. Parameters are those of a problem or of a file, of which
the head alone is read: nothing is allocated or trained.

{RULES}

Names of arrays in a file become paths: blocks.0.w is blocks/0/w.

{problems.PROBLEMS}
"""

EXAMPLES = (
    "explain \"adamw(3e-4, weight_decay=0.1, where=excluding('**/b'))\"",
    "explain \"partition({'muon': muon(0.02), 'rest': adamw(3e-4)}, by={'muon': 'blocks/**/w'})\" --problem source",
    'explain "chain(clip_by_global_norm(1.0), adafactor(1e-2))" --params weights.npz',
)


def add_to(commands: Any) -> None:
    parser = add_command(
        commands,
        "explain",
        run,
        help="show what a rule does with each parameter, and its memory",
        description=DESCRIPTION,
        examples=EXAMPLES,
    )
    parser.add_argument("rule", metavar="RULE")
    parser.add_argument(
        "--params", metavar="FILE", type=Path, help="parameters in a file of safetensors or numpy.savez (.npz)"
    )
    problems.add_options(parser)
    parser.set_defaults(seed=0)


def run(args: argparse.Namespace) -> int:
    rule = rules.read(args.rule).rule()
    if args.params is None:
        problem = problems.read_problem(args)
        params = jax.eval_shape(problem.init, jax.random.key(0))
    elif args.problem or args.data:
        raise UserError("--params takes the place of --problem and --data: give one of them")
    else:
        params = _shapes(args.params)
    try:
        share, needed = explain(rule, params), memory(jax.eval_shape(rule.init, params))
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    print(rule, share, needed, sep="\n\n")
    return 0


def _shapes(path: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of the arrays in a file, by their paths."""
    readers = {".safetensors": _of_safetensors, ".npz": _of_npz}
    if path.suffix not in readers:
        raise UserError(f"--params takes a file {' or '.join(f'*{suffix}' for suffix in readers)}, not {path}")
    try:
        shapes = readers[path.suffix](path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    named = {name.replace(".", "/"): shape for name, shape in sorted(shapes.items())}
    if len(named) < len(shapes):
        raise UserError(f"{path} has names that differ in . and / alone: they would be one path")
    return named


def _of_npz(path: Path) -> dict[str, jax.ShapeDtypeStruct]:
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as file:
                    shape, _, dtype = read_header[np.lib.format.read_magic(file)](file)
                found[name.removesuffix(".npy")] = jax.ShapeDtypeStruct(shape, dtype)
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no file of arrays that numpy.savez wrote: {error}") from error
    return found


# The names of dtypes in the format.
_DTYPES = {
    "F64": jnp.float64,
    "F32": jnp.float32,
    "F16": jnp.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "F8_E8M0": jnp.float8_e8m0fnu,
    "C64": jnp.complex64,
    "I64": jnp.int64,
    "I32": jnp.int32,
    "I16": jnp.int16,
    "I8": jnp.int8,
    "U64": jnp.uint64,
    "U32": jnp.uint32,
    "U16": jnp.uint16,
    "U8": jnp.uint8,
    "BOOL": jnp.bool_,
}


def _of_safetensors(path: Path) -> dict[str, jax.ShapeDtypeStruct]:
    from safetensors import SafetensorError, safe_open

    found = {}
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118  (it is no dict)
                part = file.get_slice(name)
                if part.get_dtype() not in _DTYPES:
                    raise UserError(f"{path}: jax has no dtype for {name!r}, which is {part.get_dtype()}")
                found[name] = jax.ShapeDtypeStruct(tuple(part.get_shape()), _DTYPES[part.get_dtype()])
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file, or only a part of one: {error}") from error
    return found
