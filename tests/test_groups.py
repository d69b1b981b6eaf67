"""Rules for a part of the leaves: groups, masks, frozen leaves, multipliers; and what is absent, named, refused."""

import functools
import operator
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit, stepped
from golden import Bag
from table import wrappers

import jaxopt_rules as jr
from jaxopt_rules.models import LSTM, MLP, mean_squared_error
from jaxopt_rules.trees import flatten, paths

RNG = np.random.default_rng(0)
STEPS = 50


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


PARAMS = {
    "blocks": [{"bias": normal(3), "w": normal(3, 3)}, {"bias": normal(3), "w": normal(3, 3)}],
    "embed": {"w": normal(5, 3)},
    "head": normal(3),
}
GRADS = jax.tree.map(lambda p: normal(STEPS, *p.shape), PARAMS)
MATRICES = {"blocks/0/w", "blocks/1/w", "embed/w"}
BLOCKS = {"blocks/0/bias", "blocks/0/w", "blocks/1/bias", "blocks/1/w"}


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, `None` included."""
    return dict(zip(paths(tree), flatten(tree)[0], strict=True))


def only(tree: Any, chosen: set[str]) -> dict[str, Any]:
    return {path: x for path, x in by_path(tree).items() if path in chosen}


def once(rule: jr.Rule, grads: Any, params: Any, **extra: Any) -> Any:
    """The parameters behind one step."""
    return rule.apply(grads, rule.init(params), params, **extra)[0]


def slot_arrays(state: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(state) if x.ndim > 0]


def slot_bytes(state: Any) -> int:
    return sum(x.nbytes for x in slot_arrays(state))


# ---------------------------------------------------------------------------------------------------------------------
# Equal to the rules of the parts, each on a tree of its own
# ---------------------------------------------------------------------------------------------------------------------


def in_a_loop(rule, params, grads):
    step = quick_jit(lambda params, state, g: rule.apply(g, state, params), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.array, params)
    state = rule.init(params)
    for i in range(STEPS):
        params, state = step(params, state, jax.tree.map(operator.itemgetter(i), grads))
    return params


def in_a_scan(rule, params, grads):
    def body(carry, g):
        params, state = carry
        return rule.apply(g, state, params), None

    return quick_jit(lambda: jax.lax.scan(body, (params, rule.init(params)), grads)[0][0])()


def under_vmap(rule, params, grads):
    twice = jax.tree.map(lambda p: jnp.stack([2 * p, p]), params)
    both = jax.vmap(functools.partial(in_a_scan, rule, grads=grads))(twice)
    return jax.tree.map(lambda p: p[1], both)


@dataclass(frozen=True)
class Case:
    """A rule on the whole tree, and for each part of the tree the rule that does the same; `None`: nothing happens."""

    whole: jr.Rule
    parts: list[tuple[set[str], jr.Rule | None]]


ALL = set(paths(PARAMS))
CLIPPED = jr.chain(jr.clip_by_global_norm(0.5), jr.sgd(0.1, momentum=0.9))
NOISY = jr.chain(jr.add_noise(0.1), jr.clip_by_global_norm(0.5), jr.weight_decay(0.1), jr.adamw(0.1, weight_decay=0.1))
DECAYED = jr.chain(jr.clip_by_global_norm(0.5), jr.weight_decay(0.1), jr.adamw(0.1, weight_decay=0.1))
CAUTIOUS = jr.chain(jr.cautious(jr.momentum_direction()), jr.step(0.1, weight_decay=0.1))
CASES = {
    "partition": Case(
        jr.partition({"matrix": CLIPPED, "rest": NOISY}, {"matrix": jr.matrices}),
        [(MATRICES, CLIPPED), (ALL - MATRICES, NOISY)],
    ),
    "partition_of_hooks": Case(
        jr.chain(
            jr.partition({"blocks": jr.clip_by_global_norm(0.5), "rest": jr.normalize()}, {"blocks": "blocks/**"}),
            jr.sgd(0.1),
        ),
        [
            (BLOCKS, jr.chain(jr.clip_by_global_norm(0.5), jr.sgd(0.1))),
            (ALL - BLOCKS, jr.chain(jr.normalize(), jr.sgd(0.1))),
        ],
    ),
    "partition_in_partition": Case(
        jr.partition(
            {"blocks": jr.partition({"w": CLIPPED, "bias": CAUTIOUS}, {"w": "**/w"}), "rest": DECAYED},
            {"blocks": "blocks/**"},
        ),
        [(BLOCKS & MATRICES, CLIPPED), (BLOCKS - MATRICES, CAUTIOUS), (ALL - BLOCKS, DECAYED)],
    ),
    "gates_and_averages": Case(
        jr.partition(
            {"blocks": jr.accumulate(CLIPPED, 3), "rest": jr.skip_nonfinite(jr.lookahead(DECAYED, 2))},
            {"blocks": "blocks/**"},
        ),
        [(BLOCKS, jr.accumulate(CLIPPED, 3)), (ALL - BLOCKS, jr.skip_nonfinite(jr.lookahead(DECAYED, 2)))],
    ),
    "masked": Case(
        jr.chain(jr.masked(jr.clip_by_global_norm(0.5), "blocks/**"), jr.adamw(0.1)),
        [(BLOCKS, jr.chain(jr.clip_by_global_norm(0.5), jr.adamw(0.1))), (ALL - BLOCKS, jr.adamw(0.1))],
    ),
    "freeze": Case(jr.freeze(NOISY, "blocks/**"), [(BLOCKS, None), (ALL - BLOCKS, NOISY)]),
    "freeze_in_partition": Case(
        jr.partition({"blocks": jr.freeze(CLIPPED, "**/bias"), "rest": DECAYED}, {"blocks": "blocks/**"}),
        [(BLOCKS & MATRICES, CLIPPED), (BLOCKS - MATRICES, None), (ALL - BLOCKS, DECAYED)],
    ),
    "cautious": Case(CAUTIOUS, [(MATRICES, CAUTIOUS), (ALL - MATRICES, CAUTIOUS)]),
    "scale_by_path": Case(
        jr.chain(jr.adamw(0.1), jr.scale_by_path({"embed/*": 0.1, re.compile("blocks/.*"): 2.0})),
        [({"embed/w"}, jr.adamw(0.01)), (BLOCKS, jr.adamw(0.2)), ({"head"}, jr.adamw(0.1))],
    ),
    "layerwise_decay": Case(
        jr.chain(jr.adamw(0.1), jr.layerwise_decay(0.5, ["embed/**", "blocks/**", "head"])),
        [({"embed/w"}, jr.adamw(0.025)), (BLOCKS, jr.adamw(0.05)), ({"head"}, jr.adamw(0.1))],
    ),
}


@functools.cache
def expected(name):
    trees = [
        only(PARAMS, part) if rule is None else in_a_loop(rule, only(PARAMS, part), only(GRADS, part))
        for part, rule in CASES[name].parts
    ]
    return functools.reduce(operator.or_, trees)


@pytest.mark.parametrize("run", [in_a_loop, in_a_scan, under_vmap])
@pytest.mark.parametrize("name", CASES)
def test_equal_to_the_members_on_trees_of_their_own(name, run):
    assert expected(name).keys() == ALL
    chex.assert_trees_all_close(by_path(run(CASES[name].whole, PARAMS, GRADS)), expected(name), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_pair_gives_the_numbers_of_apply(name):
    rule = CASES[name].whole
    grads = jax.tree.map(operator.itemgetter(0), GRADS)
    updates, by_pair = quick_jit(rule.update)(grads, rule.init(PARAMS), PARAMS)
    new, by_apply = quick_jit(rule.apply)(grads, rule.init(PARAMS), PARAMS)
    chex.assert_trees_all_close(jr.apply_updates(PARAMS, updates), new, rtol=1e-6, atol=1e-7)
    chex.assert_trees_all_close(jr.state_dict(by_pair), jr.state_dict(by_apply), rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------------
# What a part has, and what the others have not
# ---------------------------------------------------------------------------------------------------------------------


def size(chosen: set[str]) -> int:
    return sum(x.size for x in only(PARAMS, chosen).values())


@pytest.mark.parametrize(
    ("rule", "arrays", "floats"),
    [
        (
            jr.partition({"matrix": jr.sgd(0.1, 0.9), "rest": jr.adamw()}, {"matrix": jr.matrices}),
            3 + 2 * 3,
            size(MATRICES) + 2 * size(ALL - MATRICES),
        ),
        (jr.partition({"matrix": jr.sgd(0.1), "rest": jr.sgd(0.1)}, {"matrix": jr.matrices}), 0, 0),
        (jr.freeze(jr.adamw(), "blocks/**"), 2 * 2, 2 * size(ALL - BLOCKS)),
        (jr.freeze(jr.adamw(), "**"), 0, 0),
        (jr.chain(jr.masked(jr.ema(0.9), "blocks/**"), jr.sgd(0.1)), 4, size(BLOCKS)),
        (jr.freeze(jr.average(jr.sgd(0.1)), "blocks/**"), 2, size(ALL - BLOCKS)),
        (
            jr.partition(
                {"blocks": jr.freeze(jr.adamw(), "**/bias"), "rest": jr.accumulate(jr.sgd(0.1), 2)},
                {"blocks": "blocks/**"},
            ),
            2 * 2 + 2,
            2 * size(BLOCKS & MATRICES) + size(ALL - BLOCKS),
        ),
    ],
    ids=repr,
)
def test_no_slots_for_leaves_of_others(rule, arrays, floats):
    state = rule.init(PARAMS)
    assert len(slot_arrays(state)) == arrays
    assert slot_bytes(state) == 4 * floats
    _, state = rule.apply(PARAMS, state, PARAMS)
    assert slot_bytes(state) == 4 * floats


BAD = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), PARAMS)
FROZEN = [
    jr.freeze(NOISY, "blocks/**"),
    jr.chain(jr.freeze(jr.clip_by_global_norm(0.5), "blocks/**"), DECAYED),
    jr.freeze(jr.chain(jr.weight_decay(0.5), jr.normalize(), jr.step(0.1, 0.5)), "blocks/**"),
    jr.freeze(jr.lookahead(jr.adamw(weight_decay=0.5), 1), "blocks/**"),
    jr.partition({"on": DECAYED, "off": jr.freeze(DECAYED, "**")}, {"off": "blocks/**"}),
]


@pytest.mark.parametrize("rule", FROZEN, ids=repr)
def test_frozen_leaves_stay_to_the_bit_and_are_in_no_norm(rule):
    grads = PARAMS | {"blocks": BAD["blocks"]}
    params, state = PARAMS, rule.init(PARAMS)
    for _ in range(3):
        params, state = quick_jit(rule.apply)(grads, state, params)
    chex.assert_trees_all_equal(params["blocks"], PARAMS["blocks"])
    assert jnp.isfinite(params["embed"]["w"]).all()
    assert (params["embed"]["w"] != PARAMS["embed"]["w"]).all()


def test_the_update_of_a_frozen_leaf_is_none():
    rule = jr.freeze(jr.adamw(), ["blocks/**", "head"])
    updates, _ = rule.update(PARAMS, rule.init(PARAMS), PARAMS)
    assert {path for path, u in by_path(updates).items() if u is None} == BLOCKS | {"head"}


def test_a_group_has_a_norm_of_its_own():
    clip = jr.clip_by_global_norm(1.0)
    rule = jr.partition(
        {"blocks": jr.chain(clip, jr.sgd(1.0)), "rest": jr.chain(clip, jr.sgd(1.0))}, {"blocks": "blocks/**"}
    )
    _, state = rule.apply(PARAMS, rule.init(PARAMS), PARAMS)
    recorded = jr.metrics(state)
    rest = only(PARAMS, ALL - BLOCKS)
    np.testing.assert_allclose(recorded["blocks.grad_norm"], jr.global_norm(PARAMS["blocks"]), rtol=1e-6)
    np.testing.assert_allclose(recorded["rest.grad_norm"], jr.global_norm(rest), rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
def test_a_mask_lets_the_others_pass_unchanged(dtype):
    grads = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    out, _ = jr.masked(jr.set_to_zero(), "blocks/**").update(grads, jr.masked(jr.set_to_zero(), "head").init(grads))
    assert not any(map(jnp.any, jax.tree.leaves(out["blocks"])))
    chex.assert_trees_all_equal(out["embed"]["w"].astype(dtype), grads["embed"]["w"])
    assert out["embed"]["w"].dtype == jnp.promote_types(dtype, jnp.float32)


def test_set_to_zero_as_the_rule_of_a_group():
    rule = jr.partition({"off": jr.set_to_zero(), "on": jr.adamw(0.1, weight_decay=0.5)}, {"off": "blocks/**"})
    updates, _ = rule.update(PARAMS, rule.init(PARAMS), PARAMS)
    assert not any(map(jnp.any, jax.tree.leaves(updates["blocks"])))
    new = once(rule, PARAMS, PARAMS)
    chex.assert_trees_all_equal(new["blocks"], PARAMS["blocks"])
    assert (new["head"] != PARAMS["head"]).all()


# ---------------------------------------------------------------------------------------------------------------------
# What is absent
# ---------------------------------------------------------------------------------------------------------------------

EVERYTHING = [
    jr.partition({"blocks": jr.adamw(0.1), "rest": jr.chain(jr.clip_grad(1.0), jr.sgd(0.1))}, {"blocks": "blocks/**"}),
    jr.chain(jr.masked(jr.clip_grad(0.1), "blocks/**"), jr.adamw(0.1)),
    jr.freeze(jr.adamw(0.1), "head"),
    jr.chain(jr.cautious(jr.adam_direction()), jr.step(0.1, 0.1)),
    jr.chain(jr.adamw(0.1), jr.scale_by_path({"blocks/**": 0.5})),
    jr.chain(jr.adamw(0.1), jr.layerwise_decay(0.5, ["embed/**", "blocks/**", "head"])),
    jr.partition({"blocks": jr.accumulate(jr.adamw(0.1), 1), "rest": jr.average(jr.sgd(0.1))}, {"blocks": "blocks/**"}),
]
rules_of_all_kinds = pytest.mark.parametrize("rule", EVERYTHING, ids=repr)


@rules_of_all_kinds
@pytest.mark.parametrize(
    "missing",
    [
        {"embed": {"w": None}},
        {"embed": None},
        {"blocks": None},
        {"blocks": [None, PARAMS["blocks"][1]]},
        {"blocks": [{"bias": None, "w": None}, {"bias": PARAMS["head"], "w": None}]},
        {"blocks": None, "embed": None, "head": None},
    ],
    ids=["leaf", "subtree", "group", "block", "leaves", "all"],
)
def test_without_a_gradient_parameters_stay_to_the_bit(rule, missing):
    grads = PARAMS | missing
    state = rule.init(PARAMS)
    new, new_state = quick_jit(rule.apply)(grads, state, PARAMS)
    whole = by_path(jax.tree.map(jnp.ones_like, PARAMS)).keys()
    present = {path for path, g in by_path(grads).items() if g is not None}
    for path in whole - present:
        np.testing.assert_array_equal(by_path(new)[path], by_path(PARAMS)[path], path)
    for path in present - {"head"}:
        assert (by_path(new)[path] != by_path(PARAMS)[path]).any(), path
    assert jax.tree.structure(state) == jax.tree.structure(new_state)
    updates, _ = quick_jit(rule.update)(grads, state, PARAMS)
    chex.assert_trees_all_close(jr.apply_updates(PARAMS, updates), new, rtol=1e-6)


@rules_of_all_kinds
def test_leaves_that_are_functions_integers_or_keys(rule):
    others = {"activation": jnp.tanh, "steps": jnp.arange(3), "rate": 0.5, "key": jax.random.key(0), "none": None}
    params = PARAMS | {"blocks": [PARAMS["blocks"][0] | others, PARAMS["blocks"][1]]}
    state = rule.init(params)
    absent = dict.fromkeys(others)
    grads = PARAMS | {"blocks": [PARAMS["blocks"][0] | absent, PARAMS["blocks"][1]]}
    new, _ = rule.apply(grads, state, params)
    for name, x in others.items():
        assert new["blocks"][0][name] is x, name
    expected = once(rule, PARAMS, PARAMS)
    chex.assert_trees_all_close(new["blocks"][0]["w"], expected["blocks"][0]["w"])
    assert len(slot_arrays(state)) == len(slot_arrays(rule.init(PARAMS)))


@rules_of_all_kinds
def test_a_number_that_is_no_array_is_refused(rule):
    params = PARAMS | {"embed": {"w": 0.5}}
    with pytest.raises(TypeError, match=r"at 'embed/w' is a Python number; make it an array: jnp.array\(0.5\)"):
        rule.update(params, rule.init(params), params)


@rules_of_all_kinds
def test_a_gradient_of_another_shape_is_refused(rule):
    grads = PARAMS | {"embed": {"w": jnp.ones(2)}}
    with pytest.raises(ValueError, match=r"at 'embed/w' has shape \(2,\), its parameter has shape \(5, 3\)"):
        rule.update(grads, rule.init(PARAMS), PARAMS)


@rules_of_all_kinds
def test_trees_without_leaves_and_shapes_alone(rule):
    assert slot_arrays(rule.init({})) == []
    shapes = jax.eval_shape(lambda: PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(rule.init(shapes), rule.init(PARAMS))
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(rule.init, PARAMS), rule.init(PARAMS))


# ---------------------------------------------------------------------------------------------------------------------
# Extra arguments
# ---------------------------------------------------------------------------------------------------------------------


def plateau() -> jr.Rule:
    return jr.chain(jr.sgd(1.0), jr.reduce_on_plateau(0.5, 0))


@pytest.mark.parametrize(
    "rule",
    [
        jr.partition({"a": plateau(), "b": jr.adamw()}, {"a": "blocks/**"}),
        jr.freeze(plateau(), "head"),
        jr.chain(jr.masked(jr.reduce_on_plateau(0.5, 0), "blocks/**"), jr.sgd(1.0)),
        jr.partition({"a": jr.freeze(jr.accumulate(plateau(), 1), "head"), "b": jr.adamw()}, {"b": "embed/**"}),
    ],
    ids=repr,
)
class TestExtraArguments:
    def test_reach_the_rules_of_groups(self, rule):
        params, state = PARAMS, rule.init(PARAMS)
        for value in (1.0, 1.0):
            params, state = rule.apply(PARAMS, state, params, value=value)
        assert jr.metrics(state)["plateau_scale"] == 0.5

    def test_are_asked_for(self, rule):
        with pytest.raises(TypeError, match=r"Plateau needs value: update\(grads, state, params, value=...\)"):
            once(rule, PARAMS, PARAMS)

    @pytest.mark.parametrize("call", ["update", "apply"])
    def test_are_refused_where_nothing_takes_them(self, rule, call):
        with pytest.raises(
            TypeError, match="does not take valeu; the extra arguments it accepts are grad, loss, value"
        ):
            getattr(rule, call)(PARAMS, rule.init(PARAMS), PARAMS, value=1.0, valeu=1.0)


def weighted(grads: Any, *, weights: Any) -> Any:
    return jax.tree.map(operator.mul, grads, weights)


def weighted_rule() -> jr.Rule:
    return jr.chain(jr.treewise(weighted, jr.hooks.StatelessState, extra=("weights",)), jr.sgd(1.0))


def test_extra_trees_are_cut_to_the_group():
    """`jax.tree.map` in the group's rule would refuse a tree that has more leaves."""
    rule = jr.partition({"blocks": weighted_rule(), "rest": jr.sgd(1.0)}, {"blocks": "blocks/**"})
    weights = jax.tree.map(lambda p: jnp.full_like(p, 3.0), PARAMS)
    new = once(rule, PARAMS, PARAMS, weights=weights)
    chex.assert_trees_all_close(new["blocks"], jax.tree.map(lambda p: -2 * p, PARAMS["blocks"]), rtol=1e-6)
    np.testing.assert_array_equal(new["head"], 0)


