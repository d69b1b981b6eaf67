"""The command that holds every rule against independent implementations, with implementations made for the purpose."""

import re

import numpy as np
import pytest

import jaxopt_rules as jr
from jaxopt_rules import conformance
from jaxopt_rules.__main__ import main
from jaxopt_rules.conformance import PAIRS, Pair, run
from jaxopt_rules.conformance.pairs import Problem

# Under 64-bit types alone, which the command enables for its process.
pytestmark = pytest.mark.x64


def descent(rate, spoil=lambda p: p):
    """Gradient descent in NumPy, and what is wrong with it."""

    def begin(start):
        params = dict(start)

        def step(grads):
            for name, g in grads.items():
                params[name] = spoil(params[name] - rate * g)
            return dict(params)

        return step

    return begin


def pair(name, theirs, oracle="numpy.descent", **options):
    return Pair(name, lambda: jr.sgd(0.1), oracle, theirs, "plain", **options)


def test_every_pair_that_is_installed_is_one_line(monkeypatch, capsys):
    pairs = (pair("sgd", descent(0.1)), pair("sgd short", descent(0.1), problem=Problem({"w": (3,)}, steps=7)))
    monkeypatch.setattr(conformance, "PAIRS", (*pairs, pair("sgd", descent(0.1), "no_such_library.SGD")))
    assert main(["conformance"]) == 0
    printed = capsys.readouterr()
    lines = [re.split(r"  +", line) for line in printed.out.splitlines()]
    assert [line[:4] for line in lines] == [
        ["sgd", "numpy.descent", "plain", "50"],
        ["sgd short", "numpy.descent", "plain", "7"],
    ]
    assert all(re.fullmatch(r"\d\.\de[-+]\d\d", line[4]) and float(line[4]) < 1e-14 for line in lines)
    assert printed.err.startswith("not installed: no_such_library; see the dependency groups oracles")


@pytest.mark.parametrize(
    ("spoil", "difference"),
    [(lambda p: p * (1 + 1e-9), r"\d\.\de-\d\d"), (lambda p: p * np.nan, "nan")],
    ids=["off", "nan"],
)
def test_what_exceeds_its_bound_is_exit_code_1(spoil, difference, monkeypatch, capsys):
    monkeypatch.setattr(conformance, "PAIRS", (pair("off", descent(0.1, spoil)), pair("sgd", descent(0.1))))
    assert main(["conformance"]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert re.search(rf"  {difference}  exceeds 1\.0e-12$", first)
    assert "exceeds" not in second


def test_the_difference_is_relative_to_the_way_that_was_made():
    twice = run(pair("twice", descent(0.2)))
    np.testing.assert_allclose(twice.difference, 0.5)
    assert not twice.passed
    still = run(Pair("still", lambda: jr.sgd(0.0), "numpy.descent", descent(0.0), "plain"))
    assert still.difference == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rule", "no_such_rule"], "there is no pair of rule no_such_rule and oracle *"),
        (
            ["--oracle", "no_such_library"],
            "nothing to compare with is installed of no_such_library; see the dependency groups",
        ),
    ],
)
def test_nothing_to_compare_is_refused_in_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(conformance, "PAIRS", (pair("sgd", descent(0.1), "no_such_library.SGD"),))
    assert main(["conformance", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"python -m jaxopt_rules: {message}")
    assert printed.count("\n") == 1


def test_every_optimizer_has_a_pair_or_says_that_there_is_no_oracle():
    """An optimizer is what makes updates by itself; its pair bears its name."""
    named = {p.name.split()[0] for p in PAIRS}
    rules = [
        x for x in vars(jr).values() if hasattr(x, "__wrapped__") and x.__module__.startswith("jaxopt_rules.rules")
    ]
    silent = {rule.__name__ for rule in rules if "oracle" not in rule.__doc__}
    assert not {name for name in silent - named if not name.endswith("_direction")}


def test_pairs_have_names_of_their_own():
    names = [(p.name, p.oracle) for p in PAIRS]
    assert len(set(names)) == len(names)


def test_a_line_fits_a_terminal():
    assert max(len(p.convention) for p in PAIRS) <= 56
