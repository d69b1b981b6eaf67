"""Muon and its solvers: what they make of singular values, how leaves are taken apart, and what they refuse."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit
from reference import matrices as papers

import jaxopt_rules as jr
from jaxopt_rules.matrices import MatrixView
from jaxopt_rules.rules.polar import svd

SOLVERS = {
    "original": jr.NewtonSchulz(),
    "max": jr.NewtonSchulz(eps_placement="max"),
    "polar_express": jr.NewtonSchulz("polar_express"),
    "no eps": jr.NewtonSchulz(eps=0),
    "bfloat16": jr.NewtonSchulz(dtype="bfloat16"),
    "svd": svd,
}
solvers = pytest.mark.parametrize("polar", SOLVERS.values(), ids=SOLVERS.keys())
exact_solvers = pytest.mark.parametrize(
    "polar", [SOLVERS[name] for name in ("original", "polar_express", "svd")], ids=["original", "polar_express", "svd"]
)


def normal(*shape, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape)
    return jnp.asarray(x + 1j * rng.normal(size=shape) if np.issubdtype(dtype, np.complexfloating) else x, dtype)


def direction(x, views=None, **choices):
    """Of one gradient x."""
    rule = jr.muon_direction(views=views, **choices)
    return quick_jit(rule.update)({"w": x}, rule.init({"w": x}))[0]["w"]


def close(x, y, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=0, atol=tolerance)


# What solvers make of singular values


@pytest.mark.parametrize(
    ("name", "steps", "least", "low", "high"),
    [
        ("original", 5, 1e-2, 0.682, 1.134),
        ("original", 5, 1e-3, 0.471, 1.202),
        ("quintic", 5, 1e-2, 0.978, 1.032),
        ("quintic", 5, 1e-3, 0.475, 1.145),
        ("polar_express", 8, 1e-3, 1, 1),
        ("polar_express", 5, 1e-2, 0.869, 1.131),
        ("polar_express", 5, 1e-3, 0.857, 1.131),
        ("polar_express_safer", 8, 1e-3, 1, 1),
        ("polar_express_safer", 5, 1e-2, 0.859, 1.141),
        ("polar_express_safer", 5, 1e-3, 0.834, 1.141),
        ("deepseek", 10, 1e-3, 1, 1.0005),
    ],
)
def test_singular_values_end_where_it_is_documented(name, steps, least, low, high):
    """Over a stack of matrices of norm 1 with the singular values σ and √(1 − σ²)."""
    sigma = np.geomspace(least, 2**-0.5, 1001)
    rows, columns = (np.linalg.qr(np.asarray(normal(n, 2, seed=n)))[0] for n in (3, 2))
    stack = (rows * np.stack([sigma, np.sqrt(1 - sigma**2)], -1)[:, None]) @ columns.T
    factors = jax.jit(jr.NewtonSchulz(name, steps))(jnp.asarray(stack, jnp.float32))
    values = np.linalg.svd(np.asarray(factors), compute_uv=False)
    close([values.min(), values.max()], [low, high], 6e-4)


@exact_solvers
def test_a_stack_is_its_matrices_one_by_one(polar):
    stack = normal(3, 4, 6)
    for one, x in zip(polar(stack), stack, strict=True):
        close(one, polar(x[None])[0])


@exact_solvers
@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_the_factor_of_the_adjoint_is_the_adjoint_and_turns_with_bases(polar, dtype):
    x = normal(1, 4, 6, dtype=dtype)
    turn = np.linalg.qr(normal(4, 4, seed=1, dtype=dtype))[0]
    close(polar(x.mT.conj()), polar(x).mT.conj())
    close(polar(turn @ x), turn @ polar(x))


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_it_is_the_polynomial_of_singular_values(shape, dtype):
    x = normal(*shape, dtype=dtype)
    close(SOLVERS["original"](x[None])[0], papers.newton_schulz(np.asarray(x, np.promote_types(dtype, np.float64))))


def test_bfloat16_is_some_percent_away_and_keeps_the_precision_of_the_slot():
    x = normal(1, 16, 64)
    rough, fine = SOLVERS["bfloat16"](x), SOLVERS["original"](x)
    assert rough.dtype == jnp.float32
    assert 1e-4 < float(jnp.abs(rough - fine).max()) < 2e-2
    assert jr.NewtonSchulz(dtype=jnp.bfloat16) == jr.NewtonSchulz(dtype="bfloat16")
    assert hash(jr.NewtonSchulz(eps=jnp.zeros(()))) == hash(jr.NewtonSchulz(eps=0))


def test_svd_leaves_out_what_is_zero():
    rank_one = jnp.outer(jnp.array([3.0, 0, 4]), jnp.array([0, 2.0]))[None]
    close(svd(rank_one), jnp.outer(jnp.array([0.6, 0, 0.8]), jnp.array([0, 1.0]))[None], 1e-6)


@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (2, 4)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_svd_has_a_derivative_where_singular_values_are_equal(shape, dtype):
    """Of the polar factor of an isometry Q in the direction E, by X (Xᴴ X)^-½ or (X Xᴴ)^-½ X written out."""
    rows, columns = shape
    tall = np.linalg.qr(normal(max(shape), min(shape), dtype=dtype))[0]
    q, e = (tall if rows >= columns else tall.conj().T), np.asarray(normal(*shape, seed=1, dtype=dtype))
    _, slope = jax.jvp(svd, (jnp.asarray(q)[None],), (jnp.asarray(e)[None],))
    q, e = (q, e) if rows >= columns else (q.conj().T, e.conj().T)
    expected = e - q @ (q.conj().T @ e + e.conj().T @ q) / 2
    close(slope[0], expected if rows >= columns else expected.conj().T)


@solvers
@pytest.mark.parametrize("shape", [(1, 2, 3), (1, 3, 2), (1, 0, 2), (0, 2, 3)], ids=str)
def test_zero_stays_zero_with_a_finite_derivative(polar, shape):
    def squares(x):
        factor = polar(x)
        return jnp.sum((factor - 1) ** 2), factor

    slope, factor = quick_jit(jax.grad(squares, has_aux=True))(jnp.zeros(shape))
    assert slope.shape == factor.shape == shape
    assert not np.any(factor)
    assert np.isfinite(slope).all()


# How leaves are taken apart


def test_a_convolution_is_one_matrix_of_all_its_inputs():
    x = normal(3, 2, 4, 5)  # HWIO
    flat = direction(x.reshape(24, 5))
    close(direction(x, MatrixView(rows=(-4, -3, -2))), flat.reshape(x.shape))
    oihw = direction(x.transpose(3, 2, 0, 1), MatrixView(rows=(-2, -1, -3), columns=-4))
    close(oihw, flat.reshape(x.shape).transpose(3, 2, 0, 1))


def test_layers_heads_and_parts_are_matrices_of_their_own():
    layers = normal(3, 4, 6)
    close(direction(layers, MatrixView()), jnp.stack([direction(x) for x in layers]))

    heads = normal(8, 3, 4)  # (in, heads, size)
    by_head = jnp.stack([direction(heads[:, k]) for k in range(3)], axis=1)
    close(direction(heads, MatrixView(rows=-3, columns=-1)), by_head)
    as_one = direction(heads.reshape(8, 12)).reshape(heads.shape)
    close(direction(heads, MatrixView(rows=-3, columns=(-2, -1))), as_one)

    equal = normal(4, 9)
    expected = jnp.concatenate([direction(x) for x in jnp.split(equal, 3, axis=1)], axis=1)
    close(direction(equal, MatrixView(parts=3)), expected)


def test_parts_of_other_widths_have_scales_of_their_own():
    fused = normal(4, 8 + 2 + 2)
    q, k, v = jnp.split(fused, [8, 10], axis=1)
    for scale in ("original", "match_rms_adamw", "spectral"):
        expected = jnp.concatenate([direction(x, scale=scale) for x in (q, k, v)], axis=1)
        close(direction(fused, MatrixView(parts=(8, 2, 2)), scale=scale), expected)


def test_what_is_stored_as_out_in_is_transposed():
    x = normal(4, 6)
    close(direction(x.T, MatrixView(rows=-1, columns=-2)), direction(x).T)


def test_each_selector_has_its_view():
    params = {"conv": normal(3, 3, 2, 4), "w": normal(4, 2)}
    rule = jr.muon(views={"conv": MatrixView(rows=(-4, -3, -2))})
    updates, _ = rule.update(params, rule.init(params), params)
    close(updates["conv"], -0.02 * direction(params["conv"], MatrixView(rows=(-4, -3, -2))))
    close(updates["w"], -0.02 * direction(params["w"]))


def test_complex_gradients_turn_with_their_phase():
    x = normal(4, 3, dtype=np.complex64)
    close(direction(np.exp(0.7j).astype(np.complex64) * x), np.exp(0.7j) * direction(x))


# Momentum and scale


@pytest.mark.parametrize(
    ("scale", "wide", "tall"),
    [
        ("original", 1.5, 1.0),
        ("match_rms_adamw", 0.2 * 3, 0.2 * 3),
        ("spectral", 1.5, 2 / 3),
        (lambda rows, columns: rows + columns / 10, 4.9, 9.4),
        (None, 1.0, 1.0),
    ],
)
def test_scales(scale, wide, tall):
    """Of 4 inputs and 9 outputs, and of 9 inputs and 4 outputs, by the largest singular value."""
    for shape, expected in (((4, 9), wide), ((9, 4), tall)):
        values = np.linalg.svd(direction(normal(*shape), scale=scale, polar="svd"), compute_uv=False)
        close(values, np.full(4, expected), 1e-5)


def test_the_forms_of_momentum_differ_in_size_and_in_early_weights():
    def last(**choices):
        rule = jr.muon_direction(beta=0.8, **choices)
        state = rule.init({"w": normal(4, 4)})
        for seed in range(3):
            d, state = rule.update({"w": normal(4, 4, seed=seed)}, state)
        return d["w"], state.m["w"]

    (of_ema, mean), (of_sum, total), (of_debiased, also) = (last(momentum=x) for x in ("ema", "sum", "debiased"))
    close(total, mean / 0.2, 1e-5)
    close(of_sum, of_ema)
    close(also, mean)
    assert np.abs(of_debiased - of_ema).max() > 0.05
    close(last(momentum="debiased", nesterov=False)[0], last(nesterov=False)[0])


def test_presets_are_choices_of_muon():
    params, grads = {"w": normal(4, 6)}, {"w": normal(4, 6, seed=1)}

    def first(rule):
        return rule.update(grads, rule.init(params), params)[0]["w"]

    spelt = jr.muon(1e-3, momentum="sum", scale="match_rms_adamw", weight_decay=0.1)
    np.testing.assert_array_equal(first(jr.muon_moonshot()), first(spelt))
    spelt = jr.muon(1e-3, polar=jr.NewtonSchulz(eps_placement="max"), weight_decay=0.1)
    np.testing.assert_array_equal(first(jr.muon_pytorch()), first(spelt))


def test_a_solver_of_ones_own():
    def rows_of_length_one(stack):
        return stack / jnp.linalg.norm(stack, axis=-1, keepdims=True)

    x = normal(4, 6)
    close(direction(x, polar=rows_of_length_one, scale=None), rows_of_length_one(x))


def test_it_holds_one_slot_and_prints_pickles_and_compares():
    rule = jr.muon(0.02, polar=jr.NewtonSchulz([[3, -3.2, 1.2], [1.875, -1.25, 0.375]], steps=4))
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert "NewtonSchulz(coefficients=((3.0, -3.2, 1.2), (1.875, -1.25, 0.375)), steps=4" in repr(rule)
    state = rule.init({"w": normal(4, 6)})
    assert sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim) == 4 * 24
    assert set(jr.hyperparams(state)) == {"learning_rate", "beta"}


def test_beta_may_be_scheduled_and_parameters_narrow():
    rule = jr.muon(jr.Warmup(jr.Cosine(0.02, 40), 5), beta=jr.Linear(0.85, 300, 0.95), weight_decay=lambda count: 0.1)
    params = {"w": normal(4, 6, dtype=jnp.bfloat16)}
    state = rule.init(params)
    apply = jax.jit(rule.apply, donate_argnums=(1, 2))
    for _ in range(3):
        params, state = apply({"w": normal(4, 6, dtype=jnp.bfloat16)}, state, params)
    assert params["w"].dtype == jnp.bfloat16
    assert jr.hyperparams(state)["beta"] == pytest.approx(0.85 + 0.1 * 2 / 300, abs=1e-6)


# What is refused


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: jr.muon(momentum=0.9), ValueError, r'"?ema.*not 0\.9; its rate is beta'),
        (lambda: jr.muon(scale="rms"), ValueError, r"'original', 'match_rms_adamw', 'spectral'.*not 'rms'"),
        (lambda: jr.muon(polar="newton"), ValueError, r"'newton'; there are 'original'.* and \"svd\""),
        (lambda: jr.muon(polar=5), TypeError, r"function of \(matrices, rows, columns\), not 5"),
        (lambda: jr.muon(beta=1.0), ValueError, r"beta must lie in \[0, 1\)"),
        (lambda: jr.NewtonSchulz("svd"), ValueError, r"named 'svd'; there are 'original'"),
        (lambda: jr.NewtonSchulz((3.4, -4.8, 2.0)), ValueError, r"triples \(a, b, c\), one for each step"),
        (lambda: jr.NewtonSchulz(()), ValueError, r"triples \(a, b, c\), one for each step"),
        (lambda: jr.NewtonSchulz(steps=0), ValueError, r"at least 1, not 0"),
        (lambda: jr.NewtonSchulz(dtype=jnp.int32), TypeError, r"not int32"),
        (lambda: jr.NewtonSchulz(dtype=jnp.complex64), TypeError, r"not complex64"),
        (lambda: jr.NewtonSchulz(eps=-1.0), ValueError, r"eps must be at least 0"),
        (lambda: jr.NewtonSchulz(eps_placement="hat"), ValueError, r"\"outside\" or \"max\", not 'hat'"),
        (lambda: jr.NewtonSchulz(safety=0.0), ValueError, r"safety must be greater than 0"),
        (lambda: jr.NewtonSchulz(safety=np.nan), ValueError, r"safety must be greater than 0"),
        (lambda: jr.NewtonSchulz(eps=np.nan), ValueError, r"eps must be at least 0, not nan"),
    ],
)
def test_a_wrong_choice_is_refused_where_it_is_made(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_what_is_no_matrix_is_refused():
    for rule in (jr.muon(), jr.muon_moonshot(), jr.muon_pytorch()):
        with pytest.raises(ValueError, match=r"muon is for matrices, and 'b' has shape \(3,\).*partition"):
            rule.init({"b": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"which axes of 'conv'.*are rows"):
        jr.muon().init({"conv": jnp.ones((3, 3, 2, 4))})


def test_complex_matrices_have_no_precision_but_their_own():
    with pytest.raises(TypeError, match="in their own precision, not in bfloat16"):
        direction(normal(2, 2, dtype=np.complex64), polar=jr.NewtonSchulz(dtype="bfloat16"))
