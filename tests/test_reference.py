"""Every rule against its NumPy float64 reference, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table import ROWS

STEPS = 50
SHAPES = {"scalar": (), "vector": (7,), "matrix": (5, 3), "cube4": (2, 1, 3, 2), "empty": (0, 4)}


def sequence(seed: int) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Parameters, and gradients whose elements each keep a magnitude between 1e-8 and 1e4 and change their sign."""
    rng = np.random.default_rng(seed)
    params = {key: rng.normal(size=shape) for key, shape in SHAPES.items()}
    sizes = {key: 10 ** rng.uniform(-8, 4, size=shape) for key, shape in SHAPES.items()}
    grads = [{key: size * rng.normal(size=size.shape) for key, size in sizes.items()} for _ in range(STEPS)]
    return params, grads


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param(jnp.float32, 1e-6, id="f32"),
        pytest.param(jnp.float64, 1e-12, id="f64", marks=pytest.mark.x64),
    ],
)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_matches_the_paper(row, dtype, tolerance):
    rule, reference = row.make(), row.reference()
    next(reference)
    exact, grads = sequence(seed=len(row.name))

    def cast(tree):
        return {key: jnp.asarray(x, dtype) for key, x in tree.items()}

    state = rule.init(cast(exact))
    update = jax.jit(rule.update)
    # Where signs cancel, what is left of a sum keeps the rounding errors of its terms: errors are measured by the
    # largest result that an element has had, and by 1 (times the rate, of an update) where all of them were smaller.
    largest = {key: np.full(shape, row.rate or 1.0) for key, shape in SHAPES.items()}
    for g in grads:
        rounded = {key: np.asarray(x, np.float64) for key, x in cast(g).items()}
        params = {key: np.asarray(x, np.float64) for key, x in cast(exact).items()}
        expected = reference.send((rounded, params))
        actual, state = update(cast(g), state, cast(params))
        for key, value in expected.items():
            largest[key] = np.maximum(largest[key], np.abs(value))
            assert actual[key].dtype == dtype
            error = np.abs(np.asarray(actual[key], np.float64) - value) / largest[key]
            assert error.max(initial=0) <= tolerance, key
        moved = expected if row.rate else {key: np.zeros(shape) for key, shape in SHAPES.items()}
        exact = {key: params[key] + moved[key] for key in SHAPES}
