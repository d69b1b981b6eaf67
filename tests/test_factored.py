"""Adafactor and SM3: what is factored by which axes, how many bytes that takes, presets, choices and errors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_rules as jr
from jaxopt_rules.rules.adafactor import AdafactorState, Factors

SHAPES = {"matrix": (256, 512), "narrow": (127, 512), "bias": (512,), "scale": (), "conv": (3, 3, 130, 140)}


def of(shapes, value=1.0):
    return {name: jnp.full(shape, value) for name, shape in shapes.items()}


def slot_shapes(rule, shapes):
    """By parameter, the shapes of its factors or of its one slot."""
    state = jax.eval_shape(rule.init, of(shapes))
    found = jr.find(state, AdafactorState).v
    return {name: (v.rows.shape, v.columns.shape) if isinstance(v, Factors) else v.shape for name, v in found.items()}


def bytes_of(rule, shapes):
    table = jr.memory(jax.eval_shape(rule.init, of(shapes)))
    return sum(row.bytes for row in table.rows if row.slot != "scalars")


def test_the_two_largest_axes_from_128_on_are_factored():
    assert slot_shapes(jr.adafactor(), SHAPES) == {
        "matrix": ((256, 1), (1, 512)),
        "narrow": (127, 512),
        "bias": (512,),
        "scale": (),
        "conv": ((3, 3, 130, 1), (3, 3, 1, 140)),
    }
    tall = {"w": (512, 3, 256), "equal": (200, 2, 200)}
    assert slot_shapes(jr.adafactor(), tall) == {
        "w": ((1, 3, 256), (512, 3, 1)),
        "equal": ((200, 2, 1), (1, 2, 200)),
    }
    assert slot_shapes(jr.adafactor(factored=False), {"w": (256, 512)}) == {"w": (256, 512)}


def test_the_last_two_axes_are_factored_of_any_size():
    shapes = {"w": (2, 1), "conv": (130, 140, 3, 2), "b": (200,), "empty": (0, 4)}
    expected = {"w": ((2, 1), (1, 1)), "conv": ((130, 140, 3, 1), (130, 140, 1, 2)), "b": (200,), "empty": (0, 4)}
    assert slot_shapes(jr.adafactor_pytorch(), shapes) == expected
    assert slot_shapes(jr.adafactor_transformers(), shapes) == expected


def test_views_factor_whatever_they_name():
    shapes = {"conv": (3, 3, 8, 16), "heads": (8, 2, 4), "w": (200, 300)}
    views = {"conv": jr.MatrixView(rows=(-4, -3, -2)), "heads": jr.MatrixView(rows=-3, columns=(-2, -1))}
    assert slot_shapes(jr.adafactor(views=views), shapes) == {
        "conv": ((3, 3, 8, 1), (1, 1, 1, 16)),
        "heads": ((8, 1, 1), (1, 2, 4)),
        "w": (200, 300),
    }
    one = {"w": (2, 3), "b": (3,), "empty": (0, 4)}
    assert slot_shapes(jr.adafactor(views=jr.MatrixView()), one) == {
        "w": ((2, 1), (1, 3)),
        "b": (3,),
        "empty": (0, 4),
    }
    assert slot_shapes(jr.adafactor(views=None), {"w": (256, 512)}) == {"w": (256, 512)}


def test_joined_axes_are_factored_as_the_matrix_that_they_make():
    """A filter by the view of its matrix takes the steps that the matrix takes."""
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.normal(size=(2, 3, 4, 5)), jnp.float32) for _ in range(3)]

    def train(rule, shape):
        p = {"w": jnp.ones(shape)}
        state = rule.init(p)
        for g in grads:
            p, state = rule.apply({"w": g.reshape(shape)}, state, p)
        return p["w"].reshape(24, 5)

    filters = train(jr.adafactor(views={"w": jr.MatrixView(rows=(-4, -3, -2))}), (2, 3, 4, 5))
    np.testing.assert_allclose(filters, train(jr.adafactor(views="last", min_dim_size_to_factor=1), (24, 5)), rtol=1e-6)


def test_bytes_of_a_matrix():
    matrix = {"w": (256, 512)}
    assert bytes_of(jr.adafactor(), matrix) == 4 * (256 + 512)
    assert bytes_of(jr.adafactor_pytorch(), matrix) == 4 * (256 + 512)
    assert bytes_of(jr.adafactor(momentum=0.9), matrix) == 4 * (256 + 512 + 256 * 512)
    assert bytes_of(jr.sm3(0.1, None), matrix) == 4 * (256 + 512)
    assert bytes_of(jr.sm3(0.1), matrix) == 4 * (256 + 512 + 256 * 512)
    assert bytes_of(jr.sm3(0.1, None), {"w": (2, 3, 4), "b": (5,)}) == 4 * (2 + 3 + 4 + 5)


def test_bytes_are_those_of_float32_for_narrow_parameters():
    params = {"w": jnp.ones((256, 512), jnp.bfloat16)}
    state = jr.adafactor().init(params)
    assert jr.memory(state).rows[0].dtype == "float32"
    updates, _ = jr.adafactor().update(params, state, params)
    assert updates["w"].dtype == jnp.float32


def first_step(rule, g=1.0, p=2.0):
    params = {"w": jnp.full((2, 3), p)}
    updates, state = rule.update({"w": jnp.full((2, 3), g)}, rule.init(params), params)
    return float(updates["w"][0, 0]), state


def test_the_step_without_a_rate_is_the_paper_s():
    assert first_step(jr.adafactor())[0] == pytest.approx(-1e-2 * 2)
    assert jr.hyperparams(first_step(jr.adafactor())[1])["learning_rate"] == pytest.approx(1e-2)
    # A bound above 1 / √t is no bound; a rate of one's own is none.
    assert first_step(jr.adafactor(3.0, relative_step=True))[0] == pytest.approx(-1 * 2)
    assert first_step(jr.adafactor(3.0))[0] == pytest.approx(-3 * 2)
    assert first_step(jr.adafactor(3.0, multiply_by_parameter_scale=False))[0] == pytest.approx(-3)


def test_what_is_absent_is_no_hyperparameter():
    names = {"learning_rate", "decay_rate", "decay_offset", "eps"}

    def names_of(**keywords):
        return set(jr.hyperparams(jr.adafactor(0.1, **keywords).init({"w": jnp.ones((2, 3))})))

    assert names_of(multiply_by_parameter_scale=False, clipping_threshold=None) == names
    all_of_them = names | {"min_rms", "clipping_threshold", "momentum", "weight_decay"}
    assert names_of(momentum=0.9, weight_decay=0.1) == all_of_them


@pytest.mark.parametrize(("decay", "taken"), [("decoupled", 3.0), ("scaled", 2.0), ("fixed", 1.0)])
def test_decay_beside_the_step(decay, taken):
    """Of θ = 2 with α = 3, λ = 0.5, ρ = 1: α λ θ, α_t λ θ with α_t = ρ rms(θ), and λ θ."""
    params = {"w": jnp.full((2, 3), 2.0), "b": jnp.full(3, 2.0)}
    rule = jr.adafactor(3.0, relative_step=True, weight_decay=0.5, decay=decay, where="w")
    updates, _ = rule.update(jax.tree.map(jnp.zeros_like, params), rule.init(params), params)
    np.testing.assert_allclose(updates["w"], -taken, rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], 0)


def test_epsilon_matters_where_gradients_are_as_small():
    """PyTorch's ε is a least root, so that small gradients take small steps; inside, 1e-30 is none."""
    rate = {"multiply_by_parameter_scale": False, "views": "last", "min_dim_size_to_factor": 1}
    small, eps = 1e-9, 2.0**-23
    assert first_step(jr.adafactor(1.0, **rate), small)[0] == pytest.approx(-1, rel=1e-5)
    placed = jr.adafactor(1.0, eps=eps, eps_placement="max", **rate)
    # mean(R) is bounded below, too: V̂ = g⁴ / ε, and √V̂ is less than ε.
    assert first_step(placed, small)[0] == pytest.approx(-small / eps, rel=1e-5)


