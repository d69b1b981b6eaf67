"""Live hyperparameters, recorded values, and names of leaves."""

import collections
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_rules as jr
from jaxopt_rules.hyperparameters import Scheduled
from jaxopt_rules.state import leaf_names

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}


def test_hyperparams_have_bare_names_where_these_are_unique():
    state = jr.chain(jr.clip_grad(2.0), jr.adamw(1e-3, b2=0.9999)).init(PARAMS)
    found = jr.hyperparams(state)
    assert set(found) == {"max_norm", "b1", "b2", "eps", "learning_rate", "weight_decay"}
    np.testing.assert_allclose(found["b2"], 0.9999, rtol=1e-7)
    # 1 − b2 keeps its digits: float32 1 − 0.9999 is off by 2e-4.
    np.testing.assert_allclose(state[1][0].hyper["one_minus_b2"], 1e-4, rtol=1e-7)


@pytest.mark.parametrize(
    ("rule", "names"),
    [
        (
            jr.chain(jr.weight_decay(0.1), jr.adamw()),
            {"weight_decay.weight_decay", "step.weight_decay"},
        ),
        (
            jr.chain(first=jr.weight_decay(0.1), second=jr.weight_decay(0.2), third=jr.sgd(0.1)),
            {"first.weight_decay", "second.weight_decay"},
        ),
        (
            jr.chain(jr.weight_decay(0.1), jr.chain(a=jr.weight_decay(0.2), s=jr.sgd(0.1))),
            {"weight_decay.weight_decay", "a.weight_decay.weight_decay"},
        ),
        (
            jr.chain(jr.weight_decay(0.1), jr.weight_decay(0.2), jr.sgd(0.1)),
            {"0.weight_decay.weight_decay", "1.weight_decay.weight_decay"},
        ),
    ],
)
def test_and_labels_where_they_are_not(rule, names):
    state = rule.init(PARAMS)
    found = jr.hyperparams(state)
    assert {name for name in found if name.endswith("weight_decay")} == names
    for i, name in enumerate(sorted(names)):
        state = jr.set_hyperparams(state, **{name: 0.5 + i})
        assert jr.hyperparams(state)[name] == 0.5 + i


def test_set_hyperparams_keeps_dtype_and_shape_and_sees_traced_values():
    rule = jr.adamw()
    state = rule.init(PARAMS)
    new = jr.set_hyperparams(state, learning_rate=1, b2=np.float64(0.9999), weight_decay=jnp.bfloat16(0.5))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new)
    assert not any(x.weak_type for x in jax.tree.leaves(new))
    np.testing.assert_allclose(new[0].hyper["one_minus_b2"], 1e-4, rtol=1e-6)

    @jax.jit
    def trained(rate):
        return rule.apply(PARAMS, jr.set_hyperparams(state, learning_rate=rate), PARAMS)[0]["b"][0]

    assert trained(0.5) < trained(0.1) < 1


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"lr": 0.1}, KeyError, "no hyperparameter 'lr'; it has b1, b2, eps, learning_rate"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be at least 0, not -1.0"),
        ({"learning_rate": float("nan")}, ValueError, "must be at least 0, not nan"),
        ({"b1": 1.0}, ValueError, r"b1 must lie in \[0, 1\)"),
        ({"b1": jnp.ones(2)}, ValueError, r"b1 must be a scalar, not an array of shape \(2,\)"),
        ({"b1": "0.9"}, TypeError, "b1 must be a number"),
        ({"b1": None}, TypeError, "b1 must be a number"),
        ({"eps": jr.Constant(1.0)}, TypeError, "eps is set to a number; a schedule is given when the rule is made"),
    ],
)
def test_set_hyperparams_refuses(values, error, message):
    with pytest.raises(error, match=message):
        jr.set_hyperparams(jr.adam().init(PARAMS), **values)


def test_a_name_that_a_schedule_owns():
    rule = jr.adamw(jr.Linear(0.4, 4), weight_decay=jr.Constant(0.1))
    state = rule.init(PARAMS)
    assert jr.hyperparams(state)["learning_rate"] == np.float32(0.4)
    assert isinstance(state[1].hyper["learning_rate"], Scheduled)
    with pytest.raises(ValueError, match="learning_rate is owned by a schedule"):
        jr.set_hyperparams(state, learning_rate=0.1)
    for expected in (0.4, 0.3, 0.2):
        _, state = rule.update(PARAMS, state, PARAMS)
        np.testing.assert_allclose(jr.metrics(state)["learning_rate"], expected, rtol=1e-6)


def test_every_number_may_be_a_schedule():
    falling = jr.Linear(0.5, 10)
    scheduled = jr.chain(
        jr.clip_grad(falling),
        jr.weight_decay(falling),
        jr.adam_direction(falling, falling, falling),
        jr.step(falling, falling),
    )
    by_hand = jr.chain(jr.clip_grad(0), jr.weight_decay(0), jr.adam_direction(0, 0, 0), jr.step(0, 0))
    state, other = scheduled.init(PARAMS), by_hand.init(PARAMS)
    for count in range(3):
        other = jr.set_hyperparams(other, **dict.fromkeys(jr.hyperparams(other), falling(count)))
        updates, state = scheduled.update(PARAMS, state, PARAMS)
        expected, other = by_hand.update(PARAMS, other, PARAMS)
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    assert jr.hyperparams(state) == jr.hyperparams(other)


