"""Of Adam's family, what the table does not show: lengths of means, silent updates, births, and what is refused."""

from decimal import Context, Decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit

import jaxopt_rules as jr
from jaxopt_rules.rules.radam import sma_length

PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.array([3.0])}
ZERO = jax.tree.map(jnp.zeros_like, PARAMS)


def scanned(rule, grads, steps, state):
    """The results of `steps` updates on the same gradients, stacked."""

    def body(state, _):
        updates, state = rule.update(grads, state, PARAMS)
        return state, updates

    return jax.lax.scan(body, state, length=steps)[1]


def run(rule, grads, steps):
    return quick_jit(lambda state: scanned(rule, grads, steps, state))(rule.init(PARAMS))


def test_the_two_names_of_eps_hat_give_the_same():
    small = jax.tree.map(lambda p: 1e-7 * p, PARAMS)
    hat = run(jr.adam(eps_placement="hat"), small, 5)
    step = run(jr.adam(bias_correction="step"), small, 5)
    outside = run(jr.adam(), small, 5)
    np.testing.assert_allclose(hat["w"], step["w"], rtol=1e-6)
    assert not np.allclose(hat["w"], outside["w"], rtol=0.1)


@pytest.mark.parametrize("corrected", [True, False], ids=["moments", "step"])
def test_adamw_takes_eps_placement_in_both_forms_of_bias_correction(corrected):
    form = {"bias_correction": "moments" if corrected else "step", "eps_placement": "max"}
    by_hand = jr.chain(jr.adam_direction(eps=0.1, **form), jr.step(1e-3))
    whole = run(jr.adamw(eps=0.1, weight_decay=0.0, **form), PARAMS, 3)
    np.testing.assert_allclose(whole["w"], run(by_hand, PARAMS, 3)["w"], rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(np.float32, 4e-7, id="float32"),
        pytest.param(np.float64, 2e-15, id="float64", marks=pytest.mark.x64),
    ],
)
def test_the_length_of_a_mean_keeps_its_digits(dtype, tolerance):
    """ρ_t against the formula of the paper in 60 digits, from where all of it cancels to where nothing does."""
    rates = [1.0, 0.5, 0.3, 0.1, 1e-2, 1e-3, 1e-4, 1e-6]
    cases = [(dtype(t), dtype(c)) for c in rates for t in (1, 2, 3, 5, 6, 7, 10, 30, 100, 1000, 10**4, 10**6)]

    def paper(t, c):
        beta, exact = 1 - Decimal(float(c)), Context(prec=60)
        power = exact.power(beta, int(t)) if beta else Decimal(0)
        vanishing = exact.divide(2 * int(t) * power, exact.subtract(1, power))
        return float(exact.subtract(exact.divide(2, 1 - beta) - 1, vanishing))

    actual = quick_jit(jax.vmap(sma_length))(*(jnp.asarray(np.array(x)) for x in zip(*cases, strict=True)))
    np.testing.assert_allclose(actual, [paper(t, c) for t, c in cases], rtol=tolerance)


def test_radam_is_silent_until_the_mean_is_long_enough():
    """With gradients that stay, m̂ is the gradient in each update and √v̂ its size."""
    skip = run(jr.radam_direction(silent="skip"), PARAMS, 7)
    sgd = run(jr.radam_direction(), PARAMS, 7)
    np.testing.assert_array_equal(skip["w"][:5], 0)
    np.testing.assert_allclose(sgd["w"][:5], np.broadcast_to(PARAMS["w"], (5, 2, 2)), rtol=1e-6)
    np.testing.assert_array_equal(sgd["w"][5:], skip["w"][5:])
    assert np.all(np.abs(skip["w"][5:]) < 0.1)
    short = run(jr.radam_direction(b2=0.6, silent="skip"), PARAMS, 30)
    np.testing.assert_array_equal(short["w"], 0)


def test_a_threshold_of_radam_below_4_is_4():
    low = run(jr.radam_direction(threshold=0.0), PARAMS, 7)
    four = run(jr.radam_direction(threshold=4.0), PARAMS, 7)
    np.testing.assert_array_equal(low["w"], four["w"])
    assert not np.array_equal(low["w"][4], PARAMS["w"])


@pytest.mark.parametrize(
    "rule", [jr.radam_direction(), jr.adabelief_direction(rectify=True)], ids=["radam", "adabelief"]
)
def test_zero_gradients_make_no_nan_behind_the_silent_updates(rule):
    """The laws run three updates, in which these are silent."""

    def total(b2):
        return jnp.sum(scanned(rule, ZERO, 8, jr.set_hyperparams(rule.init(PARAMS), b2=b2))["w"])

    value, slope = quick_jit(jax.value_and_grad(total))(0.99)
    assert value == 0
    assert slope == 0