def test_extra_trees_like_the_parameters_are_cut_where_a_subtree_has_no_gradient():
    seen = []

    def update(grads, state, params=None, *, weights):
        seen.append({path for path, x in by_path(weights).items() if x is not None})
        return jax.tree.map(jnp.negative, grads), state

    member = jr.Rule(lambda params: (), update)
    rule = jr.partition({"blocks": member, "rest": jr.sgd(1.0)}, {"blocks": "blocks/**"})
    once(rule, PARAMS | {"embed": None}, PARAMS, weights=PARAMS)
    assert seen == [BLOCKS]


@pytest.mark.parametrize(
    "extra", [3.0, jnp.ones(3), {"x": jnp.ones(3)}, jnp.tanh], ids=["number", "array", "tree", "f"]
)
def test_other_extra_arguments_come_whole(extra):
    seen = []

    def update(grads, state, params=None, *, extra):
        seen.append(extra)
        return jax.tree.map(jnp.negative, grads), state

    rule = jr.freeze(jr.Rule(lambda params: (), update), "head")
    once(rule, PARAMS, PARAMS, extra=extra)
    assert seen == [extra] if callable(extra) else seen[0] is extra


# ---------------------------------------------------------------------------------------------------------------------
# Who belongs where
# ---------------------------------------------------------------------------------------------------------------------


