"""Every rule against its NumPy float64 reference, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit
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
    "dtype", [pytest.param(jnp.float32, id="f32"), pytest.param(jnp.float64, id="f64", marks=pytest.mark.x64)]
)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_matches_the_paper(row, dtype):
    rule, reference = row.make(), row.reference()
    next(reference)
    exact, sequence_of_grads = sequence(seed=len(row.name))

    def rounded(tree):
        return {key: np.asarray(jnp.asarray(x, dtype), np.float64) for key, x in tree.items()}

    # The parameters are those of the reference, which is handed the same rounded values as the rule.
    inputs, expected = [], []
    for grads in map(rounded, sequence_of_grads):
        params = rounded(exact)
        inputs.append((grads, params))
        expected.append(reference.send((grads, params)))
        moved = expected[-1] if row.rate else dict.fromkeys(SHAPES)
        exact = {key: params[key] if moved[key] is None else params[key] + moved[key] for key in SHAPES}

    def update(state, given):
        grads, params = given
        updates, state = rule.update(grads, state, params, **row.extra)
        return state, updates

    inputs = jax.tree.map(lambda *x: jnp.asarray(np.stack(x), dtype), *inputs)
    born = rule.init({key: x[0] for key, x in inputs[1].items()})
    _, actual = quick_jit(lambda state, given: jax.lax.scan(update, state, given))(born, inputs)
    for key, shape in SHAPES.items():
        if expected[0][key] is None:
            assert actual[key] is None
            continue
        assert actual[key].dtype == dtype
        values = np.stack([result[key] for result in expected])
        # Where signs cancel, what is left of a sum keeps the rounding errors of its terms: errors are measured by the
        # largest result that an element has had, and by 1 (times the rate, of an update) where all were smaller.
        largest = np.maximum.accumulate(np.abs(np.concatenate([np.full((1, *shape), row.rate or 1.0), values])))[1:]
        error = np.abs(np.asarray(actual[key], np.float64) - values) / largest
        assert error.max(initial=0) <= (row.single if dtype == jnp.float32 else row.double), key
