"""Rules with a norm for each array: what references and oracles do not tell."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_rules as jr
from jaxopt_rules.rules.novograd import NovogradState

PARAMS = {"w": jnp.array([[3.0, 4.0]]), "b": jnp.array([6.0, 8.0])}
GRADS = {"w": jnp.array([[0.6, 0.8]]), "b": jnp.array([0.3, 0.4])}


def once(rule, grads=GRADS, params=PARAMS):
    return rule.update(grads, rule.init(params), params)[0]


def test_lamb_gives_a_direction_the_norm_of_its_parameters():
    d = once(jr.lamb_direction(weight_decay=0.1, where="w", trust_where="w"))
    np.testing.assert_allclose(jnp.linalg.norm(d["w"]), 5, rtol=1e-6)
    np.testing.assert_allclose(d["b"], once(jr.adam_direction(eps=1e-6))["b"], rtol=1e-6)


def test_decay_inside_has_no_peak():
    for make in (jr.lamb, jr.novograd, jr.stable_adamw):
        with pytest.raises(ValueError, match="peak is for decay="):
            make(0.1, weight_decay=0.1, peak=0.1)


@pytest.mark.parametrize("make", [jr.lamb, jr.novograd, jr.stable_adamw])
def test_decay_acts_where_it_is_granted(make):
    """Of either kind, and on nothing else."""
    without = once(make(0.1, weight_decay=None))
    for decay in ("inside", "decoupled", "l2"):
        updates = once(make(0.1, weight_decay=5.0, where="w", decay=decay))
        np.testing.assert_allclose(updates["b"], without["b"], rtol=1e-6)
    assert not np.allclose(once(make(0.1, weight_decay=5.0))["w"], once(make(0.1, weight_decay=5.0, decay="l2"))["w"])


def test_lars_leaves_out_what_it_is_told_to():
    updates = once(jr.lars(0.1, 0.5, "w", trust_coefficient=0.02, trust_where="w"))
    # ‖θ‖ = 5 and ‖g‖ = 1: r = 0.02 · 5 / (1 + 0.5 · 5)
    np.testing.assert_allclose(updates["w"], -0.1 * 0.1 / 3.5 * (GRADS["w"] + 0.5 * PARAMS["w"]), rtol=1e-6)
    np.testing.assert_allclose(updates["b"], -0.1 * GRADS["b"], rtol=1e-6)


def test_where_the_rate_of_lars_stands():
    """After it was halved, the whole velocity makes half a step "outside"; "inside" what is old keeps its rate."""

    def second(rate):
        rule = jr.lars(0.1, momentum=1.0, rate=rate)
        first, state = rule.update(GRADS, rule.init(PARAMS), PARAMS)
        updates, _ = rule.update(GRADS, jr.set_hyperparams(state, learning_rate=0.05), PARAMS)
        return float(updates["w"][0, 0] / first["w"][0, 0])

    assert second("outside") == pytest.approx(1)
    assert second("inside") == pytest.approx(1.5)


def test_larc_never_steps_farther_than_the_rate():
    small = jax.tree.map(lambda g: 1e-6 * g, GRADS)
    plain, clipped = once(jr.lars(0.1), small), once(jr.lars(0.1, trust_clip=True), small)
    np.testing.assert_allclose(clipped["w"], -0.1 * small["w"], rtol=1e-6)
    assert jnp.linalg.norm(plain["w"]) > 1e3 * jnp.linalg.norm(clipped["w"])
    assert np.isfinite(once(jr.lars(0.0, trust_clip=True))["w"]).all()


def test_lars_names_its_choices():
    with pytest.raises(ValueError, match='lars: denominator is "sum" or "joint", not \'product\''):
        jr.lars_direction(denominator="product")
    with pytest.raises(ValueError, match='lars: rate is "inside" or "outside", not \'beside\''):
        jr.lars(0.1, rate="beside")
    with pytest.raises(ValueError, match="trust_coefficient must be at least 0"):
        jr.lars(0.1, trust_coefficient=-1)


def test_novograd_keeps_a_number_for_each_array():
    rule = jr.novograd(0.1)
    params = {"w": jnp.ones((100, 100)), "s": jnp.ones((), jnp.bfloat16), "c": jnp.ones(3, jnp.complex64)}
    state = jr.find(rule.init(params), NovogradState)
    assert {key: (v.shape, v.dtype) for key, v in state.v.items()} == dict.fromkeys(params, ((), jnp.float32))


def test_novograd_begins_with_the_first_gradient_that_is_not_zero():
    rule = jr.novograd_direction(eps=0.0)
    state = rule.init(PARAMS)
    zero, state = rule.update(jax.tree.map(jnp.zeros_like, GRADS), state, PARAMS)
    np.testing.assert_array_equal(zero["w"], 0)
    d, _ = rule.update(GRADS, state, PARAMS)
    np.testing.assert_allclose(d["w"], GRADS["w"], rtol=1e-6)  # of norm 1


def test_stable_adamw_takes_small_steps_along_a_gradient_that_grew():
    rule = jr.stable_adamw_direction(b1=0.0)
    adam = jr.adam_direction(b1=0.0, b2=0.99)
    large = jax.tree.map(lambda g: 100 * g, GRADS)
    states = rule.init(PARAMS), adam.init(PARAMS)
    for _ in range(20):
        states = rule.update(GRADS, states[0], PARAMS)[1], adam.update(GRADS, states[1], PARAMS)[1]
    d, ordinary = rule.update(large, states[0], PARAMS)[0]["w"], adam.update(large, states[1], PARAMS)[0]["w"]
    assert jnp.max(jnp.abs(ordinary)) > 4
    np.testing.assert_allclose(d, jnp.ones_like(d), rtol=1e-4)