def test_presets():
    params = {"w": jnp.ones((3, 4))}
    state = jr.adafactor_pytorch().init(params)
    assert jr.hyperparams(state) == pytest.approx(
        {
            "learning_rate": 1e-2,
            "decay_rate": 0.8,
            "decay_offset": 0,
            "eps": 2.0**-23,
            "clipping_threshold": 1,
            "min_rms": 1e-3,
        }
    )
    warm = jr.adafactor_transformers(warmup_init=True, multiply_by_parameter_scale=False)
    sizes = []
    for count in (0, 9, 9_999, 39_999):
        state = jax.tree.map(lambda x, n=count: jnp.full_like(x, n) if x.dtype == jnp.int32 else x, warm.init(params))
        sizes.append(-float(warm.update(params, state, params)[0]["w"][0, 0]))
    # Without memory of earlier gradients U is 1 / √(1 − β̂₂), which is bounded by d = 1.
    np.testing.assert_allclose(sizes, [1e-6, 1e-5, 1e-2, 1 / 200], rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: jr.adafactor(eps_placement="outside"), 'eps_placement is "inside" or "max"'),
        (lambda: jr.adafactor(views="first"), 'views is "largest", "last", a MatrixView, or one for each selector'),
        (lambda: jr.adafactor(decay="cautious"), 'decay is "decoupled", "scaled" or "fixed", not \'cautious\''),
        (lambda: jr.adafactor(relative_step=False), "without the relative step there must be a learning_rate"),
        (lambda: jr.adafactor_transformers(0.1, warmup_init=True), "warmup_init belongs to the relative step"),
        (lambda: jr.adafactor(decay_rate=-0.8), "decay_rate must be at least 0"),
        (lambda: jr.adafactor(clipping_threshold=-1.0), "clipping_threshold must be at least 0"),
        (lambda: jr.adafactor(momentum=1.0), "momentum must lie in [0, 1)"),
        (lambda: jr.sm3(0.1, 1.0), "momentum must lie in [0, 1)"),
        (lambda: jr.sm3(0.1, eps=-1.0), "eps must be at least 0"),
    ],
)
def test_what_is_no_choice_is_refused(make, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        make()


def test_views_that_do_not_fit_are_refused():
    params = {"w": jnp.ones((2, 6))}
    with pytest.raises(TypeError, match="adafactor: views are a MatrixView, or one for each selector"):
        jr.adafactor(views={"w": 3})
    with pytest.raises(ValueError, match="adafactor: the means of a matrix belong to all of it, without parts"):
        jr.adafactor(views=jr.MatrixView(parts=3)).init(params)
    with pytest.raises(ValueError, match=re.escape("adafactor: 'w': MatrixView(rows=-4")):
        jr.adafactor(views={"w": jr.MatrixView(rows=-4)}).init(params)


def test_sm3_bounds_the_sum_of_squares_from_above():
    """Anil et al., claim 1 and proposition 3: Σ g² ≤ ν, which never falls."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.zeros((4, 3, 2))}
    state = jr.sm3_direction(None).init(params)
    total, before = np.zeros((4, 3, 2)), np.zeros((4, 3, 2))
    for _ in range(20):
        g = rng.normal(size=(4, 3, 2)) * 10 ** rng.uniform(-3, 3, size=(4, 3, 2))
        _, state = jr.sm3_direction(None).update({"w": jnp.asarray(g, jnp.float32)}, state, params)
        total += g**2
        bound = np.minimum(np.minimum(*state.mu["w"][:2]), state.mu["w"][2])
        assert np.all(bound >= total * (1 - 1e-5))
        assert np.all(bound >= before)
        before = bound


def test_sm3_of_a_vector_is_adagrad_and_zero_over_zero_is_zero():
    params = {"v": jnp.zeros(3), "s": jnp.zeros(()), "empty": jnp.zeros((0, 2))}
    rule = jr.sm3_direction(None)
    state = rule.init(params)
    for g in (3.0, 4.0):
        d, state = rule.update({"v": jnp.array([g, 0.0, -g]), "s": jnp.array(g), "empty": params["empty"]}, state)
    np.testing.assert_allclose(d["v"], [0.8, 0, -0.8], rtol=1e-6)
    np.testing.assert_allclose(d["s"], 0.8, rtol=1e-6)
