"""The forms of weight decay: what each does, and which settings belong to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit

import jaxopt_rules as jr

MODES = ["decoupled", "independent", "corrected", "cautious", "initial"]
PARAMS = {"w": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array([3.0])}
D = {"w": jnp.array([0.1, 0.2, -0.3]), "b": jnp.array([1.0])}
every_mode = pytest.mark.parametrize("mode", MODES)


def once(rule, d=D, params=PARAMS):
    return rule.update(d, rule.init(params), params)[0]


@every_mode
def test_where_selects_the_leaves_that_decay(mode):
    rule = jr.step(0.1, 0.5, where="w", decay=mode)
    state = rule.init(jax.tree.map(lambda p: p + 1, PARAMS))
    updates, _ = rule.update(D, state, PARAMS)
    np.testing.assert_allclose(updates["b"], -0.1 * D["b"], rtol=1e-6)
    assert not np.allclose(updates["w"], -0.1 * D["w"])


@every_mode
def test_a_live_rate_of_zero_is_no_decay(mode):
    rule = jr.step(0.1, 0.5, decay=mode)
    state = jr.set_hyperparams(rule.init(jax.tree.map(jnp.zeros_like, PARAMS)), weight_decay=0.0)
    updates, _ = rule.update(D, state, PARAMS)
    np.testing.assert_allclose(updates["w"], -0.1 * D["w"], rtol=1e-6)


def test_what_a_falling_learning_rate_makes_of_decay():
    """At the peak "decoupled" and "corrected" agree; at half of it decay falls to 1/2, 1/2, 1/4 of what it was."""
    zero = jax.tree.map(jnp.zeros_like, D)
    for mode, at_peak, at_half in [("decoupled", 0.05, 0.5), ("independent", 0.5, 0.5), ("corrected", 0.05, 0.25)]:
        rule = jr.step(0.1, 0.5, decay=mode)
        state = rule.init(PARAMS)
        full, _ = rule.update(zero, state, PARAMS)
        half, _ = rule.update(zero, jr.set_hyperparams(state, learning_rate=0.05), PARAMS)
        np.testing.assert_allclose(full["w"], -at_peak * PARAMS["w"], rtol=1e-6)
        np.testing.assert_allclose(half["w"], at_half * full["w"], rtol=1e-6)


def test_the_peak_of_a_schedule_is_given():
    schedule = jr.Warmup(jr.Cosine(0.1, 10), 2)
    for mode in ("independent", "corrected"):
        with pytest.raises(ValueError, match=rf'step: decay="{mode}" with a schedule needs its largest rate: peak='):
            jr.step(schedule, 0.5, decay=mode)
        rule = jr.step(schedule, 0.5, decay=mode, peak=0.1)
        assert np.isfinite(once(rule)["w"]).all()
        np.testing.assert_allclose(jr.hyperparams(rule.init(PARAMS))["peak"], 0.1)


def test_cautious_decay_leaves_alone_what_moves_away_from_zero():
    updates = once(jr.step(0.1, 0.5, decay="cautious"))
    np.testing.assert_allclose(updates["w"] + 0.1 * D["w"], [-0.05, 0, 0], atol=1e-8)
    still = once(jr.step(0.1, 0.5, decay="cautious"), jax.tree.map(jnp.zeros_like, D))
    np.testing.assert_allclose(still["w"], -0.05 * PARAMS["w"], rtol=1e-6)


def test_cautious_decay_of_complex_parameters():
    p, d = jnp.array([1 + 1j, 1 + 1j]), jnp.array([2 - 1j, -2 + 1j])
    updates = once(jr.step(0.1, 0.5, decay="cautious"), d, p)
    np.testing.assert_allclose(updates + 0.1 * d, [-0.05 - 0.05j, 0], atol=1e-7)


def test_decay_towards_the_initial_parameters():
    rule = jr.step(0.1, 0.5, decay="initial")
    start = {key: p.astype(jnp.bfloat16) for key, p in PARAMS.items()}
    state = rule.init(start)
    assert state.start["w"].dtype == jnp.float32
    zero = jax.tree.map(jnp.zeros_like, D)
    np.testing.assert_array_equal(rule.update(zero, state, start)[0]["w"], 0)
    moved = jax.tree.map(lambda p: p + 1, PARAMS)
    updates, after = rule.update(zero, state, moved)
    np.testing.assert_allclose(updates["w"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(after.start["w"], state.start["w"])


def test_initial_parameters_are_no_alias():
    rule = jr.step(0.1, 0.5, decay="initial")
    step = quick_jit(lambda params, state: rule.apply(D, state, params), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.array, PARAMS)
    params, state = step(params, rule.init(params))
    params, state = step(params, state)
    np.testing.assert_array_equal(state.start["w"], PARAMS["w"])


def test_l2_stands_in_front():
    rule = jr.adamw(0.1, weight_decay=0.5, where="w", decay="l2")
    chained = jr.chain(jr.weight_decay(0.5, "w"), jr.adam(0.1))
    for key, update in once(rule).items():
        np.testing.assert_array_equal(update, once(chained)[key])
    assert repr(rule) == "adamw(0.1, weight_decay=0.5, where='w', decay='l2')"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: jr.step(0.1, 0.5, decay="l2"),
            r"stands in front of the direction: chain\(weight_decay\(rate\), direc",
        ),
        (lambda: jr.step(0.1, 0.5, decay="L2"), "decay is one of 'decoupled', .*'initial', not 'L2'"),
        (lambda: jr.step(0.1, decay="cautious"), 'decay="cautious" needs weight_decay='),
        (lambda: jr.step(0.1, 0.5, peak=0.1), 'peak is for decay="independent" and "corrected", not for \'decoupled\''),
        (lambda: jr.step(0.0, 0.5, decay="corrected"), "peak must be greater than 0, not 0.0"),
        (lambda: jr.adamw(decay="l2", peak=0.1), "peak is for decay="),
        (
            lambda: jr.adamw(decay="cautious", bias_correction="step"),
            'bias_correction="step" has decoupled decay alone',
        ),
    ],
)
def test_rejected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_explains_decay():
    table = jr.explain(jr.adamw(0.1, weight_decay=0.5, where="w", decay="cautious"), PARAMS)
    assert [bool(row.decay) for row in table.rows] == [False, True]
