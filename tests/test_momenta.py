"""Rules that differ in their momenta: what references and oracles do not tell."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_rules as jr
from jaxopt_rules.rules.adopt import AdoptState

PARAMS = {"w": jnp.array([1.0, -2.0, 0.5])}
GRADS = {"w": jnp.array([0.3, -0.2, 0.0])}


def run(rule, grads, params=PARAMS):
    state = rule.init(params)
    for g in grads:
        updates, state = rule.update(g, state, params)
    return updates, state


def test_lion_does_not_move_what_has_no_gradient():
    updates, _ = run(jr.lion(0.1), [GRADS])
    np.testing.assert_array_equal(updates["w"], jnp.float32([-0.1, 0.1, 0]))


@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0), jnp.zeros(())], ids=repr)
def test_lion_has_momentum(zero):
    with pytest.raises(ValueError, match="lion: b2 must be greater than 0"):
        jr.lion(0.1, b2=zero)


def test_adan_without_decay_has_none():
    assert "weight_decay" not in jr.hyperparams(jr.adan(0.1).init(PARAMS))
    with pytest.raises(ValueError, match=r"needs weight_decay"):
        jr.adan(0.1, decay="cautious")


def test_the_first_update_of_adopt_is_decay_alone():
    updates, state = run(jr.adopt(0.1, weight_decay=0.5), [GRADS])
    np.testing.assert_allclose(updates["w"], -0.05 * PARAMS["w"], rtol=1e-6)
    np.testing.assert_array_equal(jr.find(state, AdoptState).v["w"], GRADS["w"] ** 2)


def test_adopt_of_a_gradient_that_was_zero_at_first():
    large = {"w": jnp.full(3, 1e30)}
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    for clip, size in [(0.25, 2**0.25), (None, 1e30 / 1e-6)]:
        d, _ = run(jr.adopt_direction(clip_exponent=clip, eps=1e-6), [zero, zero, large])
        np.testing.assert_allclose(d["w"], 0.1 * size, rtol=1e-6)


def test_adopt_compares_numbers_only_where_it_clips():
    params = {"w": jnp.ones(2, jnp.complex64)}
    with pytest.raises(TypeError, match="Adopt compares numbers"):
        jr.adopt(0.1).update(params, jr.adopt(0.1).init(params), params)
    rule = jr.adopt(0.1, clip_exponent=None)
    assert rule.update(params, rule.init(params), params)[0]["w"].dtype == jnp.complex64


def test_the_slow_mean_of_ademamix_ends_where_it_is_set():
    """Beyond the warm-up both forms go on alike, with the digits of 1 − β₃ near 1."""
    warm, constant = jr.ademamix_direction(b3=0.99999, warmup=1), jr.ademamix_direction(b3=0.99999)
    grads = [GRADS] * 3
    np.testing.assert_allclose(run(warm, grads)[0]["w"], run(constant, grads)[0]["w"], rtol=1e-6)
    np.testing.assert_allclose(run(warm, grads)[1].m2["w"], run(constant, grads)[1].m2["w"], rtol=1e-6)


def test_ademamix_of_a_b1_of_zero():
    """The half-life of m₂ then begins at that of no memory."""
    direction = jr.ademamix_direction(b1=0.0, b3=0.5, alpha=1.0, warmup=2)
    _, state = run(direction, [GRADS])
    np.testing.assert_allclose(state.m2["w"], (1 - 0.5**2) * GRADS["w"], rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 2.5])
def test_a_warmup_is_a_number_of_updates(warmup):
    with pytest.raises(ValueError, match="warmup must be a whole number, at least 1"):
        jr.ademamix(0.1, warmup=warmup)