def pair(by: Any, params: Any = PARAMS) -> set[str]:
    """The leaves that belong to the group `x` of two, as a training step shows."""
    rule = jr.partition({"x": jr.sgd(1.0), "y": jr.sgd(2.0)}, by)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = rule.update(ones, rule.init(params), params)
    found = {path: float(jnp.ravel(u)[0]) for path, u in by_path(updates).items() if u is not None}
    assert set(found.values()) <= {-1.0, -2.0}
    return {path for path, u in found.items() if u == -1.0}


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ({"x": "blocks/**"}, BLOCKS),
        ({"y": "blocks/**"}, ALL - BLOCKS),
        ({"x": "blocks/**", "y": ["embed/*", "head"]}, BLOCKS),
        ({"x": ["**/w", "head"]}, MATRICES | {"head"}),
        ({"x": re.compile(r"blocks/\d/w")}, BLOCKS & MATRICES),
        ({"x": [re.compile("head"), "embed/w", jr.by_ndim(2)]}, MATRICES | {"head"}),
        ({"x": jr.by_ndim(1)}, ALL - MATRICES),
        ({"x": jr.by_ndim(least=1)}, ALL),
        ({"x": jr.matrices}, MATRICES),
        ({"x": jr.excluding("**/w")}, ALL - MATRICES),
        ({"x": jr.excluding(jr.matrices, "head")}, BLOCKS - MATRICES),
        ({"x": lambda path, p: p.size > 9}, {"embed/w"}),
        ({"y": lambda path, p: path.startswith("blocks")}, ALL - BLOCKS),
        (lambda path, p: "x" if path == "head" else "y", {"head"}),
        (lambda path, p: "y", set()),
    ],
)
def test_by(by, expected):
    assert pair(by) == expected


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w", "bias"], meta_fields=["name"])
@dataclass
class Linear:
    w: Any
    bias: Any
    name: str = "linear"


