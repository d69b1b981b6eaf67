"""Adam's direction keeps its digits: against NumPy float64 at each of 200 steps, over many decades of gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import core as ref

import jaxopt_rules as jr

STEPS = 200
RNG = np.random.default_rng(7)
SIZES = 10 ** RNG.uniform(-8, 4, size=1000)

SEQUENCES = {
    "same_sign": SIZES * np.abs(RNG.normal(size=(STEPS, 1000))),
    "random_sign": SIZES * RNG.normal(size=(STEPS, 1000)),
    "any_size": 10 ** RNG.uniform(-8, 4, size=(STEPS, 1000)) * RNG.choice([-1, 1], size=(STEPS, 1000)),
    "scales": 10 ** RNG.uniform(-12, 3, size=1000) * RNG.normal(size=(STEPS, 1000)),
    "mostly_zero": SIZES * RNG.normal(size=(STEPS, 1000)) * (RNG.uniform(size=(STEPS, 1000)) < 0.1),
}


def exact(sequence, b2, form):
    reference = ref.adam_direction(0.9, b2, 1e-8, form)
    next(reference)
    return [reference.send((g, None)) for g in sequence]


@pytest.mark.parametrize("form", ["moments", "step"])
@pytest.mark.parametrize("b2", [0.99, 0.999, 0.9999])
@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize(
    ("dtype", "tolerance", "first"),
    [
        pytest.param(jnp.float32, 1e-6, 4e-7, id="f32"),
        pytest.param(jnp.float64, 1e-12, 1e-12, id="f64", marks=pytest.mark.x64),
    ],
)
def test_direction_and_update(name, b2, form, dtype, tolerance, first):
    sequence = np.asarray(SEQUENCES[name].astype(dtype), np.float64)
    p, g = jnp.zeros(1000, dtype), jnp.asarray(sequence, dtype)
    direction = jr.adam_direction(b2=b2, bias_correction=form)
    optimizer = jr.adam(3e-4, b2=b2, bias_correction=form)

    def body(states, g):
        d, s = direction.update(g, states[0], p)
        u, r = optimizer.update(g, states[1], p)
        return (s, r), (d, u)

    _, (ds, us) = jax.jit(lambda: jax.lax.scan(body, (direction.init(p), optimizer.init(p)), g))()
    expected = np.array(exact(sequence, b2, form))
    scale = np.maximum(1, np.abs(expected))
    error = np.abs(np.asarray(ds, np.float64) - expected) / scale
    assert error.max() <= tolerance
    assert error[0].max() <= first
    # The rate itself is rounded once, to 6e-8 in float32.
    assert (np.abs(np.asarray(us, np.float64) + 3e-4 * expected) / scale).max() <= 3e-4 * tolerance


@pytest.mark.parametrize(
    "rule",
    [
        jr.adabelief(0.1, eps=0, eps_root=0),
        jr.adadelta(eps=0),
        jr.adafactor(eps=0),
        jr.adagrad(0.1, 0, 0),
        jr.adagrad(0.1, 0, 0, eps_placement="outside"),
        *(jr.adam(0.1, eps=0, eps_placement=where) for where in ("outside", "hat", "inside", "max")),
        jr.adamw(0.1, eps=0, bias_correction="step"),
        jr.adamax(0.1, eps=0),
        jr.adan(0.1, eps=0),
        jr.ademamix(0.1, eps=0),
        jr.adopt(0.1, eps=0),
        jr.amsgrad(0.1, eps=0),
        jr.lamb(0.1, eps=0),
        jr.nadam(0.1, eps=0),
        jr.nadamw(0.1, eps=0),
        jr.novograd(0.1, eps=0),
        jr.prodigy(eps=0),
        jr.radam(0.1, eps=0),
        jr.rmsprop(0.1, eps=0, eps_placement="outside"),
        jr.schedule_free_adamw(eps=0),
        jr.sm3(0.1),
        jr.stable_adamw(0.1, eps=0),
        jr.yogi(0.1, eps=0, initial_accumulator_value=0),
    ],
    ids=repr,
)
def test_without_epsilon_a_zero_gradient_makes_no_nan(rule):
    """Neither 0 / 0, nor ∞ in a derivative that is taken through the update."""
    params = {"w": jnp.zeros((3, 2)), "b": jnp.ones(2)}

    def moved(rate):
        state = rule.init(params)
        state = jr.set_hyperparams(state, learning_rate=rate) if "learning_rate" in jr.hyperparams(state) else state
        new, _ = rule.apply(jax.tree.map(jnp.zeros_like, params), state, params)
        return sum(jnp.sum(x) for x in jax.tree.leaves(new))

    value, slope = jax.value_and_grad(moved)(0.1)
    assert np.isfinite(value)
    assert np.isfinite(slope)
