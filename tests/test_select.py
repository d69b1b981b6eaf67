"""Selectors: patterns, regular expressions, predicates, and lists of these, on paths of any tree; and groups."""

import pickle
import re
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

import jaxopt_rules as jr
from jaxopt_rules.select import by_ndim, check_by, check_selector, excluding, label, matches, matrices, select
from jaxopt_rules.trees import flatten, paths


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("w", ["w"], ["a/w", "ww"]),
        ("*/w", ["a/w"], ["w", "a/b/w"]),
        ("**/w", ["w", "a/w", "a/b/w"], ["aw", "w/b"]),
        ("blocks/*/attn/*", ["blocks/0/attn/q"], ["blocks/0/mlp/w", "blocks/0/attn/q/w"]),
        ("blocks/**", ["blocks/0", "blocks/0/attn/w"], ["blocks", "head/blocks/0"]),
        ("a/**/w", ["a/w", "a/b/w", "a/b/c/w"], ["b/a/w"]),
        ("bias*", ["bias", "bias_2"], ["bias/x"]),
        ("linear[0].w", ["linear[0].w"], ["linear0.w", "linear[0]xw"]),
    ],
)
def test_patterns(pattern, yes, no):
    assert all(matches(pattern, path) for path in yes)
    assert not any(matches(pattern, path) for path in no)


class Layer(NamedTuple):
    w: Any
    b: Any


def test_paths_of_nested_containers():
    tree = {"blocks": [Layer(jnp.ones(2), None), Layer(jnp.ones(2), jnp.ones(1))], "head": jnp.ones(1)}
    assert paths(tree) == ["blocks/0/w", "blocks/0/b", "blocks/1/w", "blocks/1/b", "head"]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (None, [True, True, True]),
        ("**/w", [False, True, True]),
        (["b", "*/w"], [True, True, False]),
        ([], [False, False, False]),
        (lambda path, x: x.ndim > 1, [False, False, True]),
    ],
)
def test_select(selector, expected):
    assert select(selector, ["b", "a/w", "w"], [jnp.ones(2), jnp.ones(2), jnp.ones((2, 2))]) == expected


def test_decay_where():
    params = {"w": jnp.full((2, 2), 2.0), "b": jnp.full(2, 2.0)}
    zeros = {"w": jnp.zeros((2, 2)), "b": jnp.zeros(2)}
    for where in ("w", lambda path, p: p.ndim == 2, ["w"]):
        for rule in (
            jr.adamw(0.1, weight_decay=0.5, where=where),
            jr.adamw(0.1, weight_decay=0.5, where=where, bias_correction="step"),
            jr.chain(jr.weight_decay(0.5, where), jr.sgd(0.1)),
        ):
            new, _ = rule.apply(zeros, rule.init(params), params)
            assert (new["w"] < 2).all()
            assert (new["b"] == 2).all()


def test_a_predicate_is_asked_about_arrays_alone():
    asked = []
    params = {"w": jnp.ones((2, 2)), "f": jnp.tanh, "rate": 0.5, "n": jnp.arange(2), "none": None}
    select(lambda path, x: asked.append(path), paths(params), jax.tree.leaves(params, is_leaf=lambda x: x is None))
    assert asked == ["w"]


def test_a_pattern_without_a_leaf_is_an_error():
    params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    rule = jr.adamw(where="**/kernel")
    with pytest.raises(ValueError, match=r"pattern '\*\*/kernel' matches none of 'b', 'w'"):
        rule.update(params, rule.init(params), params)


def test_an_error_about_a_large_model_is_short():
    with pytest.raises(ValueError, match=r"'x' matches none of '0', .*, '9' and 90 more$"):
        select("x", [str(i) for i in range(100)], [jnp.ones(1)] * 100)


@pytest.mark.parametrize("bad", [3, [1], {"w": True}, ["w", ["b"]], [None]])
def test_what_is_no_selector(bad):
    with pytest.raises(TypeError, match="takes a pattern like"):
        jr.adamw(where=bad)


NAMES = ["b", "a/w", "w", "n"]
LEAVES = [jnp.ones(2), jnp.ones((2, 2, 2)), jnp.ones((2, 2)), jnp.arange(2)]


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (re.compile(r"(.*/)?w"), [False, True, True, False]),
        (re.compile("W", re.IGNORECASE), [False, False, True, False]),
        ([re.compile("b"), "a/*", matrices], [True, True, True, False]),
        (("b",), [True, False, False, False]),
        (matrices, [False, False, True, False]),
        (by_ndim(2, 3), [False, True, True, False]),
        (by_ndim(1, least=3), [True, True, False, False]),
        (excluding("**/w"), [True, False, False, True]),
        (excluding("b", re.compile("n"), matrices), [False, True, False, False]),
        ([excluding("**/w"), "w"], [True, False, True, True]),
    ],
)
def test_ready_selectors(selector, expected):
    check_selector(selector, "test")
    assert select(selector, NAMES, LEAVES) == expected