def test_a_population_with_a_rate_each():
    rule = jr.sgd(0.1)
    state = jax.vmap(lambda rate: jr.set_hyperparams(rule.init(PARAMS), learning_rate=rate))(jnp.arange(3.0))
    new = jr.set_hyperparams(state, learning_rate=jnp.ones(3))
    assert (new.hyper["learning_rate"] == 1).all()
    with pytest.raises(ValueError, match=r"learning_rate has shape \(3,\) in this state, not \(\)"):
        jr.set_hyperparams(state, learning_rate=1.0)
    with pytest.raises(ValueError, match="learning_rate must be at least 0"):
        jr.set_hyperparams(state, learning_rate=jnp.array([0.1, -1.0, 0.1]))


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        (lambda count: jnp.ones(3), ValueError, r"learning_rate must be a scalar, not an array of shape \(3,\)"),
        (lambda count: -1.0, ValueError, "learning_rate must be at least 0, not -1.0"),
        (lambda count: True, TypeError, "learning_rate must be a number"),
        (lambda count: jnp.nan, ValueError, "learning_rate must be at least 0, not nan"),
    ],
)
def test_what_a_schedule_gives_is_checked(schedule, error, message):
    with pytest.raises(error, match=message):
        jr.sgd(schedule).init(PARAMS)


def test_a_schedule_shares_no_array_with_the_state():
    held = jnp.float32(0.1)
    rule = jr.sgd(lambda count: held)
    _, state = rule.update(PARAMS, rule.init(PARAMS))
    assert state.hyper["learning_rate"].value.unsafe_buffer_pointer() != held.unsafe_buffer_pointer()


def test_states_in_other_mappings():
    mapping = types.MappingProxyType({"opt": jr.sgd(0.1).init(PARAMS)})
    ordered = collections.OrderedDict(mapping)
    default = collections.defaultdict(list, mapping)
    for state in (mapping, ordered, default):
        new = jr.set_hyperparams(state, learning_rate=0.5)
        assert type(new) is type(state)
        assert jr.hyperparams(new)["learning_rate"] == 0.5
        assert jr.hyperparams(state)["learning_rate"] == np.float32(0.1)


def test_new_values_compile_nothing_where_arrays_are_committed_to_a_device():
    device = jax.devices()[1]
    params = jax.device_put(PARAMS, device)
    rule = jr.adamw()
    state = rule.init(params)
    step = jax.jit(lambda params, state: rule.apply(params, state, params))
    params, state = step(params, state)
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(state))
    for values in ({"learning_rate": 0.5}, {"b1": 0.5}, {"b1": 0.1, "eps": 1e-3}):
        params, state = step(params, jr.set_hyperparams(state, **values))
    assert step._cache_size() == 1


def test_metrics_in_a_scan():
    rule = jr.chain(jr.clip_grad(1.0), jr.sgd(jr.Linear(0.1, 3)))

    def body(carry, g):
        params, state = rule.apply(g, carry[1], carry[0])
        return (params, state), jr.metrics(state)

    grads = jax.tree.map(lambda p: jnp.stack([p, 2 * p, 3 * p]), PARAMS)
    _, recorded = jax.lax.scan(body, (PARAMS, rule.init(PARAMS)), grads)
    np.testing.assert_allclose(recorded["grad_norm"], 3 * np.arange(1, 4), rtol=1e-6)
    np.testing.assert_allclose(recorded["learning_rate"], [0.1, 0.2 / 3, 0.1 / 3], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_norms_accumulate_in_float32(dtype):
    """A float16 tree of norm 1200, whose square overflows, and one of 1e-4, whose squares vanish."""
    rule = jr.clip_grad(1.0)
    for size, norm in ((12.0, 1200.0), (1e-6, 1e-4)):
        grads = {"w": jnp.full((100, 100), size, dtype)}
        _, state = rule.update(grads, rule.init(grads))
        exact = float(jnp.float32(grads["w"][0, 0])) * 100
        np.testing.assert_allclose(jr.metrics(state)["grad_norm"], exact, rtol=1e-5)
        np.testing.assert_allclose(exact, norm, rtol=0.2)


def test_clipping_leaves_absent_gradients_out_of_the_norm_and_propagates_what_is_not_finite():
    rule = jr.clip_grad(1.0)
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    _, state = rule.update(grads, rule.init(grads))
    assert jr.metrics(state)["grad_norm"] == 5
    _, state = rule.update({"a": jnp.array([3.0]), "b": None}, state)
    assert jr.metrics(state)["grad_norm"] == 3
    out, _ = rule.update({"a": jnp.array([jnp.inf]), "b": jnp.array([4.0])}, state)
    assert jnp.isnan(out["a"]).all()
    assert (out["b"] == 0).all()
    out, _ = rule.update({"a": jnp.array([jnp.nan]), "b": jnp.array([4.0])}, state)
    assert jnp.isnan(out["b"]).all()


def test_clipping_adds_its_epsilon_to_the_norm():
    """Where it is seen in float32: a norm of 1e-5, and one of exactly max_norm."""
    for size, max_norm in ((1e-5, 1e-6), (1e-3, 1e-3)):
        rule, g = jr.clip_grad(max_norm), jnp.array([size])
        out, _ = rule.update(g, rule.init(g))
        np.testing.assert_allclose(out, size * max_norm / (size + 1e-6), rtol=1e-6)


def test_leaf_names_do_not_move_when_a_hook_is_put_in_front():
    plain = jr.adamw()
    clipped = jr.chain(jr.clip_grad(1.0), plain)
    before, after = (leaf_names(rule.init(PARAMS)) for rule in (plain, clipped))
    assert set(before) < set(after)
    assert {"adam.m.w", "adam.v.b", "adam.count", "step.hyper.learning_rate"} <= set(before)
    assert "clip.metrics.grad_norm" in after
    twice = leaf_names(jr.chain(jr.weight_decay(0.1), jr.weight_decay(0.1), jr.sgd(0.1)).init(PARAMS))
    assert {"weight_decay.count", "weight_decay#2.count"} <= set(twice)
    assert len(set(twice)) == len(twice)
