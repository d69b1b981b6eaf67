"""Schedules against the plain formulas in float64, at every count, and as values."""

import math
import operator
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit

import jaxopt_rules as jr

MILLION = 1_000_000


# ---------------------------------------------------------------------------------------------------------------------
# The formulas, on Python numbers
# ---------------------------------------------------------------------------------------------------------------------

SHAPES = {
    "linear": lambda p: 1 - p,
    # ½(1 + cos πp), which keeps no digits at the end even in float64.
    "cosine": lambda p: math.cos(math.pi / 2 * p) ** 2,
    "1-sqrt": lambda p: 1 - math.sqrt(p),
    "square": lambda p: 1 - p**2,
    "rex": lambda p: (1 - p) / (1 - p / 2),
}


def run(shape, n, init, steps, end=0.0):
    return end + (init - end) * SHAPES[shape](min(n / steps, 1))


def cosine(n, init, steps, end=0.0):
    return run("cosine", n, init, steps, end)


def polynomial(n, init, steps, end, power):
    return end + (init - end) * (1 - min(n / steps, 1)) ** power


def piecewise(n, init, factors):
    return init * math.prod(factor for boundary, factor in factors.items() if n >= boundary)


def inverse_sqrt(n, peak, warmup, timescale):
    return peak * n / warmup if n < warmup else peak * math.sqrt(timescale / (n - warmup + timescale))