def test_patterns_in_what_is_excluded_and_regular_expressions_must_match():
    for selector in (excluding("**/bias"), [excluding("**/w", "**/bias")], re.compile(".*/bias")):
        with pytest.raises(ValueError, match=r"the pattern '.*/bias' matches none of 'b', 'a/w', 'w', 'n'"):
            select(selector, NAMES, LEAVES)
        assert select(selector, [], []) == []


@pytest.mark.parametrize(
    ("selector", "text"),
    [
        (by_ndim(2), "by_ndim(2)"),
        (by_ndim(1, 2, least=4), "by_ndim(1, 2, least=4)"),
        (matrices, "by_ndim(2)"),
        (excluding("**/bias", matrices), "excluding('**/bias', by_ndim(2))"),
    ],
)
def test_ready_selectors_are_values(selector, text):
    assert repr(selector) == text
    assert pickle.loads(pickle.dumps(selector)) == selector
    assert jr.adamw(where=selector) == jr.adamw(where=eval(text))
    assert hash(jr.adamw(where=[selector])) == hash(jr.adamw(where=[eval(text)]))
    assert repr(jr.adamw(where=selector)) == f"adamw(where={text})"


def test_regular_expressions_are_values_of_rules():
    rule = jr.adamw(where=re.compile(".*w"))
    assert rule == jr.adamw(where=re.compile(".*w")) == pickle.loads(pickle.dumps(rule))
    assert rule != jr.adamw(where=".*w")


@pytest.mark.parametrize(
    "make", [by_ndim, partial(by_ndim, 2.0), partial(by_ndim, True), excluding, partial(excluding, ["b"])]
)
def test_what_ready_selectors_refuse(make):
    with pytest.raises(TypeError, match="takes"):
        make()


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ({"matrix": ["**/w"]}, ["rest", "matrix", "matrix", None]),
        ({"matrix": matrices}, ["rest", "rest", "matrix", None]),
        ({"rest": "b", "matrix": excluding("b", "n")}, ["rest", "matrix", "matrix", None]),
        ({"rest": excluding("**/w")}, ["rest", "matrix", "matrix", None]),
        (lambda path, x: "matrix" if x.ndim == 2 else "rest", ["rest", "rest", "matrix", None]),
        (lambda path, x: "rest", ["rest", "rest", "rest", None]),
        ({"matrix": lambda path, x: True}, ["matrix", "matrix", "matrix", None]),
    ],
)
def test_label(by, expected):
    check_by(by, "test", ("matrix", "rest"))
    assert label(by, NAMES, LEAVES, ("matrix", "rest")) == expected


def nothing(path, x):
    return False


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ({"x": "W"}, "the pattern 'W' matches none of 'b', 'a/w', 'w', 'n'"),
        ({"x": nothing}, "the group 'x', <function nothing at .*>, has none of 'b', 'a/w', 'w', 'n'"),
        ({"x": by_ndim(4)}, r"the group 'x', by_ndim\(4\), has none of"),
        ({"x": ["**/w", "b"], "y": matrices}, "'w' belongs to two groups, 'x' and 'y'"),
        ({"x": "**/w", "y": "n"}, "'b' belongs to none of the groups 'x', 'y'; one label that is left out"),
        (lambda path, x: "z", "by gave the label 'z' for 'b'; the groups are 'x', 'y'"),
        (matrices, r"by gave False for 'b'; a predicate stands for one label: by=\{'x': predicate\}"),
    ],
)
def test_label_refuses(by, message):
    check_by(by, "test", ("x", "y"))
    with pytest.raises(ValueError, match=message):
        label(by, NAMES, LEAVES, ("x", "y"))


def test_a_group_may_be_without_leaves_where_there_are_none_or_some_are_absent():
    assert label({"x": "w"}, [], [], ("x", "y")) == []
    assert label({"x": matrices}, ["b", "w"], [jnp.ones(2), None], ("x", "y")) == ["y", None]
    assert label({"x": "w"}, ["b", "w"], [jnp.ones(2), None], ("x", "y")) == ["y", None]


@pytest.mark.parametrize(
    ("by", "error", "message"),
    [
        ("**/w", TypeError, r"test: by is a dict with a selector for each label, by=\{'x': '\*\*/w'\}, or a function"),
        (excluding("b"), TypeError, "by is a dict"),
        ({"x": 3}, TypeError, r"test: by\['x'\] takes a pattern"),
        ({"a": "b"}, ValueError, "test: by has the label 'a', which is none of 'x', 'y', 'z'"),
        ({"x": "b"}, ValueError, "test: by has no selector for 'y', 'z'; one label may be left out"),
    ],
)
def test_what_says_nothing_about_groups(by, error, message):
    with pytest.raises(error, match=message):
        check_by(by, "test", ("x", "y", "z"))


@partial(jax.tree_util.register_dataclass, data_fields=["w", "parts"], meta_fields=["name"])
@dataclass
class Block:
    w: Any
    parts: list[Any]
    name: str = "block"


def test_paths_of_dataclasses_and_of_absent_leaves():
    tree = Block(jnp.ones(2), [Block(None, []), jnp.ones(2)])
    assert paths(tree) == ["w", "parts/0/w", "parts/1"]
    assert len(flatten(tree)[0]) == 3
