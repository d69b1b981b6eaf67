"""Optax's own tests of its optimizers, pointed at ours: imported, they find our rules where they look for theirs.

What they get is `to_optax(rule)`, which is what one who has a training loop of Optax's is to hand it. Each test that
does not pass is in a table below, with the reason; one that is in it and passes is a failure, too. README has the same
list in words and its numbers.
"""

import functools
import re
import sys
import unittest
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import jaxopt_rules as jr

optax = pytest.importorskip("optax")
pytest.importorskip("sklearn", reason="Optax's tests need it")
alias_test = pytest.importorskip("optax._src.alias_test")
contrib_test = pytest.importorskip("optax.contrib._common_test")
interop = pytest.importorskip("jaxopt_rules.interop.optax")

if optax.__version__ != "0.2.8":
    pytest.skip(f"the tables are those of optax 0.2.8, not {optax.__version__}", allow_module_level=True)

README = (Path(__file__).parent.parent / "README.md").read_text()


class OurAliases:
    """Has our rules by the names that they are looked for."""

    schedule_free_eval_params = staticmethod(jr.eval_params)

    def __getattr__(self, name: str) -> Any:
        make = getattr(jr, name)

        @functools.wraps(make)  # `inject_hyperparams` reads the signature
        def build(*args: Any, **kwargs: Any) -> Any:
            return interop.to_optax(make(*args, **kwargs))

        return build


class Reason(NamedTuple):
    """Why tests of Optax do not pass."""

    text: str  # as in README
    tests: str  # a regular expression, found in those and no others
    raises: type[Exception] | tuple[type[Exception], ...]
    number: int


_CONTRIB = "acprop|cocob|dadapt_adamw|dowg|galore|madgrad|momo|momo_adam|simplified_ademamix|sophia"

REASONS = (
    Reason(
        "no such rule here",
        # Complex parameters are skipped by Optax itself for some.
        r"opt_name='((optimistic_adam_v2|CONTRIB)'|(fromage|optimistic_adam|optimistic_gradient_descent)'(?!.*complex))".replace(
            "CONTRIB", _CONTRIB
        ),
        (AttributeError, ValueError),
        228,
    ),
    Reason("slots have no dtype of one's choice", r"test_explicit_dtype", TypeError, 48),
    Reason(
        "of vectors and stacks",
        r"'muon'(?!.*(matrix_parabola|learning_rate_schedule))",
        ValueError,
        15,
    ),
    Reason(
        "a number that is read when the rule is built is not traced",
        r"inject_hyperparams.*'(rmsprop|yogi|prodigy)'",
        (TypeError, ValueError),
        4,
    ),
    Reason("another default", r"test_optimization .*'adamw'.*rosenbrock", AssertionError, 2),
    Reason(
        "a pair of negative curvature is not kept",
        r"test_against_plain_implementation .*himmelblau",
        AssertionError,
        2,
    ),
)

# Of functions inside Optax, and of a wrapper that is not here.
NOT_OF_RULES = r"test_plain_preconditioning|test_preconditioning_by_lbfgs|wrapper_name='mechanize'"

# What takes long for what it adds.
THOROUGH = (
    r"float16'?\)|float64|complex"
    r"|LBFGSTest\.test_(against_plain_implementation|handling_pytrees|multiclass_logreg|state_shape)"
)


class Case(NamedTuple):
    test: unittest.TestCase
    text: str


def _text(test: unittest.TestCase) -> str:
    """Its name and arguments, the same in every process."""
    text = re.sub(r"<function (?:_setup_)?(\w+).*? at \w+>", r"\1", test.id().partition("_test.")[2])
    return re.sub(r"<class 'jax\.numpy\.(\w+)'>", r"\1", re.sub(r"(test_[a-z_]+)\d+ ", r"\1 ", text))


def _cases() -> list[Case]:
    loader = unittest.TestLoader()
    suites = (alias_test.AliasTest, alias_test.LBFGSTest, contrib_test.ContribTest)
    tests = [test(name) for test in suites for name in loader.getTestCaseNames(test)]
    return [Case(test, _text(test)) for test in tests if not re.search(NOT_OF_RULES, test.id())]


CASES = _cases()


def reasons_for(case: Case) -> list[Reason]:
    return [reason for reason in REASONS if re.search(reason.tests, case.text)]


def _marks(case: Case) -> list[Any]:
    marks = [pytest.mark.xfail(raises=reason.raises, reason=reason.text, strict=True) for reason in reasons_for(case)]
    return marks + [pytest.mark.thorough] * bool(re.search(THOROUGH, case.text))


@pytest.mark.filterwarnings("ignore:'penalty' was deprecated:FutureWarning")  # of scikit-learn, told to Optax
@pytest.mark.parametrize("case", [pytest.param(case, marks=_marks(case), id=case.text) for case in CASES])
def test_of_optax(case: Case, monkeypatch: pytest.MonkeyPatch):
    module = sys.modules[type(case.test).__module__]
    monkeypatch.setattr(module, "alias", OurAliases())
    monkeypatch.setattr(module, "contrib", OurAliases(), raising=False)
    case.test.debug()


def test_one_reason_for_each():
    found = [reasons_for(case) for case in CASES]
    assert max(map(len, found)) == 1
    assert [sum(reason in reasons for reasons in found) for reason in REASONS] == [reason.number for reason in REASONS]


def test_readme_has_the_numbers():
    failing = sum(reason.number for reason in REASONS)
    assert f"{len(CASES) - failing} of {len(CASES)}" in README
    rows = dict(re.findall(r"^\| (.+?) \| (\d+) \| .*\|$", README, re.MULTILINE))
    assert {reason.text: str(reason.number) for reason in REASONS}.items() <= rows.items()