def restarts(n, init, steps, mult=1, end=0.0, decay=1.0):
    while n >= steps:
        if mult == 1:
            return restarts(n % steps, init * decay ** (n // steps), steps, 1, end)
        n, init, steps = n - steps, init * decay, steps * mult
    return cosine(n, init, steps, end)


def one_cycle(n, steps, rise, levels, shape):
    """`rise` may lie between two counts; with four levels there are three phases."""
    knots = [0, rise, steps] if len(levels) == 3 else [0, rise, 2 * rise, steps]
    n = min(n, steps)
    k = max(k for k in range(len(levels) - 1) if n >= knots[k])
    return run(shape, n - knots[k], levels[k], knots[k + 1] - knots[k], levels[k + 1])


def cyclic(n, low, high, up, down, scale):
    cycle, within = divmod(n, up + down)
    height = within / up if within < up else (up + down - within) / down
    return low + (high - low) * height * scale(cycle)


def wsd(n, peak, steps, warmup, decay, init, end, shape):
    if n < warmup:
        return init + (peak - init) * n / warmup
    n = max(n - (steps - decay), 0)
    if shape == "exponential":
        return peak * (end / peak) ** min(n / decay, 1)
    return run(shape, n, peak, decay, end)


CASES = [
    (jr.Constant(0.3), lambda n: 0.3),
    (jr.Linear(1e-3, 7), lambda n: run("linear", n, 1e-3, 7)),
    (jr.Linear(0.0, 7, end=2.0), lambda n: run("linear", n, 0, 7, 2)),
    (jr.Cosine(1e-3, 9), lambda n: cosine(n, 1e-3, 9)),
    (jr.Cosine(1e-3, 9, end=1e-4), lambda n: cosine(n, 1e-3, 9, 1e-4)),
    (jr.Rex(1e-3, 9), lambda n: run("rex", n, 1e-3, 9)),
    (jr.Rex(0.1, 9, end=1.0), lambda n: run("rex", n, 0.1, 9, 1)),
    (jr.Polynomial(0.1, 9), lambda n: polynomial(n, 0.1, 9, 0, 1)),
    (jr.Polynomial(0.1, 9, end=1e-3, power=2.5), lambda n: polynomial(n, 0.1, 9, 1e-3, 2.5)),
    (jr.Polynomial(0.0, 9, end=0.1, power=0.5), lambda n: polynomial(n, 0, 9, 0.1, 0.5)),
    (jr.Exponential(0.1, 5, 0.3), lambda n: 0.1 * 0.3 ** (n / 5)),
    (jr.Exponential(0.1, 5, 3.0), lambda n: 0.1 * 3 ** (n / 5)),
    (jr.Exponential(0.1, 5, 0.3, staircase=True, floor=0.01), lambda n: max(0.1 * 0.3 ** (n // 5), 0.01)),
    (jr.Piecewise(0.1, {3: 0.1, 12: 0.5}), lambda n: piecewise(n, 0.1, {3: 0.1, 12: 0.5})),
    (jr.Piecewise(0.1, {}), lambda n: 0.1),
    (jr.InverseSqrt(0.1, 4), lambda n: inverse_sqrt(n, 0.1, 4, 4)),
    (jr.InverseSqrt(0.1, 4, timescale=9), lambda n: inverse_sqrt(n, 0.1, 4, 9)),
    (jr.InverseSqrt(0.1, 0), lambda n: inverse_sqrt(n, 0.1, 0, 10_000)),
    (jr.CosineRestarts(0.1, 7), lambda n: restarts(n, 0.1, 7)),
    (jr.CosineRestarts(0.1, 7, end=0.01, decay=0.5), lambda n: restarts(n, 0.1, 7, 1, 0.01, 0.5)),
    (jr.CosineRestarts(0.1, 3, mult=2), lambda n: restarts(n, 0.1, 3, 2)),
    (jr.CosineRestarts(0.1, 2, mult=3, end=0.01, decay=0.5), lambda n: restarts(n, 0.1, 2, 3, 0.01, 0.5)),
    (jr.OneCycle(0.1, 20), lambda n: one_cycle(n, 20, 6, (0.004, 0.1, 4e-7), "cosine")),
    (
        jr.OneCycle(0.1, 21, warmup=0.35, div=10.0, final_div=2.0, shape="linear"),
        lambda n: one_cycle(n, 21, 7.35, (0.01, 0.1, 0.005), "linear"),
    ),
    (
        jr.OneCycle(0.1, 20, warmup=0.33, three_phase=True),
        lambda n: one_cycle(n, 20, 6.6, (0.004, 0.1, 0.004, 4e-7), "cosine"),
    ),
    (jr.OneCycle(0.1, 20, warmup=0.0), lambda n: one_cycle(n, 20, 0, (0.004, 0.1, 4e-7), "cosine")),
    (jr.OneCycle(0.1, 20).momentum(0.8, 0.9), lambda n: one_cycle(n, 20, 6, (0.9, 0.8, 0.9), "cosine")),
    (jr.Cyclic(0.01, 0.1, 4), lambda n: cyclic(n, 0.01, 0.1, 4, 4, lambda cycle: 1)),
    (
        jr.Cyclic(0.9, 0.8, 4, steps_down=3, mode="triangular2"),
        lambda n: cyclic(n, 0.9, 0.8, 4, 3, lambda cycle: 0.5**cycle),
    ),
    (
        jr.Cyclic(0.01, 0.1, 2, steps_down=5, mode="exp_range", gamma=0.9),
        lambda n: cyclic(n, 0.01, 0.1, 2, 5, lambda cycle: 0.9**n),
    ),
    *[
        (
            jr.WarmupStableDecay(0.1, 20, 4, 9, 0.01, 0.02, shape=shape),
            lambda n, shape=shape: wsd(n, 0.1, 20, 4, 9, 0.01, 0.02, shape),
        )
        for shape in (*SHAPES, "exponential")
    ],
    (jr.WarmupStableDecay(0.1, 20, 0, 20), lambda n: wsd(n, 0.1, 20, 0, 20, 0, 0, "linear")),
    (jr.Warmup(0.5, 4), lambda n: 0.5 * min(n / 4, 1)),
    (jr.Warmup(jr.Cosine(1.0, 8), 4, init=0.2), lambda n: 0.2 + 0.8 * n / 4 if n < 4 else cosine(n - 4, 1, 8)),
    (jr.Warmup(jr.Cosine(1.0, 8), 0), lambda n: cosine(n, 1, 8)),
    (
        jr.Join((jr.Linear(0.0, 3, end=1.0), jr.Constant(1.0), jr.Cosine(1.0, 5)), (3, 6)),
        lambda n: n / 3 if n < 3 else 1.0 if n < 6 else cosine(n - 6, 1, 5),
    ),
    (jr.Cosine(1.0, 9) * 0.1, lambda n: cosine(n, 1, 9) * 0.1),
    (2 * jr.Cosine(1.0, 9) / 3, lambda n: 2 * cosine(n, 1, 9) / 3),
    (1 / (1 + jr.Rex(1.0, 9)), lambda n: 1 / (1 + run("rex", n, 1, 9))),
    (1 - jr.Rex(1.0, 9) - (0.1 - jr.Constant(0.3)), lambda n: 1 - run("rex", n, 1, 9) + 0.2),
    (jr.Cosine(1.0, 9) * jr.Exponential(1.0, 4, 0.5), lambda n: cosine(n, 1, 9) * 0.5 ** (n / 4)),
    (jr.Rex(1.0, 9) / (jr.Constant(2.0) / jr.Constant(3.0)), lambda n: run("rex", n, 1, 9) * 1.5),
    ((jr.Cosine(1.0, 9) + 0.1).clip(0.2, 1.0), lambda n: min(max(cosine(n, 1, 9) + 0.1, 0.2), 1)),
    (jr.Cosine(1.0, 9).clip(high=0.5), lambda n: min(cosine(n, 1, 9), 0.5)),
    (jr.Warmup(jr.Cosine(1.0, 9) * 0.5, 4), lambda n: 0.5 * n / 4 if n < 4 else 0.5 * cosine(n - 4, 1, 9)),
]

every_case = pytest.mark.parametrize(("schedule", "formula"), CASES, ids=[repr(schedule) for schedule, _ in CASES])
every_schedule = pytest.mark.parametrize("schedule", [schedule for schedule, _ in CASES], ids=repr)

COUNTS = np.arange(40)


@every_case
def test_formula(schedule, formula):
    values = schedule(jnp.asarray(COUNTS))
    np.testing.assert_allclose(values, [formula(n) for n in COUNTS], rtol=1e-6, atol=1e-7)
    assert values.dtype == jnp.float32


@pytest.mark.x64
@every_case
def test_formula_in_float64(schedule, formula):
    values = schedule(jnp.asarray(COUNTS))
    np.testing.assert_allclose(values, [formula(n) for n in COUNTS], rtol=1e-14, atol=1e-15)
    assert values.dtype == jnp.float64


@every_schedule
def test_one_count_many_counts_and_transformations(schedule):
    counts = jnp.asarray(COUNTS)
    values = schedule(counts)
    assert jnp.shape(schedule(3)) == ()
    assert schedule(counts.reshape(4, 10)).shape == (4, 10)

    @quick_jit
    def program(n):
        return schedule(n), jax.lax.scan(lambda count, _: (count + 1, schedule(count)), 0, None, 40)[1]

    same = {
        "one by one": [schedule(n) for n in (0, 3, 39)],
        "vmap": jax.vmap(schedule)(counts)[np.array([0, 3, 39])],
        "jit": [program(n)[0] for n in (0, 3, 39)],
        "scan": program(0)[1][np.array([0, 3, 39])],
    }
    for way, found in same.items():
        np.testing.assert_allclose(found, np.asarray(values)[[0, 3, 39]], rtol=3e-7, atol=1e-8, err_msg=way)


@every_schedule
def test_they_are_values(schedule):
    copy = pickle.loads(pickle.dumps(schedule))
    assert copy == schedule
    assert hash(copy) == hash(schedule)
    written = eval(repr(schedule), vars(jr))
    assert written == schedule
    assert repr(written) == repr(schedule)


# ---------------------------------------------------------------------------------------------------------------------
# Digits
# ---------------------------------------------------------------------------------------------------------------------

WSD_MILLION = (1.0, MILLION, MILLION // 100, MILLION // 5, 0.0, 1e-4)

LONG = [
    (jr.Linear(1e-3, MILLION), lambda n: run("linear", n, 1e-3, MILLION)),
    (jr.Cosine(1e-3, MILLION), lambda n: cosine(n, 1e-3, MILLION)),
    (jr.Rex(1e-3, MILLION), lambda n: run("rex", n, 1e-3, MILLION)),
    (jr.Rex(0.0, MILLION, end=1.0), lambda n: (n / MILLION) / 2 / (1 - n / MILLION / 2)),
    (jr.Polynomial(1e-3, MILLION, power=2.0), lambda n: polynomial(n, 1e-3, MILLION, 0, 2)),
    (jr.Polynomial(0.0, MILLION, 1.0, 2.0), lambda n: n / MILLION * (2 - n / MILLION)),
    (jr.Exponential(1e-3, 1, 0.99995), lambda n: 1e-3 * 0.99995**n),
    (jr.Exponential(1e-3, 1, 1.00005), lambda n: 1e-3 * 1.00005**n),
    (jr.Exponential(1e-3, MILLION, 1e-8), lambda n: 1e-3 * 1e-8 ** (n / MILLION)),
    (jr.Exponential(1e-3, 7, 0.9999, staircase=True), lambda n: 1e-3 * 0.9999 ** (n // 7)),
    (jr.InverseSqrt(1e-3, 10_000), lambda n: inverse_sqrt(n, 1e-3, 10_000, 10_000)),
    (jr.CosineRestarts(1e-3, 1000, decay=0.99), lambda n: restarts(n, 1e-3, 1000, decay=0.99)),
    (jr.CosineRestarts(1e-3, 999, mult=3), lambda n: restarts(n, 1e-3, 999, 3)),
    (
        jr.OneCycle(1.0, MILLION, warmup=0.3000003),
        lambda n: one_cycle(n, MILLION, 300_000.3, (0.04, 1, 4e-6), "cosine"),
    ),
    (
        jr.OneCycle(1.0, MILLION, warmup=0.3000003, shape="linear", three_phase=True),
        lambda n: one_cycle(n, MILLION, 300_000.3, (0.04, 1, 0.04, 4e-6), "linear"),
    ),
    (
        jr.Cyclic(0.0, 1.0, 700, steps_down=300, mode="exp_range", gamma=0.99999),
        lambda n: cyclic(n, 0, 1, 700, 300, lambda cycle: 0.99999**n),
    ),
    *[
        (jr.WarmupStableDecay(*WSD_MILLION, shape=shape), lambda n, shape=shape: wsd(n, *WSD_MILLION, shape))
        for shape in (*SHAPES, "exponential")
    ],
]


@pytest.mark.parametrize(("schedule", "formula"), LONG, ids=[repr(schedule) for schedule, _ in LONG])
@pytest.mark.parametrize("transformation", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_million_steps_keep_their_digits(schedule, formula, transformation):
    """Also the first ones, the last ones, and those around every change of phase."""
    edges = [0, 10_000, 300_000, 600_001, MILLION * 4 // 5, MILLION]
    near = [np.arange(max(edge - 50, 0), min(edge + 50, MILLION)) for edge in edges]
    counts = np.concatenate([*near, np.arange(0, MILLION, 1997)])
    expected = [formula(int(n)) for n in counts]
    np.testing.assert_allclose(transformation(schedule)(jnp.asarray(counts)), expected, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize(
    ("schedule", "count", "value"),
    [
        (jr.Linear(0.1, 3, end=0.7), 0, 0.1),
        (jr.Linear(0.1, 3, end=0.7), 3, 0.7),
        (jr.Cosine(0.1, 10, end=0.3), 0, 0.1),
        (jr.Cosine(0.1, 10, end=0.3), 10, 0.3),
        (jr.Rex(0.1, 10, end=0.3), 0, 0.1),
        (jr.Rex(0.1, 10, end=0.3), 10, 0.3),
        (jr.Polynomial(0.1, 10, 0.3, 2.7), 0, 0.1),
        (jr.Polynomial(0.1, 10, 0.3, 2.7), 10, 0.3),
        (jr.Exponential(0.1, 10, 0.3), 0, 0.1),
        (jr.Piecewise(0.1, {5: 0.1}), 4, 0.1),
        (jr.Piecewise(0.1, {5: 0.1}), 5, 0.01),
        (jr.InverseSqrt(0.1, 10), 0, 0.0),
        (jr.InverseSqrt(0.1, 10), 10, 0.1),
        (jr.OneCycle(0.1, 100, div=1.0), 0, 0.1),
        (jr.OneCycle(0.1, 100), 30, 0.1),
        (jr.OneCycle(0.1, 100, three_phase=True, div=2.0), 60, 0.05),
        (jr.OneCycle(0.1, 100, div=2.0, final_div=5.0), 100, 0.01),
        (jr.OneCycle(0.1, 100).momentum(0.8, 0.9), 100, 0.9),
        (jr.Cyclic(0.1, 0.7, 6, 3), 6, 0.7),
        (jr.Cyclic(0.1, 0.7, 6, 3), 9, 0.1),
        (jr.Cyclic(0.0, 1.0, 6, 3, "triangular2"), 9 * 20 + 6, 2**-20),
        *[(jr.CosineRestarts(0.1, 1000), 1000 * k, 0.1) for k in (0, 1, 999, 2_000_000)],
        # The last cycle that begins below 2^31 is longer than any count.
        *[(jr.CosineRestarts(0.1, 10, mult=3), 5 * (3**k - 1), 0.1) for k in (0, 1, 10, 17)],
        *[(jr.CosineRestarts(0.1, 1, mult=2), 2**k - 1, 0.1) for k in (1, 23, 30)],
        *[
            (jr.WarmupStableDecay(0.1, 100, 10, 20, init=0.2, end=0.3, shape=shape), count, value)
            for shape in (*SHAPES, "exponential")
            for count, value in [(0, 0.2), (10, 0.1), (80, 0.1), (100, 0.3), (2**31 - 1, 0.3)]
        ],
    ],
    ids=lambda x: repr(x),
)
def test_corners_are_exact(schedule, count, value):
    assert schedule(count) == np.float32(value)
    assert jax.jit(schedule)(count) == np.float32(value)


@pytest.mark.parametrize(
    ("schedule", "peak"),
    [
        (jr.Warmup(jr.Cosine(1.0, 900), 100), 100),
        (jr.InverseSqrt(1.0, 100), 100),
        (jr.OneCycle(1.0, 1000), 300),
        (jr.OneCycle(1.0, 1000, shape="linear", three_phase=True), 300),
        (jr.WarmupStableDecay(1.0, 1000, 100, 900), 100),
        (jr.Cyclic(0.0, 1.0, 250, 750), 250),
        *[(make(1.0, 1000), 0) for make in (jr.Linear, jr.Cosine, jr.Rex, jr.Polynomial)],
    ],
    ids=repr,
)
def test_up_to_the_peak_and_down_from_it(schedule, peak):
    values = schedule(jnp.arange(1001))
    assert values[peak] == 1
    assert (jnp.diff(values[: peak + 1]) > 0).all()
    assert (jnp.diff(values[peak:]) < 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Errors, arithmetic, and in a rule
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jr.Linear(0.1, 0), "Linear: steps must be an integer >= 1, not 0"),
        (lambda: jr.Cosine(0.1, 2.5), "Cosine: steps must be an integer >= 1, not 2.5"),
        (lambda: jr.Rex(0.1, True), "Rex: steps must be an integer >= 1, not True"),
        (lambda: jr.Polynomial(0.1, 9, power=0.0), "Polynomial: power must be above 0, not 0.0"),
        (lambda: jr.Exponential(0.1, 9, -0.5), "Exponential: factor must be above 0, not -0.5"),
        (lambda: jr.Piecewise(0.1, {2.5: 0.1}), "Piecewise: factors must be a factor for each boundary, an integer"),
        (lambda: jr.InverseSqrt(0.1, 4, 0), "InverseSqrt: timescale must be an integer >= 1, not 0"),
        (lambda: jr.CosineRestarts(0.1, 4, mult=1.5), "CosineRestarts: mult must be an integer >= 1, not 1.5"),
        (lambda: jr.CosineRestarts(0.1, 4, decay=0.0), "CosineRestarts: decay must be above 0, not 0.0"),
        (lambda: jr.OneCycle(0.1, 9, warmup=3), r"OneCycle: warmup must be in \[0, 1\), not 3"),
        (
            lambda: jr.OneCycle(0.1, 9, 0.5, three_phase=True),
            r"warmup must be in \[0, 1/2\) with three phases, not 0.5",
        ),
        (
            lambda: jr.OneCycle(0.1, 9, shape="cos"),
            "OneCycle: shape must be one of 'linear', 'cosine', '1-sqrt', .*'cos'",
        ),
        (lambda: jr.Cyclic(0.1, 1.0, 4, mode="sawtooth"), "Cyclic: mode must be one of 'triangular', .*'sawtooth'"),
        (lambda: jr.Cyclic(0.1, 1.0, 4, gamma=0.9), "Cyclic: mode 'triangular' does not use gamma"),
        (lambda: jr.WarmupStableDecay(0.1, 9, 5, 5), r"must not take more than all 9 steps, as 5 \+ 5 do"),
        (lambda: jr.WarmupStableDecay(0.1, 9, 5, 0), "WarmupStableDecay: decay must be an integer >= 1, not 0"),
        (
            lambda: jr.WarmupStableDecay(0.1, 9, 1, 1, shape="exponential"),
            "end must be above 0 for an exponential decay",
        ),
        (lambda: jr.Warmup(0.1, -1), "Warmup: steps must be an integer >= 0, not -1"),
        (lambda: jr.Join((jr.Constant(1.0),), (3,)), "1 schedules have 0 boundaries between them, not 1"),
        (lambda: jr.Join((jr.Constant(1.0),) * 3, (6, 3)), r"boundaries must increase, not \(6, 3\)"),
        (lambda: jr.Constant(1.0).clip(0.2, 0.1), "clip: low must not exceed high, as 0.2 does 0.1"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("other", ["2", None, True, 1j, [2.0]])
@pytest.mark.parametrize("combine", [operator.add, operator.sub, operator.mul, operator.truediv])
def test_arithmetic_takes_numbers_and_schedules_alone(combine, other):
    with pytest.raises(TypeError):
        combine(jr.Linear(1.0, 3), other)
    with pytest.raises(TypeError):
        combine(other, jr.Linear(1.0, 3))


def test_a_traced_value_prints():
    printed = []

    def make(init):
        printed.append(repr(jr.Warmup(1.0, 10, init)))
        return init

    jax.eval_shape(make, 0.5)
    assert printed[0].startswith("Warmup(1.0, 10, init=")


def test_arithmetic_prints_as_it_was_written():
    a, b, c = jr.Rex(1.0, 2), jr.Rex(1.0, 3), jr.Rex(1.0, 4)
    assert repr(jr.Cosine(0.001, 100) * 0.1) == "Cosine(0.001, 100) * 0.1"
    assert repr((a + b) * c) == "(Rex(1.0, 2) + Rex(1.0, 3)) * Rex(1.0, 4)"
    assert repr(a + b * c) == "Rex(1.0, 2) + Rex(1.0, 3) * Rex(1.0, 4)"
    assert repr(a * b / c) == "Rex(1.0, 2) * Rex(1.0, 3) / Rex(1.0, 4)"
    assert repr(a / (b * c)) == "Rex(1.0, 2) / (Rex(1.0, 3) * Rex(1.0, 4))"
    assert repr((2 * a).clip(0.1)) == "(2 * Rex(1.0, 2)).clip(low=0.1)"
    assert repr(jr.Warmup(a / 2, 3)) == "Warmup(Rex(1.0, 2) / 2, 3)"
    assert repr(jr.adamw(a * 0.5)) == "adamw(Rex(1.0, 2) * 0.5)"


def test_arithmetic_with_functions_and_numpy_numbers():
    def halves(count):
        return 0.5**count

    for product in (jr.Linear(1.0, 4) * halves, halves * jr.Linear(1.0, 4)):
        np.testing.assert_allclose(product(jnp.arange(4)), [1, 0.375, 0.125, 0.03125])
    for product in (jr.Linear(1.0, 4) * np.float64(2), np.float64(2) * jr.Linear(1.0, 4)):
        assert product(2) == 1
    assert ((lambda count: 3.0) * jr.Constant(2.0))(0) == 6


def test_piecewise_takes_pairs_too_in_any_order():
    assert jr.Piecewise(0.1, ((6, 0.5), (3, 0.1))) == jr.Piecewise(0.1, {3: 0.1, 6: 0.5})


def test_as_hyperparameters():
    """One cycle of the rate and the inverse one of the momentum, in a scan."""
    cycle = jr.OneCycle(0.1, 20, div=5.0)
    rule = jr.adam(cycle, b1=cycle.momentum(0.8, 0.9))
    params = {"w": jnp.ones(3)}

    def step(carry, _):
        params, state = carry
        params, state = rule.apply(params, state, params)
        return (params, state), jr.hyperparams(state)

    _, used = jax.lax.scan(step, (params, rule.init(params)), None, 25)
    counts = jnp.arange(25)
    np.testing.assert_allclose(used["learning_rate"], cycle(counts), rtol=1e-6)
    np.testing.assert_allclose(used["b1"], cycle.momentum(0.8, 0.9)(counts), rtol=1e-6)
    assert used["learning_rate"].argmax() == used["b1"].argmin() == 6
