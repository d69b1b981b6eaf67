"""Hooks and directions against Optax, in float64, where both follow one convention. Needs the group `oracles`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_rules as jr

pytestmark = [pytest.mark.oracle, pytest.mark.x64]

STEPS = 20

CASES = {
    "clip": (jr.clip_by_value(0.3), lambda optax: optax.clip(0.3)),
    "clip_by_block_rms": (jr.clip_by_block_rms(0.3), lambda optax: optax.clip_by_block_rms(0.3)),
    "adaptive_grad_clip": (jr.adaptive_grad_clip(0.1), lambda optax: optax.adaptive_grad_clip(0.1)),
    "adaptive_grad_clip_heads": (jr.adaptive_grad_clip(0.1, axis=0), lambda optax: optax.adaptive_grad_clip(0.1)),
    "centralize": (jr.centralize(axis=1), lambda optax: optax.centralize()),
    "ema": (jr.ema(0.9), lambda optax: optax.ema(0.9)),
    "ema_biased": (jr.ema(0.9, debias=False), lambda optax: optax.ema(0.9, debias=False)),
    "trace": (jr.trace(0.9), lambda optax: optax.trace(0.9)),
    "trace_nesterov": (jr.trace(0.9, nesterov=True), lambda optax: optax.trace(0.9, nesterov=True)),
    "trust_ratio": (
        jr.trust_ratio(0.5, eps=0.1, min_norm=0.2),
        lambda optax: optax.scale_by_trust_ratio(min_norm=0.2, trust_coefficient=0.5, eps=0.1),
    ),
    "normalize": (jr.normalize(1e-6), lambda optax: optax.normalize_by_update_norm(eps=1e-6)),
    "sign": (jr.sign(), lambda optax: optax.scale_by_sign()),
    "leaf_rms": (jr.scale_by_leaf_rms(0.9), lambda optax: optax.scale_by_param_block_rms(0.9)),
    "scale": (jr.scale(0.3), lambda optax: optax.scale(0.3)),
    "set_to_zero": (jr.set_to_zero(), lambda optax: optax.set_to_zero()),
    "zero_nans": (jr.zero_nonfinite(), lambda optax: optax.zero_nans()),
    "stateless": (
        jr.stateless(lambda g, p: jax.tree.map(jnp.multiply, g, p)),
        lambda optax: optax.stateless(lambda g, p: jax.tree.map(jnp.multiply, g, p)),
    ),
}


SHAPES = {"w": (4, 3), "b": (5,)}
MORE_SHAPES = {"adaptive_grad_clip": {"hwio": (2, 2, 3, 4)}, "adaptive_grad_clip_heads": {"heads": (4, 2, 3)}}


@pytest.mark.parametrize("name", CASES)
def test_optax(name):
    optax = pytest.importorskip("optax")
    ours, make = CASES[name]
    theirs = make(optax)
    rng = np.random.default_rng(0)
    shapes = SHAPES | MORE_SHAPES.get(name, {})
    params = {key: jnp.asarray(rng.normal(size=shape)) for key, shape in shapes.items()}
    state, their_state = ours.init(params), theirs.init(params)
    for _ in range(STEPS):
        grads = {key: jnp.asarray(rng.normal(size=p.shape) * 10 ** rng.uniform(-3, 1)) for key, p in params.items()}
        if name == "zero_nans":
            grads["w"] = grads["w"].at[0, 1].set(jnp.nan)
        out, state = ours.update(grads, state, params)
        expected, their_state = theirs.update(grads, their_state, params)
        for key in params:
            np.testing.assert_allclose(out[key], expected[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lamb(decay):
    optax = pytest.importorskip("optax")
    ours = jr.chain(jr.adam_direction(eps=1e-6), jr.weight_decay(decay), jr.trust_ratio(), jr.step(0.1))
    theirs = optax.lamb(0.1, weight_decay=decay)
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(4, 3))), "zero": jnp.zeros(5)}
    state, their_state, their_params = ours.init(params), theirs.init(params), params
    for _ in range(STEPS):
        grads = {key: jnp.asarray(rng.normal(size=p.shape)) for key, p in params.items()}
        params, state = ours.apply(grads, state, params)
        updates, their_state = theirs.update(grads, their_state, their_params)
        their_params = optax.apply_updates(their_params, updates)
        for key in params:
            # Optax rounds 1 − βᵗ to float32 even among 64-bit types.
            np.testing.assert_allclose(params[key], their_params[key], rtol=1e-5, atol=1e-6)
