"""Complex parameters: every rule either treats |g|² as the square of a gradient, or refuses in one clear sentence."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit
from table import ROWS

import jaxopt_rules as jr

SHAPE = (3, 2)


def tree(seed):
    rng = np.random.default_rng(seed)
    keys = ("w", "u")
    return {key: jnp.asarray(rng.normal(size=SHAPE) + 1j * rng.normal(size=SHAPE), jnp.complex64) for key in keys}


@pytest.mark.parametrize("row", [row for row in ROWS if row.complex and row.laws], ids=lambda row: row.name)
def test_a_complex_tree_goes_through(row):
    """Slots of |g|² are real, updates complex; what depends on a phase turns with it."""
    rule, params, grads = row.make(), tree(0), tree(1)
    state = rule.init(params)
    update = quick_jit(partial(rule.update, **row.extra))
    for _ in range(2):
        updates, after = update(grads, state, params)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
        state = after
    for u in jax.tree.leaves(updates):
        assert u.dtype == jnp.complex64
        assert np.isfinite(np.asarray(u)).all()


@pytest.mark.parametrize("rule", [jr.clip_by_value(1.0), jr.chain(jr.clip_by_value(1.0), jr.adam(1e-3))], ids=repr)
def test_what_compares_numbers_refuses(rule):
    params = tree(0)
    with pytest.raises(TypeError, match=r"ClipByValue compares numbers.*'u' is complex64.*real and imaginary"):
        rule.update(tree(1), rule.init(params), params)


@pytest.mark.parametrize(
    "rule",
    [
        jr.adamw(0.1),
        jr.chain(jr.clip_by_global_norm(0.5), jr.adamw(0.1)),
        jr.chain(jr.clip_by_leaf_norm(0.5), jr.sgd(0.1, momentum=0.9)),
        jr.chain(jr.adam_direction(), jr.trust_ratio(), jr.step(0.1)),
        jr.lookahead(jr.adam(0.1), every=2),
        jr.accumulate(jr.adam(0.1), every=2),
        jr.chain(jr.cautious(jr.adam_direction()), jr.step(0.1)),
    ],
    ids=repr,
)
def test_training_turns_with_the_phase(rule):
    """θ → e^{iφ} θ and g → e^{iφ} g turn every update by the same phase: no rule looks at one axis of the plane."""
    phase = np.exp(0.7j).astype(np.complex64)

    def train(turn):
        params = jax.tree.map(lambda p: turn * p, tree(0))
        state = rule.init(params)
        for seed in range(1, 5):
            grads = jax.tree.map(lambda g: turn * g, tree(seed))
            params, state = rule.apply(grads, state, params)
        return params

    for straight, turned in zip(jax.tree.leaves(train(1)), jax.tree.leaves(train(phase)), strict=True):
        np.testing.assert_allclose(turned, phase * straight, rtol=2e-5, atol=2e-6)