W, BIAS = jnp.ones((2, 3)), jnp.ones(3)
MODELS = {
    "dict": {"a": {"w": W, "bias": BIAS}, "b": {"w": W, "bias": BIAS}},
    "dataclass": {"a": Linear(W, BIAS), "b": Linear(W, BIAS)},
    "dataclass_of_dataclasses": Linear(Linear(W, BIAS), Linear(W, BIAS)),
    "list": [{"w": W, "bias": BIAS}, Linear(W, BIAS)],
    "nested": [[{"a": Linear(W, BIAS)}], ({"w": W, "bias": BIAS}, None)],
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("by", [{"x": "**/w"}, {"x": jr.matrices}, {"y": re.compile(".*bias")}], ids=repr)
def test_one_selection_for_models_of_all_kinds(name, by):
    params = MODELS[name]
    chosen = pair(by, params)
    assert [p.ndim for p in only(params, chosen).values()] == [2, 2]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: jr.partition({}, {}), ValueError, "partition needs at least one rule"),
        (lambda: jr.partition({"x": 3}, {}), TypeError, "partition takes rules, .* not 3"),
        (lambda: jr.partition({"x": jr.adamw}, {}), TypeError, r"was it meant to be called, as in adamw\(...\)"),
        (lambda: jr.partition({1: jr.sgd(0.1)}, {}), TypeError, "partition: labels are text, not 1"),
        (lambda: jr.partition([jr.sgd(0.1)], {}), TypeError, r"partition takes a dict of rules by label, not \(sgd"),
        (
            lambda: jr.partition({"x": jr.sgd(0.1)}, "**/w"),
            TypeError,
            r"partition: by is a dict .*by=\{'x': '\*\*/w'\}",
        ),
        (lambda: jr.partition({"x": jr.sgd(0.1)}, {"x": True}), TypeError, r"partition: by\['x'\] takes a pattern"),
        (
            lambda: jr.partition({"x": jr.sgd(0.1)}, {"z": "w"}),
            ValueError,
            "by has the label 'z', which is none of 'x'",
        ),
        (
            lambda: jr.partition({"x": jr.sgd(0.1), "y": jr.sgd(0.1), "z": jr.sgd(0.1)}, {"x": "w"}),
            ValueError,
            "by has no selector for 'y', 'z'; one label may be left out and has the rest",
        ),
        (
            lambda: jr.partition({"x": jr.sgd(0.1), "y": jr.adam_direction()}, {"x": "w"}),
            ValueError,
            "the rule of 'x' gives updates and that of 'y' a direction; end that with step, too",
        ),
        (
            lambda: jr.partition({"x": jr.clip_grad(1.0), "y": jr.adam()}, {"x": "w"}),
            ValueError,
            "the rule of 'y' gives updates and that of 'x' a direction",
        ),
        (
            lambda: jr.masked(jr.adamw(), "w"),
            ValueError,
            r"masked: adamw\(\) gives updates, .* partition\(\{...\}, by\)",
        ),
        (lambda: jr.masked(jr.freeze(jr.adamw(), "b"), "w"), ValueError, "masked: freeze.* gives updates"),
        (lambda: jr.masked(jr.accumulate(jr.adamw(), 2), "w"), ValueError, "masked: accumulate.* gives updates"),
        (lambda: jr.masked(jr.project(jnp.tanh), "w"), ValueError, r"masked: project\(tanh\) gives updates"),
        (lambda: jr.masked(jr.clip_grad(1.0), {"w": True}), TypeError, "masked takes a pattern like"),
        (lambda: jr.masked("w", jr.clip_grad(1.0)), TypeError, "masked takes rules, .* not 'w'"),
        (lambda: jr.freeze(jr.adamw(), {"w": True}), TypeError, "freeze takes a pattern like"),
        (lambda: jr.freeze("w", jr.adamw()), TypeError, "freeze takes rules, .* not 'w'"),
        (lambda: jr.cautious(jr.adamw()), ValueError, r"cautious wraps a direction, and adamw\(\) gives updates"),
        (lambda: jr.cautious(0.1), TypeError, "cautious takes rules"),
        (
            lambda: jr.chain(jr.partition({"x": jr.adamw()}, {}), jr.sgd(0.1)),
            ValueError,
            r"sgd\(0.1\) stands behind partition",
        ),
        (
            lambda: jr.chain(jr.freeze(jr.accumulate(jr.sgd(0.1), 2), "w"), jr.scale(2.0)),
            ValueError,
            r"scale\(2.0\) stands behind freeze\(accumulate.*, which may do nothing",
        ),
    ],
)
def test_what_is_refused_when_it_is_built(make, error, message):
    with pytest.raises(error, match=message):
        make()


