"""Rules as they are written on a command line, and the values of `--over`."""

import argparse
import ast
import math
from types import SimpleNamespace

import pytest
from command_line import check_refused
from table import ROWS

import jaxopt_rules as jr
from jaxopt_rules.commands import rules
from jaxopt_rules.commands.problems import batches_of
from jaxopt_rules.commands.rules import read, read_axis, read_named
from jaxopt_rules.experiments.data import UserError

PRINTED = {str(rule): rule for rule in (row.make() for row in ROWS)}


def has_known_names(text):
    """Whether it is an expression without functions of its author's: these print as their names, or not at all."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return False
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} <= rules.NAMES.keys()


TYPED = [text for text in PRINTED if has_known_names(text)]


def test_most_texts_have_known_names():
    assert len(TYPED) > 0.8 * len(PRINTED)


@pytest.mark.parametrize("text", TYPED)
def test_what_a_rule_prints_can_be_typed(text):
    assert read(text).rule() == PRINTED[text]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (" adamw(3e-4,\n  weight_decay=0.1) ", jr.adamw(3e-4, weight_decay=0.1)),
        ("chain(clip_by_global_norm(inf), sgd(Cosine(0.1, 100)))", None),
        ("adamw(1e-3, where=['**/w', re.compile('.*scale')])", None),
        ("sgd(lambda count: 0.1 / jnp.sqrt(count + 1))", None),
        ("partition({'a': sgd(0.1), 'b': adam()}, by={'a': '**/w'})", None),
        ("chain(*[sgd(rate) for rate in (0.1, 0.2)][:1])", jr.chain(jr.sgd(0.1))),
    ],
)
def test_texts(text, rule):
    made = read(text).rule()
    assert isinstance(made, jr.Rule)
    assert rule is None or made == rule


def test_names_stand_for_values():
    written = read(
        "chain(clip_by_global_norm(c), sgd(Cosine(scale, 10), momentum=momentum))", ["c", "scale", "momentum"]
    )
    values = {"c": 1.0, "scale": 0.1, "momentum": 0.9}
    rule = jr.chain(jr.clip_by_global_norm(1.0), jr.sgd(jr.Cosine(0.1, 10), momentum=0.9))
    assert written.rule(**values) == rule
    filled = written.filled({name: repr(value) for name, value in values.items()})
    assert filled == "chain(clip_by_global_norm(1.0), sgd(Cosine(0.1, 10), momentum=0.9))"
    assert read(filled).rule() == rule


def test_expressions_are_filled_in_as_wholes():
    written = read("sgd(-x ** 2 + 1, momentum=f(y))", ["x", "f", "y"])
    assert written.filled({"x": "-0.5", "f": "lambda c: c", "y": "1 + 2"}) == (
        "sgd(-(-0.5) ** 2 + 1, momentum=(lambda c: c)(1 + 2))"
    )


def test_a_constructor_alone_takes_arguments_by_name():
    written = read("adamw", ["weight_decay", "learning_rate"])
    assert written.rule(learning_rate=0.1, weight_decay=0.2) == jr.adamw(0.1, weight_decay=0.2)
    assert (
        written.filled({"learning_rate": "0.1", "weight_decay": "0.2"}) == "adamw(weight_decay=0.2, learning_rate=0.1)"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adamw(1e-3", "cannot read the rule 'adamw(1e-3': '(' was never closed"),
        ("", "cannot read the rule ''"),
        ("x = 3", "cannot read the rule 'x = 3'"),
        ("adamw\0", "cannot read the rule 'adamw\\x00'"),
        ("adamv(1e-3)", "adamv(1e-3): unknown name 'adamv'; did you mean adam, "),
        ("sgd(Cosin(1, 2))", "unknown name 'Cosin'; did you mean Cosine?"),
        ("sgd(zzz)", "unknown name 'zzz'; there are the public names of jaxopt_rules"),
        ("schedules", "unknown name 'schedules'"),
        ("open('x')", "unknown name 'open'"),
        (
            "adamw(lr=1)",
            "adamw: got an unexpected keyword argument 'lr'; lr is learning_rate; it takes learning_rate, b1",
        ),
        ("adamw(-1)", "adamw(-1): learning_rate must be at least 0, not -1"),
        ("sgd", "sgd is no rule but a function; it makes rules when it is called: sgd(learning_rate, "),
        ("Cosine(1e-3, 10)", "Cosine(1e-3, 10) is no rule but of type Cosine"),
        ("1 + 1", "1 + 1 is no rule but of type int"),
        ("lambda x: x", "lambda x: x is no rule but a function"),
        ("adamw.rate", "AttributeError: 'function' object has no attribute 'rate'"),
        ("sgd(1 / 0)", "ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_no_rule_is_refused_in_one_line(text, message, capsys):
    check_refused(["explain", text], message, capsys)


def test_an_argument_that_is_not_in_the_text_is_refused():
    with pytest.raises(UserError, match=r"x is not in the rule 'sgd\(0.1\)'; write it where its values are to stand"):
        read("sgd(0.1)", ["x"])
    with pytest.raises(UserError, match="unknown name 'rat'; did you mean rate"):
        read("sgd(rat)", ["rate"])
    with pytest.raises(UserError, match="unknown name 'y'; there are the public names of jaxopt_rules and x"):
        read("sgd(x, momentum=y)", ["x"])


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4:1:5", [1e-4, 1e-3, 1e-2, 0.1, 1.0]),
        ("1:1e-2:3", [1.0, 0.1, 0.01]),
        ("1e-3:1e-1:4", [0.001, 0.00464159, 0.0215443, 0.1]),
        ("lin:-1:1:3", [-1.0, 0.0, 1.0]),
        (" lin: 0 : 1 : 3 ", [0.0, 0.5, 1.0]),
        ("0, 0.01,1", [0, 0.01, 1]),
        ("-1e-3", [-1e-3]),
        ("true,False,none,None", [True, False, None, None]),
        ("decoupled,'l2'", ["decoupled", "l2"]),
        ("'**/w',['a', 'b']", ["**/w", ["a", "b"]]),
        ("Cosine(1e-3, 10),Warmup(0.1, 5)", [jr.Cosine(1e-3, 10), jr.Warmup(0.1, 5)]),
        ("{'a': {'b': {'c': 1}}}", [{"a": {"b": {"c": 1}}}]),
        ("inf", [math.inf]),
    ],
)
def test_values(text, values):
    axis = read_axis(f"name={text}")
    assert axis.name == "name"
    assert list(axis.values) == values
    assert [*map(type, axis.values)] == [*map(type, values)]
    assert [eval(text, rules.NAMES) for text in axis.texts] == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate", "must be NAME=VALUES, not 'rate'"),
        ("=1,2", "must be NAME=VALUES"),
        ("a.b=1,2", "must be NAME=VALUES"),
        ("x=", "cannot read the values of x, ''; write low:high:number"),
        ("x=1:2", "cannot read the values of x, '1:2'"),
        ("x=1:2:3.5", "cannot read the values of x"),
        ("x=1,,2", "cannot read the values of x"),
        ("x=**/w", "such as --over \"x='**/w',None\""),
        ("x=1:10:1", "there must be 2 to 1000 values between two ends, not 1"),
        ("x=1:10:1000000", "there must be 2 to 1000 values"),
        ("x=1.2.3:10:2", "'1.2.3' is no number"),
        ("x=0:1:3", "0:1:3 is geometric, from above 0; write lin:0:1:3 for equal distances"),
        ("x=Cosin(1, 2)", "unknown name 'Cosin'; did you mean Cosine?"),
        ("x=Cosine(1, -2)", "steps must be an integer"),
    ],
)
def test_values_that_cannot_be_read_are_refused(text, message):
    with pytest.raises(argparse.ArgumentTypeError) as raised:
        read_axis(text)
    assert message in str(raised.value)


def test_names_of_rules():
    named = read_named(["sgd(0.1, momentum=0.9)", " heavy ball = sgd(0.1, momentum=0.9)", "b1=adam(b1=0.5)"])
    assert list(named) == ["sgd(0.1, momentum=0.9)", "heavy ball", "b1"]
    assert [written.rule() for written in named.values()] == [*[jr.sgd(0.1, momentum=0.9)] * 2, jr.adam(b1=0.5)]


@pytest.mark.parametrize(("steps", "batches"), [(5, 5), (10**7, 10_000), (None, 10_000)])
def test_long_runs_see_their_batches_again(steps, batches):
    problem = SimpleNamespace(batches=lambda seed, count: (seed, count))
    assert batches_of(problem, steps)(3) == (3, batches)
