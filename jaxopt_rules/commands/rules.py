"""Rules as they are written on a command line, and the values that `--over` gives to names in them."""

import argparse
import ast
import copy
import difflib
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import CodeType
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxopt_rules
from jaxopt_rules.experiments.data import UserError
from jaxopt_rules.rule import Rule, is_constructor, is_pair

if TYPE_CHECKING:
    from jaxopt_rules.experiments.problems import Problem

PUBLIC = {name: x for name, x in vars(jaxopt_rules).items() if not name.startswith("_") and not inspect.ismodule(x)}
# What the texts of rules contain besides: regular expressions, infinite bounds, and the body of a function.
NAMES = PUBLIC | {"inf": math.inf, "nan": math.nan, "jnp": jnp, "re": re}

MOST = 1000  # values between two ends


@dataclass(frozen=True)
class Written:
    """The text of a rule, in which some names may stand for values that come later: `written(learning_rate=0.1)`."""

    text: str
    tree: ast.Expression

    @cached_property
    def _code(self) -> CodeType:
        return compile(self.tree, self.text, "eval")

    def __call__(self, **values: Any) -> Any:
        return _evaluate(self._code, values)

    def rule(self, **values: Any) -> Rule:
        """The rule with these values.

        Raises:
          UserError: it cannot be made, with the sentence of its constructor; or the text is of something else.
        """
        try:
            made = self(**values)
        except Exception as error:
            raise UserError(_of(self.text, error)) from error
        if not is_pair(made):
            hint = f"; it makes rules when it is called: {_call(made)}" if is_constructor(made) else ""
            kind = "a function" if inspect.isfunction(made) else f"of type {type(made).__name__}"
            raise UserError(f"{self.text} is no rule but {kind}{hint}")
        return made if isinstance(made, Rule) else Rule(made.init, made.update)

    def filled(self, texts: Mapping[str, str]) -> str:
        """The text with others in place of the arguments."""
        return ast.unparse(_Replaced(texts).visit(copy.deepcopy(self.tree)))