def two(by: Any) -> jr.Rule:
    return jr.partition({"x": jr.sgd(0.1), "y": jr.sgd(0.1)}, by)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (two({"x": "**/kernel"}), r"the pattern '\*\*/kernel' matches none of 'blocks/0/bias', 'blocks/0/w', "),
        (two({"x": jr.by_ndim(4)}), r"the group 'x', by_ndim\(4\), has none of 'blocks/0/bias'"),
        (two({"x": "**/w", "y": jr.excluding("head")}), "'blocks/0/w' belongs to two groups, 'x' and 'y'; make their"),
        (two({"x": "**/w", "y": "head"}), "'blocks/0/bias' belongs to none of the groups 'x', 'y'; one label that"),
        (two(lambda path, p: "z"), "by gave the label 'z' for 'blocks/0/bias'; the groups are 'x', 'y'"),
        (two(lambda path, p: None), "by gave the label None for 'blocks/0/bias'"),
        (two(jr.matrices), r"by gave False for 'blocks/0/bias'; a predicate stands for one label: by=\{'x'"),
        (jr.masked(jr.clip_grad(1.0), "kernel"), "the pattern 'kernel' matches none of"),
        (jr.freeze(jr.adamw(), ["head", "kernel"]), "the pattern 'kernel' matches none of"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("where", ["init", "update"])
def test_what_is_refused_on_a_tree(rule, message, where):
    state = rule.init({})
    with pytest.raises(ValueError, match=message):
        _ = rule.init(PARAMS) if where == "init" else rule.update(PARAMS, state, PARAMS)


def test_the_state_of_another_rule():
    state = two({"x": "head"}).init(PARAMS)
    other = jr.partition({"x": jr.sgd(0.1), "z": jr.sgd(0.1)}, {"x": "head"})
    with pytest.raises(TypeError, match="partition: update got a state of type dict where it needs a dict of x, z"):
        other.update(PARAMS, state, PARAMS)
    with pytest.raises(TypeError, match="update got a state of type StepState where it needs a dict of x, z"):
        other.apply(PARAMS, jr.sgd(0.1).init(PARAMS), PARAMS)


def test_a_parameter_that_moved_to_another_group():
    """Groups follow the tree that is trained: a leaf that was no array at birth has no slots in its group."""
    rule = jr.partition({"x": jr.adam(), "y": jr.sgd(0.1)}, {"x": jr.matrices})
    with pytest.raises(ValueError, match=r"Adam: the state has no m for 'head'.*init again"):
        rule.update(PARAMS | {"head": W}, rule.init(PARAMS), PARAMS | {"head": W})


# ---------------------------------------------------------------------------------------------------------------------
# Hyperparameters
# ---------------------------------------------------------------------------------------------------------------------


def test_hyperparameters_are_named_and_set_by_group():
    rule = jr.partition({"matrix": jr.sgd(0.5), "rest": jr.adamw(0.25)}, {"matrix": jr.matrices})
    state = rule.init(PARAMS)
    found = jr.hyperparams(state)
    assert {"matrix.learning_rate", "rest.learning_rate", "b1", "weight_decay"} <= found.keys()
    assert "learning_rate" not in found
    new = jr.set_hyperparams(state, {"matrix.learning_rate": 0.0, "rest.weight_decay": 0.5})
    assert jr.hyperparams(new)["weight_decay"] == 0.5
    params, _ = rule.apply(PARAMS, new, PARAMS)
    chex.assert_trees_all_equal(only(params, MATRICES), only(PARAMS, MATRICES))
    assert (params["head"] != PARAMS["head"]).all()


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (jr.freeze(jr.adamw(0.5), "head"), "learning_rate"),
        (jr.masked(jr.clip_grad(0.5), "head"), "max_norm"),
        (jr.cautious(jr.adam_direction(b1=0.5)), "b1"),
        (jr.partition({"x": jr.freeze(jr.adamw(0.5), "head"), "y": jr.adamw()}, {"y": "embed/*"}), "x.learning_rate"),
        (jr.scale_by_path({"blocks/**": 0.5}), "factor[blocks/**]"),
        (jr.layerwise_decay(0.5, lambda path, p: 0, 1), "layer_decay"),
    ],
    ids=repr,
)
def test_a_value_can_be_set(rule, name):
    state = rule.init(PARAMS)
    assert jr.hyperparams(state)[name] == 0.5
    assert jr.hyperparams(jr.set_hyperparams(state, {name: 0.25}))[name] == 0.25