@pytest.mark.parametrize("make", [jr.adam, jr.amsgrad, jr.nadam, jr.adabelief], ids=lambda f: f.__name__)
def test_a_gradient_whose_square_overflows_stops_its_element_alone(make):
    """As in Optax and PyTorch: v is ∞ from then on, and not NaN."""
    spiked, usual, rule = {"w": jnp.array([1e20, 0.2])}, {"w": jnp.array([0.1, 0.2])}, make()
    state = rule.init(spiked)
    for g in [spiked, usual, usual]:
        updates, state = rule.update(g, state)
    assert updates["w"][0] == 0
    assert np.isfinite(updates["w"][1])
    assert updates["w"][1] != 0


@pytest.mark.x64
def test_the_slope_of_radam_by_b2_is_that_of_finite_differences():
    rule = jr.radam_direction()
    state = rule.init(PARAMS)

    def total(b2):
        return jnp.sum(scanned(rule, PARAMS, 12, jr.set_hyperparams(state, b2=b2))["w"] ** 2)

    above, below, slope = quick_jit(lambda b2: (total(b2 + 1e-6), total(b2 - 1e-6), jax.grad(total)(b2)))(0.99)
    np.testing.assert_allclose(slope, (above - below) / 2e-6, rtol=1e-6)


def test_a_parameter_without_gradient_keeps_its_product_of_momenta():
    rule = jr.nadam_direction()
    _, state = rule.update(PARAMS | {"b": None}, rule.init(PARAMS))
    assert {key: x.shape for key, x in state.product.items()} == {"w": (), "b": ()}
    np.testing.assert_allclose(state.product["w"], 0.9 * (1 - 0.5 * 0.96**4e-3), rtol=1e-6)
    assert state.product["b"] == 1


def test_adamax_without_eps_leaves_alone_what_had_no_gradient():
    updates = run(jr.adamax(eps=0.0), ZERO, 2)
    np.testing.assert_array_equal(updates["w"], 0)


def test_amsgrad_remembers_the_largest_moment():
    """After one gradient of 1 the corrected maximum stays 1; the other is 1 − β₂, and its correction grows."""
    for maximum_of, v_hat in [("corrected", 1.0), ("uncorrected", (1 - 0.9) / (1 - 0.9**2))]:
        rule = jr.amsgrad_direction(b1=0.0, b2=0.9, maximum_of=maximum_of)
        _, state = rule.update({"w": jnp.ones(())}, rule.init({"w": jnp.ones(())}))
        d, _ = rule.update({"w": jnp.full((), 0.1)}, state)
        np.testing.assert_allclose(d["w"], 0.1 / np.sqrt(v_hat), rtol=1e-5)


def test_the_accumulators_of_yogi_begin_where_they_are_told_to():
    params = {"w": jnp.ones(2, jnp.bfloat16), "z": jnp.ones(2, jnp.complex64)}
    state = jr.yogi_direction(initial_accumulator_value=jnp.float32(0.5)).init(params)
    assert {key: (x.dtype, *x.tolist()) for key, x in state.m.items()} == {
        "w": (jnp.float32, 0.5, 0.5),
        "z": (jnp.complex64, 0.5, 0.5),
    }
    assert {key: (x.dtype, *x.tolist()) for key, x in state.v.items()} == dict.fromkeys("wz", (jnp.float32, 0.5, 0.5))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        *(
            (
                lambda make=make: make(eps_placement="under"),
                ValueError,
                'eps_placement is "outside", "hat", "inside" or',
            )
            for make in (jr.adam, jr.adamw, jr.nadamw, jr.radam)
        ),
        (
            lambda: jr.adamw(bias_correction="step", eps_placement="under"),
            ValueError,
            'eps_placement is "outside", "hat", "inside" or "max", not \'under\'',
        ),
        (lambda: jr.amsgrad(maximum_of="v"), ValueError, 'maximum_of is "corrected" or "uncorrected", not \'v\''),
        (lambda: jr.nadamw(form="torch"), ValueError, 'form is "optax" or "timm", not \'torch\''),
        (lambda: jr.radam(silent="adam"), ValueError, 'silent is "sgd" or "skip", not \'adam\''),
        (lambda: jr.nadam(momentum_decay=-1.0), ValueError, "momentum_decay must be at least 0, not -1.0"),
        (lambda: jr.adabelief(eps_root=-1.0), ValueError, "eps_root must be at least 0, not -1.0"),
        (lambda: jr.yogi(initial_accumulator_value=-1.0), ValueError, "initial_accumulator_value must be at least 0"),
        (lambda: jr.yogi(initial_accumulator_value="x"), TypeError, "initial_accumulator_value must be a number"),
        (
            lambda: jr.yogi(initial_accumulator_value=jr.Constant(1.0)),
            TypeError,
            "initial_accumulator_value is read when init runs, and cannot be a schedule",
        ),
        (
            lambda: jax.jit(lambda x: jr.yogi(initial_accumulator_value=x).init(jnp.ones(1)))(1.0),
            TypeError,
            "cannot be a schedule or traced",
        ),
    ],
)
def test_what_is_refused(make, error, message):
    with pytest.raises(error) as raised:
        make()
    assert message in str(raised.value)
