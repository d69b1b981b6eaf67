"""Formulas in a row: one compiled function per leaf gives what the members of a chain give one by one."""

from functools import reduce
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit

import jaxopt_rules as jr

SHAPES = {"matrix": (6, 5), "vector": (7,), "scalar": (), "empty": (0, 3), "absent": (4,)}
TANH = jr.stateless(lambda tree: jax.tree.map(jnp.tanh, tree))
ROWS = {
    "decay, clip": [jr.weight_decay(0.1), jr.clip_by_global_norm(0.5), jr.adam_direction(), jr.step(0.1, 0.2)],
    "clip twice": [jr.clip_by_global_norm(2.0), jr.weight_decay(0.3), jr.clip_by_global_norm(0.5), jr.step(0.1)],
    "centralize, clip by leaf": [jr.centralize(), jr.clip_by_leaf_norm(0.2), jr.clip_by_global_norm(0.3), jr.step(0.1)],
    "update norms": [jr.adam_direction(), jr.weight_decay(0.1), jr.trust_ratio(), jr.normalize(), jr.step(0.1)],
    "filters, block rms": [jr.zero_nonfinite(), jr.ema(0.9), jr.clip_by_block_rms(0.1), jr.step(0.1)],
    "noise": [jr.add_noise(0.1), jr.clip_by_global_norm(0.5), jr.step(0.1)],
    "units": [jr.adaptive_grad_clip(0.01), jr.stable_adamw_direction(), jr.adafactor_direction(2), jr.step(0.1)],
    "recorded": [jr.weight_decay(0.1), jr.record("size", jr.global_norm), jr.adam(), jr.record("u", jr.global_norm)],
    "one not in the row": [jr.weight_decay(0.1), TANH, jr.clip_by_leaf_norm(0.1), jr.step(0.1)],
    "by path": [jr.scale_by_path({"matrix": 0.5}), jr.clip_by_global_norm(0.5), jr.adamw(0.1, where="vector")],
}


def arrays(seed: int, dtype: Any) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: jnp.array(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()}


def numbers(state: Any) -> Any:
    def number(x: Any) -> Any:
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return jax.tree.map(number, state)


def one_by_one(rules: list[jr.Rule], grads: Any, states: list[Any], params: Any) -> tuple[Any, list[Any]]:
    def through(passed: tuple[Any, list[Any]], member: tuple[jr.Rule, Any]) -> tuple[Any, list[Any]]:
        (grads, after), (rule, state) = passed, member
        grads, state = rule.update(grads, state, params)
        return grads, [*after, state]

    updates, states = reduce(through, zip(rules, states, strict=True), (grads, []))
    return jr.apply_updates(params, updates), states


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("rules", ROWS.values(), ids=ROWS)
def test_a_row_gives_what_its_members_give_one_by_one(rules, dtype):
    chained = jr.chain(*rules)
    apply = quick_jit(lambda grads, state, params: chained.apply(grads, state, params))
    params = expected = arrays(0, dtype)
    state, states = chained.init(params), [rule.init(params) for rule in rules]
    for seed in range(1, 4):
        grads = arrays(seed, dtype) | {"absent": None}
        params, state = apply(grads, state, params)
        expected, states = one_by_one(rules, grads, states, expected)
        tolerance = 2e-6 if dtype == jnp.float32 else 2**-7
        chex.assert_trees_all_close(params, expected, rtol=tolerance, atol=tolerance)
        chex.assert_trees_all_close(numbers(state), numbers(tuple(states)), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("rules", ROWS.values(), ids=ROWS)
def test_what_is_not_finite_comes_out_alike(rules):
    chained = jr.chain(*rules)
    params = arrays(0, jnp.float32)
    for bad in (jnp.nan, jnp.inf):
        grads = arrays(1, jnp.float32)
        grads["matrix"] = grads["matrix"].at[0, 0].set(bad)
        new, _ = chained.apply(grads, chained.init(params), params)
        expected, _ = one_by_one(rules, grads, [rule.init(params) for rule in rules], params)
        chex.assert_trees_all_close(new, expected, rtol=2e-6, atol=2e-6)


def test_chains_within_chains_are_one_row():
    params = arrays(0, jnp.float32)
    nested = jr.chain(jr.chain(jr.weight_decay(0.1), jr.clip_by_global_norm(0.5)), best=jr.chain(jr.adamw()))
    state = nested.init(params)
    assert [*state] == ["0", "best"]
    assert isinstance(state["best"], tuple)
    text = jax.jit(nested.apply).lower(params, state, params).as_text()
    assert text.count("call @weight_decay_clip_adam_decoupled") == len(SHAPES)


class ScaledState(NamedTuple):
    count: Any
    hyper: Any
    metrics: Any


class SilentState(NamedTuple):
    count: Any
    hyper: Any


def _scaled(g, *, factor, size):
    return factor * size * g


def _factor(*, total, most):
    return jnp.minimum(1, most / total)


def total(grads: Any) -> Any:
    return sum(jnp.sum(jnp.abs(g)) for g in jax.tree.leaves(grads))


def size(g, *, most):
    return jnp.max(jnp.abs(g), initial=0) / most


def test_measures_are_taken_once_in_their_order_and_sums_of_each_leaf():
    rule = jr.leafwise(
        _scaled,
        ScaledState,
        measures={"total": total, "factor": _factor},
        sums={"size": size},
        metrics=("total",),
        most=2.0,
    )
    params = {"a": jnp.array([1.0, -3.0]), "b": jnp.array([4.0]), "n": jnp.array([9.0])}
    grads = params | {"n": None}
    updates, state = rule.update(grads, rule.init(params), params)
    assert jr.metrics(state) == {"total": 8.0}
    chex.assert_trees_all_close(
        updates, {"a": 0.25 * 1.5 * params["a"], "b": 0.25 * 2 * params["b"], "n": None}, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"measures": {"factor": _factor}}, "the measure factor of _scaled.* asks for total, which is not known then"),
        ({"measures": {"factor": _factor, "total": total}}, "asks for total, which is not known then"),
        ({"measures": {"total": total, "factor": _factor, "unread": total}}, "does not ask for unread"),
        ({"measures": {"factor": total}, "metrics": ("loss",)}, "loss is to be recorded and is none of its measures"),
        ({"measures": {"factor": total}, "sums": {"size": _factor}}, "the sum size of _scaled.* asks for total"),
        ({"measures": {"t": total}}, "t is given by the lift"),
    ],
    ids=range(6),
)
def test_what_measures_and_sums_ask_for_is_checked_when_the_rule_is_built(keywords, message):
    State = ScaledState if "metrics" in keywords else SilentState
    with pytest.raises(TypeError, match=message):
        jr.leafwise(_scaled, State, **{"sums": {"size": size}} | keywords, most=2.0)