def test_a_bare_name_that_two_groups_have_is_refused():
    state = jr.partition({"x": jr.sgd(0.5), "y": jr.sgd(0.25)}, {"x": "head"}).init(PARAMS)
    with pytest.raises(KeyError, match=r"'learning_rate' may be x.learning_rate or y.learning_rate"):
        jr.set_hyperparams(state, learning_rate=0.1)


def halved(count):
    return 0.5 ** (count + 1)


def test_schedules_inside_groups():
    rule = jr.partition({"x": jr.sgd(halved), "y": jr.freeze(jr.sgd(jr.Constant(1.0)), "head")}, {"x": "embed/*"})
    ones, state = jax.tree.map(jnp.ones_like, PARAMS), rule.init(PARAMS)
    for expected in (0.5, 0.25, 0.125):
        updates, state = quick_jit(rule.update)(ones, state, PARAMS)
        np.testing.assert_array_equal(updates["embed"]["w"], -expected)
        assert jr.metrics(state)["x.learning_rate"] == expected
    with pytest.raises(ValueError, match=r"x\.learning_rate is owned by a schedule"):
        jr.set_hyperparams(state, {"x.learning_rate": 0.1})


def test_a_schedule_of_a_group_is_a_field_of_the_optimizer():
    schedule = jr.Linear(1.0, 4)
    opt = jr.Optimizer(jr.partition({"x": jr.sgd(schedule), "y": jr.sgd(0.5)}, {"x": "**/w"}))
    assert getattr(opt, "x.learning_rate") == schedule
    assert getattr(opt, "y.learning_rate") == 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


