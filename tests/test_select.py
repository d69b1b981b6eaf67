"""Selectors: patterns, lists of them, and predicates, on paths of any tree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

import jaxopt_rules as jr
from jaxopt_rules.select import matches, select
from jaxopt_rules.trees import paths


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


@pytest.mark.parametrize("bad", [3, [1], {"w": True}])
def test_what_is_no_selector(bad):
    with pytest.raises(TypeError, match="takes a pattern like"):
        jr.adamw(where=bad)
