"""Schedules against the plain formulas in float64, at every count, and as values."""

import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_rules as jr

MILLION = 1_000_000


def cosine(count, init, steps, end):
    return end + (init - end) * 0.5 * (1 + math.cos(math.pi * min(count / steps, 1)))


def linear(count, init, steps, end):
    return init + (end - init) * min(count / steps, 1)


CASES = [
    (jr.Constant(0.3), lambda n: 0.3),
    (jr.Linear(1e-3, 7), lambda n: linear(n, 1e-3, 7, 0)),
    (jr.Linear(0.0, 7, end=2.0), lambda n: linear(n, 0, 7, 2)),
    (jr.Cosine(1e-3, 9), lambda n: cosine(n, 1e-3, 9, 0)),
    (jr.Cosine(1e-3, 9, end=1e-4), lambda n: cosine(n, 1e-3, 9, 1e-4)),
    (jr.Warmup(0.5, 4), lambda n: 0.5 * min(n / 4, 1)),
    (jr.Warmup(jr.Cosine(1.0, 8), 4, init=0.2), lambda n: 0.2 + 0.8 * n / 4 if n < 4 else cosine(n - 4, 1, 8, 0)),
    (jr.Warmup(jr.Cosine(1.0, 8), 0), lambda n: cosine(n, 1, 8, 0)),
    (
        jr.Join((jr.Linear(0.0, 3, end=1.0), jr.Constant(1.0), jr.Cosine(1.0, 5)), (3, 6)),
        lambda n: n / 3 if n < 3 else 1.0 if n < 6 else cosine(n - 6, 1, 5, 0),
    ),
]


@pytest.mark.parametrize(("schedule", "formula"), CASES, ids=[repr(schedule) for schedule, _ in CASES])
def test_formula(schedule, formula):
    counts = np.arange(20)
    expected = [formula(n) for n in counts]
    np.testing.assert_allclose(schedule(jnp.asarray(counts)), expected, rtol=1e-6, atol=1e-7)
    for n in (0, 3, 4, 6, 19):
        np.testing.assert_allclose(jax.jit(schedule)(n), expected[n], rtol=1e-6, atol=1e-7)
    assert schedule(jnp.asarray(3)).dtype == jnp.float32


@pytest.mark.parametrize("make", [jr.Linear, jr.Cosine])
def test_a_million_steps_keep_their_digits(make):
    """Also the last ones before 0, where 1 + cos would cancel."""
    counts = np.concatenate([np.arange(1000), np.arange(MILLION - 1000, MILLION), np.arange(0, MILLION, 997)])
    formula = {
        jr.Linear: lambda n: 1e-3 * (MILLION - n) / MILLION,
        jr.Cosine: lambda n: 1e-3 * np.sin(np.pi / 2 * ((MILLION - n) / MILLION)) ** 2,
    }[make]
    np.testing.assert_allclose(make(1e-3, MILLION)(jnp.asarray(counts)), formula(counts), rtol=1e-6)


@pytest.mark.parametrize("schedule", [schedule for schedule, _ in CASES], ids=repr)
def test_ends_are_exact_and_values_are_plain(schedule):
    copy = pickle.loads(pickle.dumps(schedule))
    assert copy == schedule
    assert hash(copy) == hash(schedule)
    assert eval(repr(schedule), vars(jr)) == schedule
    assert jr.Cosine(0.1, 10)(0) == np.float32(0.1)
    assert jr.Cosine(0.1, 10, end=0.3)(10) == np.float32(0.3)
    assert jr.Linear(0.1, 3, end=0.7)(5) == np.float32(0.7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jr.Linear(0.1, 0), "Linear: steps must be an integer >= 1, not 0"),
        (lambda: jr.Cosine(0.1, 2.5), "Cosine: steps must be an integer >= 1, not 2.5"),
        (lambda: jr.Warmup(0.1, -1), "Warmup: steps must be an integer >= 0, not -1"),
        (lambda: jr.Join((jr.Constant(1.0),), (3,)), "1 schedules have 0 boundaries between them, not 1"),
        (lambda: jr.Join((jr.Constant(1.0),) * 3, (6, 3)), r"boundaries must increase, not \(6, 3\)"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.x64
def test_float64_is_exact():
    assert jr.Cosine(0.1, 7)(3) == pytest.approx(cosine(3, 0.1, 7, 0), rel=1e-15)