def label_of(path, p):
    return "x" if p.ndim == 2 else "y"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: jr.partition({"x": jr.sgd(0.1), "y": jr.adamw()}, {"x": ["**/w", "head"]}),
            "partition({'x': sgd(0.1), 'y': adamw()}, {'x': ('**/w', 'head')})",
        ),
        (
            lambda: jr.partition(rules={"x": jr.sgd(0.1), "y": jr.sgd(0.2)}, by=label_of),
            "partition(rules={'x': sgd(0.1), 'y': sgd(0.2)}, by=label_of)",
        ),
        (lambda: jr.masked(jr.clip_grad(1.0), jr.matrices), "masked(clip_by_global_norm(1.0), by_ndim(2))"),
        (lambda: jr.freeze(jr.adamw(), jr.excluding("head")), "freeze(adamw(), excluding('head'))"),
        (lambda: jr.cautious(jr.adam_direction()), "cautious(adam_direction())"),
        (lambda: jr.scale_by_path({"embed/*": 0.5, "head": halved}), "scale_by_path({'embed/*': 0.5, 'head': halved})"),
        (lambda: jr.layerwise_decay(0.5, ["embed/*", ["blocks/**", "head"]]), "layerwise_decay(0.5, ('embed/*', ('b"),
    ],
)
def test_they_are_values(make, text):
    rule, again = make(), make()
    assert repr(rule).startswith(text)
    assert rule == again
    assert hash(rule) == hash(again)
    copy = pickle.loads(pickle.dumps(rule))
    assert copy == rule
    assert repr(copy) == repr(rule)
    expected, _ = rule.update(PARAMS, rule.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(copy.update(PARAMS, again.init(PARAMS), PARAMS)[0], expected)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (two({"x": "head"}), two({"y": "head"})),
        (two({"x": "head"}), two({"x": re.compile("head")})),
        (jr.freeze(jr.adamw(), "head"), jr.freeze(jr.adamw(), "embed/*")),
        (jr.freeze(jr.clip_grad(1.0), "head"), jr.masked(jr.clip_grad(1.0), "head")),
        (jr.scale_by_path({"head": 0.5}), jr.scale_by_path({"head": 0.25})),
        (jr.layerwise_decay(0.5, ["a", "b"]), jr.layerwise_decay(0.5, ["b", "a"])),
    ],
    ids=repr,
)
def test_other_arguments_make_another_rule(one, other):
    assert one != other


def test_a_rule_does_not_change_with_the_dicts_that_it_was_given():
    rules, by = {"x": jr.sgd(1.0), "y": jr.sgd(2.0)}, {"x": ["head"]}
    rule = jr.partition(rules, by)
    before = repr(rule)
    rules["x"], by["x"][0] = jr.sgd(4.0), "embed/*"
    assert repr(rule) == before
    new = once(rule, jax.tree.map(jnp.ones_like, PARAMS), PARAMS)
    np.testing.assert_allclose(new["head"], PARAMS["head"] - 1, rtol=1e-6)
    np.testing.assert_allclose(new["embed"]["w"], PARAMS["embed"]["w"] - 2, rtol=1e-6)


def test_a_rebuilt_rule_hits_the_cache():
    @functools.partial(quick_jit, static_argnums=0)
    @chex.assert_max_traces(n=1)
    def step(rule, params, state):
        return rule.apply(params, state, params)

    for _ in range(3):
        rule = jr.freeze(jr.partition({"x": jr.sgd(0.1), "y": jr.adamw()}, {"x": ["**/w"]}), "head")
        step(rule, PARAMS, rule.init(PARAMS))


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer.update(model)
# ---------------------------------------------------------------------------------------------------------------------

X, Y = normal(8, 4), normal(8, 2)


def mlp_loss(model, x, y):
    return mean_squared_error(model.forward(x), y)


