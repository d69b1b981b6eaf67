"""What the table cannot show of gradient descent, the sign rules, Adagrad, Adadelta, RMSProp and Rprop."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_rules as jr

PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([0.25, -4.0])}


def gradients(steps):
    rng = np.random.default_rng(0)
    return [
        {key: jnp.asarray(rng.normal(size=p.shape), jnp.float32) for key, p in PARAMS.items()} for _ in range(steps)
    ]


def trained(rule, grads, params=PARAMS):
    state, step = rule.init(params), jax.jit(rule.apply)
    for g in grads:
        params, state = step(g, state, params)
    return params, state


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: jr.sgd(0.1, 0.9, form="keras"), ValueError, 'sgd: form is "pytorch", "tensorflow" or "ema", not'),
        (lambda: jr.sgd(0.1, form="ema"), ValueError, 'sgd: form="ema" needs a momentum'),
        (lambda: jr.sgd(0.1, dampening=0.1), ValueError, "sgd: dampening needs a momentum"),
        (lambda: jr.sgd(0.1, 0.9, True, dampening=0.1), ValueError, "dampening is for"),
        (lambda: jr.sgd(0.1, 0.9, form="tensorflow", dampening=0.1), ValueError, "dampening is for"),
        (lambda: jr.sgd(0.1, 0.9, form="ema", dampening=0.1), ValueError, "dampening is for"),
        (lambda: jr.sgd(0.1, 0.9, dampening=1.0), ValueError, r"dampening must lie in \[0, 1\)"),
        (lambda: jr.sgd(0.1, 1.0, form="ema"), ValueError, r"momentum must lie in \[0, 1\)"),
        (
            lambda: jr.sgd(0.1, 0.9, form="tensorflow", weight_decay=0.1, decay="cautious"),
            ValueError,
            'form="tensorflow" has decay="decoupled" and decay="l2" alone',
        ),
        (lambda: jr.sgd(0.1, 0.9, form="tensorflow", weight_decay=0.1, peak=0.1), ValueError, "without peak"),
        (lambda: jr.sgd(0.1, 0.9, form="tensorflow", decay="l2"), ValueError, 'decay="l2" needs weight_decay'),
        (lambda: jr.sgd(0.1, decay="l2"), ValueError, 'decay="l2" needs weight_decay'),
        (lambda: jr.momentum_direction(form="tensorflow"), ValueError, 'form is "pytorch" or "ema", not'),
        (lambda: jr.adagrad(0.1, eps_placement="in"), ValueError, "eps_placement is"),
        (lambda: jr.adagrad(0.1, -0.1), ValueError, "initial_accumulator_value must be at least 0"),
        (lambda: jr.adagrad(0.1, lr_decay=-0.1), ValueError, "lr_decay must be at least 0"),
        (lambda: jr.adadelta(rho=1.0), ValueError, r"rho must lie in \[0, 1\)"),
        (lambda: jr.signum(0.1, 1.0), ValueError, r"beta must lie in \[0, 1\)"),
        (lambda: jr.rmsprop(0.1, nesterov=True), ValueError, "rmsprop: nesterov=True needs a momentum"),
        (lambda: jr.rmsprop(0.1, form="keras"), ValueError, 'rmsprop: form is "pytorch", "tensorflow" or "ema", not'),
        (lambda: jr.rmsprop(0.1, decay=0.9), ValueError, "decay is a form of weight decay, not 0.9; .* is rho"),
        (lambda: jr.rmsprop(0.1, eps_placement="in"), ValueError, "eps_placement is"),
        (lambda: jr.rmsprop(0.1, initial_scale=-1.0), ValueError, "initial_scale must be at least 0"),
        (lambda: jr.rmsprop(0.1, initial_scale=jr.Constant(1.0)), TypeError, "initial_scale is a number"),
        (lambda: jax.jit(lambda x: jr.rmsprop(0.1, initial_scale=x).init(PARAMS))(1.0), TypeError, "and not traced"),
        (lambda: jr.rprop(0.1, eta_plus=-1.0), ValueError, "eta_plus must be at least 0"),
        (lambda: jr.rprop(0.1, eta_minus=-1.0), ValueError, "eta_minus must be at least 0"),
        (lambda: jr.rprop(0.1, min_step_size=-1.0), ValueError, "min_step_size must be at least 0"),
        (lambda: jr.rprop(0.1, max_step_size=-1.0), ValueError, "max_step_size must be at least 0"),
    ],
)
def test_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_forms_of_momentum_are_one_at_a_constant_rate(nesterov):
    pytorch, _ = trained(jr.sgd(0.1, 0.75, nesterov), gradients(20))
    tensorflow, _ = trained(jr.sgd(0.1, 0.75, nesterov, form="tensorflow"), gradients(20))
    ema, _ = trained(jr.sgd(0.4, 0.75, nesterov, form="ema"), gradients(20))
    chex.assert_trees_all_close(pytorch, tensorflow, rtol=1e-5)
    chex.assert_trees_all_close(pytorch, ema, rtol=1e-5)


def test_the_documented_momentum_is_the_form_of_tensorflow():
    rate = jr.Linear(0.1, 10)
    documented, _ = trained(jr.momentum(rate, 0.9), gradients(20))
    chex.assert_trees_all_equal(documented, trained(jr.sgd(rate, 0.9, form="tensorflow"), gradients(20))[0])


@pytest.mark.parametrize("momentum", [0.9, None])
def test_decay_acts_where_it_is_told_to(momentum):
    form = "tensorflow" if momentum else "pytorch"
    rule = jr.sgd(0.1, momentum, form=form, weight_decay=0.5, where="w")
    params, _ = trained(rule, [jax.tree.map(jnp.zeros_like, PARAMS)])
    np.testing.assert_allclose(params["w"], 0.95 * PARAMS["w"], rtol=1e-6)
    np.testing.assert_array_equal(params["b"], PARAMS["b"])


@pytest.mark.parametrize(
    ("rule", "slots"),
    [
        (jr.sgd(0.1, 0.9, form="ema"), 4),
        (jr.sgd(0.1, 0.9, form="tensorflow"), 4),
        (jr.signum(0.1), 4),
        (jr.adagrad(0.1), 4),
        (jr.adadelta(), 8),
        (jr.rmsprop(0.1), 4),
        (jr.rmsprop(0.1, centered=True, momentum=0.9), 12),
        (jr.rprop(0.1), 5),
    ],
    ids=repr,
)
def test_bytes_per_parameter(rule, slots):
    state = rule.init(PARAMS)
    arrays = [x for x in jax.tree.leaves(state) if x.ndim]
    assert sum(x.nbytes for x in arrays) == slots * sum(p.size for p in PARAMS.values())


def test_noise_has_the_variance_of_the_law():
    """σ² = η / (1 + count)^γ, for as many parameters as make the estimate precise."""
    rule, params = jr.noisy_sgd(0.5, eta=0.3, gamma=0.8, key=7), {"w": jnp.zeros(200_000)}
    grads, state = {"w": jnp.full(200_000, 2.0)}, rule.init(params)
    for count in range(3):
        updates, state = jax.jit(rule.update)(grads, state, params)
        noise = updates["w"] / -0.5 - 2
        np.testing.assert_allclose(noise.mean(), 0, atol=0.01)
        np.testing.assert_allclose(noise.var(), 0.3 / (1 + count) ** 0.8, rtol=0.02)


@pytest.mark.oracle
@pytest.mark.x64
def test_noise_has_the_variance_of_optax():
    import optax

    params = {"w": jnp.zeros(200_000)}
    ours, theirs = jr.noisy_sgd(0.5), optax.noisy_sgd(0.5, key=0)
    our_state, their_state = ours.init(params), theirs.init(params)
    for _ in range(3):
        our_updates, our_state = ours.update(params, our_state, params)
        their_updates, their_state = theirs.update(params, their_state, params)
        np.testing.assert_allclose(our_updates["w"].var(), their_updates["w"].var(), rtol=0.03)


def test_what_the_sum_of_adagrad_begins_with_can_be_set():
    rule, grads = jr.adagrad(0.1, 0.0), gradients(3)
    _, state = trained(rule, grads[:2])
    state = jr.set_hyperparams(state, initial_accumulator_value=4.0)
    updates, _ = rule.update(grads[2], state, PARAMS)
    total = 4 + sum(g["w"] ** 2 for g in grads)
    np.testing.assert_allclose(updates["w"], -0.1 * grads[2]["w"] / np.sqrt(total), rtol=1e-5)


def test_a_variance_that_is_small_beside_the_mean_keeps_its_digits():
    """Gradients of 1000 ± 0.01: v − |m|², of 1e6, is nothing but rounding in float32, and often negative."""
    rule, error = jr.rmsprop_direction(0.9, 0.0, centered=True), []
    params = {"w": jnp.zeros(50)}
    state, mean, square = rule.init(params), 0.0, 0.0
    rng = np.random.default_rng(0)
    for _ in range(300):
        g = np.float32(1000 + 0.01 * rng.normal(size=50))
        updates, state = jax.jit(rule.update)({"w": jnp.asarray(g)}, state, params)
        exact = g.astype(np.float64)
        square = 0.9 * square + 0.1 * exact**2
        mean = 0.9 * mean + 0.1 * exact
        error.append(np.abs(updates["w"] * np.sqrt(square - mean**2) / exact - 1).max())
    assert max(error) < 0.02  # of which the rounding of m to 24 bits, 6e-5 beside 0.01, is the cause


def test_what_rmsprop_is_born_with_is_no_hyperparameter():
    state = jr.rmsprop(0.1, initial_scale=1.0).init(PARAMS)
    assert jr.hyperparams(state).keys() == {"learning_rate", "rho", "eps"}
    assert all((x == 1).all() for x in jax.tree.leaves(state[0].v))
    narrow = jr.rmsprop_direction(initial_scale=jnp.float32(1)).init({"w": jnp.ones(2, jnp.bfloat16)})
    assert narrow.v["w"].dtype == jnp.float32


def sizes(rule, signs):
    """The steps of a parameter under gradients of these signs."""
    params = {"w": jnp.zeros(())}
    state, out = rule.init(params), []
    for sign in signs:
        updates, state = rule.update({"w": jnp.float32(sign)}, state, params)
        out.append(float(updates["w"]))
    return out


def test_rprop_turns_back_without_a_step():
    steps = sizes(jr.rprop(0.1), [3, 1e-30, 2, -1, -1, -5, 0, -1])
    np.testing.assert_allclose(steps, [-0.1, -0.12, -0.144, 0, 0.072, 0.0864, 0, 0.0864], rtol=1e-6, atol=0)


def test_the_rate_of_rprop_is_live_and_may_leave_the_bounds():
    rates = jnp.array([0.0, 0.1, 0.1, 4.0, 4.0, 0.1, 0.0, 0.1])
    rule = jr.rprop(lambda count: rates[count], eta_plus=2.0, max_step_size=1.0)
    # The factor doubles, but not where the step exceeds the bound already.
    assert sizes(rule, [1] * 8) == pytest.approx([0, -0.2, -0.4, -16, -16, -0.8, 0, -1], rel=1e-6)


def test_rprop_shrinks_to_its_bound_and_not_where_the_rate_is_0():
    down = [1, -1, -1, 1, 1, -1, -1]
    rule = jr.rprop(0.1, min_step_size=0.04)
    np.testing.assert_allclose(sizes(rule, down), [-0.1, 0, 0.05, 0, -0.04, 0, 0.04], rtol=1e-6)
    still = jr.rprop(lambda count: jnp.where(count < 6, 0.0, 0.1), min_step_size=0.04)
    np.testing.assert_allclose(sizes(still, down), [0, 0, 0, 0, 0, 0, 0.1], rtol=1e-6)


def test_rprop_refuses_complex_gradients():
    params = {"w": jnp.ones(2, jnp.complex64)}
    rule = jr.rprop(0.1)
    with pytest.raises(TypeError, match="Rprop compares numbers"):
        rule.update(params, rule.init(params), params)


def test_a_late_gradient_is_dampened():
    rule = jr.sgd(1.0, 0.5, dampening=0.25)
    state = rule.init(PARAMS)
    g = gradients(1)[0]
    updates, state = rule.update(g | {"b": None}, state, PARAMS)
    chex.assert_trees_all_equal(updates["w"], -g["w"])
    updates, _ = rule.update(g, state, PARAMS)
    np.testing.assert_allclose(updates["w"], -1.25 * g["w"], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], -0.75 * g["b"], rtol=1e-6)