class _Replaced(ast.NodeTransformer):
    """Puts expressions in the place of names."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.parse(self._texts[node.id], mode="eval").body if node.id in self._texts else node


def read(text: str, arguments: Sequence[str] = ()) -> Written:
    """A rule from its text; `arguments` are names in it that stand for values.

    A constructor that is not called, `adamw`, takes the arguments by their names.

    Raises:
      UserError: the text is no expression, has an unknown name, or lacks one of the arguments.
    """
    text = text.strip()
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        raise UserError(f"cannot read the rule {text!r}: {reason}") from error
    if arguments and isinstance(tree.body, ast.Name) and is_constructor(NAMES.get(tree.body.id)):
        tree = ast.parse(f"{text}({', '.join(f'{name}={name}' for name in arguments)})", mode="eval")
    names = _free_names(tree)
    for name in names:
        if name not in NAMES and name not in arguments:
            raise UserError(f"{text}: {_unknown(name, arguments)}")
    if unused := [name for name in arguments if name not in names]:
        raise UserError(f"{unused[0]} is not in the rule {text!r}; write it where its values are to stand")
    return Written(text, tree)


def _evaluate(code: CodeType, values: Mapping[str, Any]) -> Any:
    # Who types a command runs code of his own, here as with `python -c`. That there are no builtins keeps a mistake
    # from doing something else than failing; it is no wall against anybody.
    return eval(code, {**NAMES, **values, "__builtins__": {}})


def _free_names(tree: ast.AST) -> list[str]:
    """The names in an expression that are bound outside of it."""
    bound = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    bound |= {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    return [node.id for node in names if node.id not in bound]


def _unknown(name: str, arguments: Sequence[str] = ()) -> str:
    if close := difflib.get_close_matches(name, (*PUBLIC, *arguments), n=5, cutoff=0.7):
        *others, last = close
        return f"unknown name {name!r}; did you mean {' or '.join(filter(None, [', '.join(others), last]))}?"
    return f"unknown name {name!r}; there are {' and '.join(['the public names of jaxopt_rules', *arguments])}"


def _call(function: Any) -> str:
    return f"{function.__name__}({', '.join(inspect.signature(function).parameters)})"


def _sentence(error: Exception) -> str:
    # Errors of constructors are whole sentences.
    ours = isinstance(error, TypeError | ValueError)
    return str(error) if ours else f"{type(error).__name__}: {error}"


def _of(text: str, error: Exception) -> str:
    # Errors of constructors begin with their names, which may be all of the text.
    return f"{text}: {_sentence(error).removeprefix(f'{text}: ')}"


def check(rule: Rule, problem: "Problem", text: str) -> None:
    """Refuses a rule, written as `text`, that cannot train a problem's parameters, before anything is compiled.

    Raises:
      UserError: says why.
    """
    params = jax.eval_shape(problem.init, jax.random.key(0))
    batch = jax.tree.map(lambda x: x[0], problem.batches(0, 1))

    def loss_of(params: Any) -> Any:
        return problem.loss_fn(params, batch)

    def step(params: Any, loss: Any) -> Any:
        return rule.apply(params, rule.init(params), params, value=loss, grad=params, value_fn=loss_of)

    try:
        jax.eval_shape(step, params, jax.ShapeDtypeStruct((), jnp.float32))
    except Exception as error:
        raise UserError(_of(text, error)) from error


@dataclass(frozen=True)
class Axis:
    """A name and its values, each with a text that stands for it."""

    name: str
    values: tuple[Any, ...]
    texts: tuple[str, ...]


_NUMBER = r"\s*([-+]?[\d.]+(?:[eE][-+]?\d+)?)\s*"
_RANGE = re.compile(rf"\s*(lin:)?{_NUMBER}:{_NUMBER}:\s*(\d+)\s*")
# Besides Python's, the spellings of other tools.
_CONSTANTS = {"true": True, "false": False, "none": None, "null": None}


def read_axis(text: str) -> Axis:
    """The type of `--over`: `name=low:high:number`, `name=lin:low:high:number` or `name=value,value`.

    Raises:
      ArgumentTypeError: says what is wrong.
    """
    name, equals, values = text.partition("=")
    name = name.strip()
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUES, not {text!r}")
    if match := _RANGE.fullmatch(values):
        numbers = _between(*match.groups())
        return Axis(name, numbers, tuple(map(repr, numbers)))
    try:
        items = ast.parse(f"[{values.strip()}]", mode="eval").body
    except SyntaxError:
        items = None
    if not isinstance(items, ast.List) or not items.elts:
        raise argparse.ArgumentTypeError(
            f"cannot read the values of {name}, {values!r}; write low:high:number, lin:low:high:number, or values as "
            f"in Python, separated by commas, such as --over \"{name}='**/w',None\""
        )
    found, texts = zip(*map(_value, items.elts), strict=True)
    return Axis(name, found, texts)


def _between(linear: str | None, low: str, high: str, number: str) -> tuple[float, ...]:
    first, last = _float(low), _float(high)
    if not 2 <= int(number) <= MOST:
        raise argparse.ArgumentTypeError(f"there must be 2 to {MOST} values between two ends, not {number}")
    if not linear and min(first, last) <= 0:
        raise argparse.ArgumentTypeError(
            f"{low}:{high}:{number} is geometric, from above 0; write lin:{low}:{high}:{number} for equal distances"
        )
    values = (np.linspace if linear else np.geomspace)(first, last, int(number))
    # What a table prints of a number: so its row has all of it, and a text that is copied is what was trained.
    return tuple(float(f"{value:g}") for value in values)


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def _value(item: ast.expr) -> tuple[Any, str]:
    """A value of a list, and its text."""
    if isinstance(item, ast.Name) and item.id not in NAMES:
        # The shell takes away the quotes of a text.
        value = _CONSTANTS.get(item.id, item.id)
        return value, repr(value)
    if unknown := [name for name in _free_names(item) if name not in NAMES]:
        raise argparse.ArgumentTypeError(_unknown(unknown[0]))
    text = ast.unparse(item)
    try:
        return _evaluate(compile(ast.Expression(item), text, "eval"), {}), text
    except Exception as error:
        raise argparse.ArgumentTypeError(_sentence(error)) from error


_NAMED = re.compile(r"([^()\[\]{}'\"=]+)=(?!=)(.+)", re.DOTALL)


def read_named(texts: Sequence[str]) -> dict[str, Written]:
    """Rules by name: `name=rule`, or the rule's text for its name.

    Raises:
      UserError: as `read` says, or two have one name.
    """
    rules: dict[str, Written] = {}
    for text in texts:
        match = _NAMED.fullmatch(text.strip())
        name, written = map(str.strip, match.groups()) if match else (text.strip(), text)
        if name in rules:
            raise UserError(f"two rules have the name {name!r}; give them names, as in first={written}")
        rules[name] = read(written)
    return rules