def trained(model: Any, opt: jr.Optimizer, steps: int = 4) -> dict[str, np.ndarray]:
    for _ in range(steps):
        model.cleargrads()
        jr.backward(mlp_loss, model, X, Y)
        opt.update(model)
    return {name: np.array(p.data) for name, p in model.params().items()}


def by_hand(rule: jr.Rule, steps: int = 4) -> dict[str, np.ndarray]:
    """The same training with the rule alone, on a plain tree."""
    model = MLP([4, 3, 2])
    params = {name: p.data for name, p in model.params().items()}
    state = rule.init(params)
    for _ in range(steps):
        for name, p in model.params().items():
            p.data = params[name]
        model.cleargrads()
        jr.backward(mlp_loss, model, X, Y)
        params, state = rule.apply({name: p.grad for name, p in model.params().items()}, state, params)
    return params


@pytest.mark.parametrize(
    "rule",
    [
        jr.partition({"w": jr.sgd(0.1, momentum=0.9), "rest": jr.adamw(0.1)}, {"w": "*.w"}),
        jr.freeze(jr.adamw(0.1), "linear[0].*"),
        jr.accumulate(jr.freeze(jr.adamw(0.1, where="*.w"), "linear[0].b"), 2),
        jr.partition({"w": jr.accumulate(jr.sgd(0.1), 2), "rest": jr.average(jr.adamw(0.1))}, {"w": "*.w"}),
        jr.chain(jr.masked(jr.clip_grad(0.1), "*.w"), jr.adamw(0.1), jr.scale_by_path({"linear[1].*": 0.5})),
    ],
    ids=repr,
)
def test_models_of_parameters(rule):
    chex.assert_trees_all_close(trained(MLP([4, 3, 2]), jr.Optimizer(rule)), by_hand(rule), rtol=1e-5, atol=1e-6)


def test_frozen_parameters_of_a_model_stay_to_the_bit():
    model = MLP([4, 3, 2])
    before = {name: np.array(p.data) for name, p in model.params().items()}
    after = trained(model, jr.Optimizer(jr.freeze(jr.adamw(0.1, weight_decay=0.5), "linear[0].*")))
    same = {name for name in before if np.array_equal(before[name], after[name])}
    assert same == {"linear[0].w", "linear[0].b"}


def test_patterns_for_parameters_that_have_no_gradient_yet():
    """The first forward step of an LSTM has no h, so the weights that multiply it get no gradient."""
    model = LSTM(4, 3, 2)
    rule = jr.partition({"recurrent": jr.sgd(0.1, momentum=0.9), "rest": jr.adamw(0.1)}, {"recurrent": "lstm.h2*.w"})
    opt = jr.Optimizer(jr.freeze(rule, "lstm.h2f.w"))
    before = {name: np.array(p.data) for name, p in model.params().items()}

    def loss_fn(model, state, x, y):
        model.state = state
        return mean_squared_error(model.forward(x), y), model.state

    changed = []
    for _ in range(2):
        model.cleargrads()
        _, model.state = jr.backward(loss_fn, model, model.state, X, Y, has_aux=True)
        opt.update(model)
        changed.append({name for name, p in model.params().items() if not np.array_equal(before[name], p.data)})
    assert not any("h2" in name for name in changed[0])
    assert {name for name in changed[1] if "h2" in name} == {"lstm.h2i.w", "lstm.h2o.w", "lstm.h2u.w"}
    assert {name for name in opt.state_dict(model) if "recurrent" in name and ".v." in name} == {
        f"rule.recurrent.velocity.v.lstm.h2{k}.w" for k in "iou"
    }


def test_a_pattern_selects_the_parameters_of_this_name_in_every_model():
    one, other = (Bag({"w": jr.Parameter([1.0]), "b": jr.Parameter([1.0])}) for _ in range(2))
    opt = jr.Optimizer(jr.partition({"w": jr.sgd(0.5), "rest": jr.sgd(0.25)}, {"w": "w"}))
    for model in (one, other, one):
        for p in model.params().values():
            p.grad = jnp.ones(1)
        opt.update(model)
    assert [float(p.data[0]) for p in one.params().values()] == [0.0, 0.5]
    assert [float(p.data[0]) for p in other.params().values()] == [0.5, 0.75]


def test_a_frozen_name_is_frozen_in_every_model():
    one, other = (Bag({"w": jr.Parameter([1.0]), "b": jr.Parameter([1.0])}) for _ in range(2))
    opt = jr.Optimizer(jr.freeze(jr.adamw(0.5), "b"))
    for model in (one, other):
        for p in model.params().values():
            p.grad = jnp.ones(1)
        opt.update(model)
        assert model.params()["b"].data[0] == 1.0
        assert model.params()["w"].data[0] < 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Every wrapper inside a group
# ---------------------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[], jr.Rule]] = {
    row.name: row.make for row in wrappers.ROWS if row.rate is not None and not row.extra
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_wrapper_of_an_optimizer_fits_into_a_group(name):
    rule = OPTIMIZERS[name]()
    params = {"mine": {"b": normal(3), "w": normal(2, 3)}, "other": normal(4)}
    whole = jr.partition({"mine": rule, "other": jr.sgd(0.1)}, {"mine": "mine/**"})
    own, own_state, state = params["mine"], rule.init(params["mine"]), whole.init(params)
    for _ in range(6):
        params, state = stepped(whole, params, state, params)
        own, own_state = stepped(rule, own, own_state, own)
    chex.assert_trees_all_close(params["mine"], own, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.tree.leaves(state["mine"]), jax.tree.leaves(own_state))
