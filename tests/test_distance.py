"""What the table cannot show of Prodigy and DoG: their estimates, skipped updates, and what they refuse."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_rules as jr

TARGET = {"w": jnp.linspace(-3.0, 3.0, 12).reshape(4, 3), "b": jnp.linspace(1.0, 2.0, 4)}
START = jax.tree.map(jnp.zeros_like, TARGET)


def loss(params):
    return sum(jnp.sum(jnp.abs(x - y)) for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(TARGET), strict=True))


def trained(rule, steps, params=START):
    def body(carry, _):
        params, state = carry
        return rule.apply(jax.grad(loss)(params), state, params), None

    (params, state), _ = jax.lax.scan(body, (params, rule.init(params)), length=steps)
    return params, state


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: jr.prodigy(weight_decay=0.1, decay=cast(Any, "cautious")),
            'prodigy: decay is "decoupled" or "l2", not \'caut',
        ),
        (lambda: jr.prodigy(decay="l2"), 'prodigy: decay="l2" needs weight_decay'),
        (lambda: jr.prodigy(slice_p=0), "prodigy: slice_p must be a whole number, at least 1, not 0"),
        (lambda: jr.prodigy(slice_p=cast(Any, 2.0)), "slice_p must be a whole number"),
        (lambda: jr.prodigy(d0=0.0), "d0 must be greater than 0"),
        (lambda: jr.prodigy(growth_rate=0.0), "growth_rate must be greater than 0"),
        (lambda: jr.dog(decay="l2"), 'decay="l2" needs weight_decay'),
        (lambda: jr.dog(reps_rel=0.0), "reps_rel must be greater than 0"),
        (lambda: jr.ldog(init_eta=-1.0), "init_eta must be greater than 0"),
    ],
)
def test_what_they_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "rule", [jr.prodigy(), jr.prodigy(slice_p=5), jr.prodigy(growth_rate=1.5), jr.dog(), jr.ldog()], ids=repr
)
def test_they_leave_their_first_estimate_behind(rule):
    """From 1e-6 up to the size of what separates start and solution, without a rate to be tuned."""
    params, _ = trained(rule, 300)
    assert loss(params) < 0.2 * loss(START)


def test_the_estimate_is_recorded_and_stays_below_the_distance():
    _, state = trained(jr.prodigy(), 100)
    largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(TARGET))
    assert 0.1 < jr.metrics(state)["d"] <= largest
    assert 0 < jr.metrics(trained(jr.dog(), 100)[1])["eta"] < 1


def test_a_rate_of_zero_skips_the_update():
    """As in prodigyopt: nothing is remembered of it, and the bias correction does not count it."""
    rates = jnp.array([0.0, 0.0, 1.0, 0.0, 1.0])
    late = jr.prodigy(lambda count: rates[count], use_bias_correction=True, weight_decay=0.1)
    at_once = jr.prodigy(use_bias_correction=True, weight_decay=0.1)
    (params, state), (expected, other) = trained(late, 5), trained(at_once, 2)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    jax.tree.map(np.testing.assert_array_equal, state[2:], other[2:])
    assert state.count == 5
    assert state.taken == 2


def test_zero_gradients_at_first_skip_the_update():
    rule, zeros = jr.prodigy(weight_decay=0.1), jax.tree.map(jnp.zeros_like, TARGET)
    params, state = rule.apply(zeros, rule.init(TARGET), TARGET)
    jax.tree.map(np.testing.assert_array_equal, params, TARGET)
    assert state.taken == 0
    assert jr.metrics(state)["d"] == np.float32(1e-6)


def test_d0_can_be_set_before_training():
    """The state holds the growth of d, so that another d₀ in a newborn state is one that the rule was built with."""
    built, rule = jr.prodigy(d0=1e-3), jr.prodigy()
    grads = jax.grad(loss)(START)
    set_later = jr.set_hyperparams(rule.init(START), d0=1e-3)
    updates, state = rule.update(grads, set_later, START)
    expected, other = built.update(grads, built.init(START), START)
    jax.tree.map(np.testing.assert_array_equal, (updates, state), (expected, other))


def test_unbounded_growth_has_a_derivative():
    def end(growth_rate, d0):
        params, _ = trained(jr.prodigy(d0=d0, growth_rate=growth_rate), 5)
        return loss(params)

    assert np.isfinite(jax.grad(end, argnums=(0, 1))(jnp.inf, 1e-2)).all()
    np.testing.assert_array_equal(end(jnp.inf, 1e-2), end(None, 1e-2))


def test_slices_make_small_slots():
    state = jr.prodigy(slice_p=5).init(TARGET)
    assert (state.s["w"].shape, state.start["w"].shape) == ((3,), (3,))
    assert (state.m["w"].shape, state.v["w"].shape) == ((4, 3), (4, 3))


def test_slices_of_an_array_on_a_mesh_stay_where_they_are_born():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))
    over_x = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    rule, params = jr.prodigy(slice_p=3), {"w": jax.device_put(jnp.ones((4, 6)), over_x)}
    step = jax.jit(lambda params, state: rule.apply(params, state, params))
    state = rule.init(params)
    _, after = step(params, state)
    for slot in ("s", "start"):
        born, now = getattr(state, slot)["w"], getattr(after, slot)["w"]
        assert now.sharding.is_equivalent_to(born.sharding, 1)


def test_a_first_rate_holds_until_something_has_moved():
    rule = jr.dog(lambda count: jnp.where(count < 2, 0.0, 1.0), init_eta=0.25)
    (params, state), grads = (START, rule.init(START)), jax.grad(loss)(START)
    for _ in range(3):
        params, state = rule.apply(grads, state, params)
    jax.tree.map(lambda x, g: np.testing.assert_array_equal(x, -0.25 * g), params, grads)


def test_each_group_has_its_own_estimate():
    rule = jr.partition({"w": jr.dog(), "b": jr.dog()}, {"w": "w", "b": "b"})
    params, _ = trained(rule, 3)
    expected, _ = trained(jr.ldog(), 3)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), params, expected)


def test_the_averager_of_the_authors():
    """dog-optimizer's PolynomialDecayAverager: ā ← (1 − (γ + 1) / (γ + t)) ā + (γ + 1) / (γ + t) θ with γ = 8."""
    rule = jr.average(jr.dog(reps_rel=0.1), lambda n: n / (n + 9), debias=False)
    (params, state), mean = (START, rule.init(START)), START
    for t in range(1, 6):
        params, state = rule.apply(jax.grad(loss)(params), state, params)
        mean = jax.tree.map(lambda a, x, t=t: (1 - 9 / (8 + t)) * a + 9 / (8 + t) * x, mean, params)
    averaged = jr.eval_params(state, params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), averaged, mean)
