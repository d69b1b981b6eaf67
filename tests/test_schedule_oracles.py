"""Schedules against PyTorch's schedulers and the formulas of transformers, in float64, at every update.

Both see the number of finished updates: `scheduler.step()` follows `optimizer.step()`. Needs the dependency group
`oracles`.
"""

import math

import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_rules as jr

pytestmark = [pytest.mark.oracle, pytest.mark.x64]

RATE = 0.1
UPDATES = 60


def used_by_pytorch(make, updates):
    """The rates and momenta of the first `updates` updates under the scheduler make(lr_scheduler, optimizer)."""
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], RATE, momentum=0.9)
    scheduler = make(torch.optim.lr_scheduler, optimizer)
    used = []
    for update in range(updates):
        used.append([optimizer.param_groups[0][name] for name in ("lr", "momentum")])
        optimizer.step()
        if update < updates - 1:
            scheduler.step()
    return np.asarray(used).T


def assert_equal(schedule, expected):
    np.testing.assert_allclose(schedule(jnp.arange(len(expected))), expected, rtol=1e-12, atol=1e-15)


PYTORCH = {
    "LinearLR": (jr.Linear(RATE / 3, 20, end=RATE), lambda s, o: s.LinearLR(o, total_iters=20)),
    "PolynomialLR": (jr.Polynomial(RATE, 20, power=2.5), lambda s, o: s.PolynomialLR(o, total_iters=20, power=2.5)),
    "ExponentialLR": (jr.Exponential(RATE, 1, 0.9), lambda s, o: s.ExponentialLR(o, gamma=0.9)),
    "StepLR": (jr.Exponential(RATE, 7, 0.3, staircase=True), lambda s, o: s.StepLR(o, step_size=7, gamma=0.3)),
    "MultiStepLR": (
        jr.Piecewise(RATE, {5: 0.3, 6: 0.3, 40: 0.3}),
        lambda s, o: s.MultiStepLR(o, milestones=[5, 6, 40], gamma=0.3),
    ),
    "CosineAnnealingWarmRestarts": (
        jr.CosineRestarts(RATE, 7, end=0.01),
        lambda s, o: s.CosineAnnealingWarmRestarts(o, T_0=7, eta_min=0.01),
    ),
    "CosineAnnealingWarmRestarts, T_mult": (
        jr.CosineRestarts(RATE, 4, mult=3, end=0.01),
        lambda s, o: s.CosineAnnealingWarmRestarts(o, T_0=4, T_mult=3, eta_min=0.01),
    ),
}


@pytest.mark.parametrize("name", PYTORCH)
def test_pytorch(name):
    schedule, make = PYTORCH[name]
    assert_equal(schedule, used_by_pytorch(make, UPDATES)[0])


def test_cosine_annealing_until_t_max():
    """PyTorch's rises again after `T_max`; ours stays at the end."""
    schedule = jr.Cosine(RATE, 20, end=0.01)
    rates, _ = used_by_pytorch(lambda s, o: s.CosineAnnealingLR(o, T_max=20, eta_min=0.01), 30)
    assert_equal(schedule, rates[:21])
    assert rates[29] > 2 * schedule(29)


@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize(("strategy", "shape"), [("cos", "cosine"), ("linear", "linear")])
@pytest.mark.parametrize(("total", "fraction"), [(50, 0.3), (47, 0.37)])
def test_one_cycle_is_off_by_one(total, fraction, strategy, shape, three_phase):
    """PyTorch's has its peak at count fraction · total − 1, between two counts for 47, and its end at total − 1."""
    rates, momenta = used_by_pytorch(
        lambda s, o: s.OneCycleLR(
            o, RATE, total_steps=total, pct_start=fraction, anneal_strategy=strategy, three_phase=three_phase
        ),
        total,
    )
    schedule = jr.OneCycle(
        RATE, total - 1, warmup=(fraction * total - 1) / (total - 1), shape=shape, three_phase=three_phase
    )
    assert_equal(schedule, rates)
    assert_equal(schedule.momentum(), momenta)


@pytest.mark.parametrize("mode", ["triangular", "triangular2", "exp_range"])
@pytest.mark.parametrize("down", [None, 3, 11])
def test_cyclic(mode, down):
    """Also the momentum, whose cycle goes down first."""
    gamma = 0.97 if mode == "exp_range" else 1.0
    rates, momenta = used_by_pytorch(lambda s, o: s.CyclicLR(o, 0.01, RATE, 7, down, mode=mode, gamma=gamma), UPDATES)
    assert_equal(jr.Cyclic(0.01, RATE, 7, down, mode, gamma), rates)
    assert_equal(jr.Cyclic(0.9, 0.8, 7, down, mode, gamma), momenta)


# ---------------------------------------------------------------------------------------------------------------------
# transformers: its functions of the step, by their names there, for W steps of warm-up and T steps in all
# ---------------------------------------------------------------------------------------------------------------------

W, T = 6, 54


def get_linear_schedule_with_warmup(step):
    if step < W:
        return step / max(1, W)
    return max(0.0, (T - step) / max(1, T - W))


def get_cosine_schedule_with_warmup(step, num_cycles=0.5):
    if step < W:
        return step / max(1, W)
    progress = (step - W) / max(1, T - W)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * progress)))


def get_cosine_with_min_lr_schedule_with_warmup(step, min_lr_rate=0.2):
    """Its warm-up is not raised by the floor."""
    return step / W if step < W else get_cosine_schedule_with_warmup(step) * (1 - min_lr_rate) + min_lr_rate


def get_cosine_with_hard_restarts_schedule_with_warmup(step, num_cycles=3):
    if step < W:
        return step / max(1, W)
    progress = (step - W) / max(1, T - W)
    if progress >= 1.0:
        return 0.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((num_cycles * progress) % 1.0))))


def get_polynomial_decay_schedule_with_warmup(step, lr_end=1e-3, power=2.0):
    if step < W:
        return step / max(1, W)
    if step > T:
        return lr_end / RATE
    remaining = 1 - (step - W) / (T - W)
    return ((RATE - lr_end) * remaining**power + lr_end) / RATE


def get_inverse_sqrt_schedule(step, timescale=None):
    timescale = timescale or W or 10_000
    if step < W:
        return step / max(1, W)
    return 1.0 / math.sqrt((step + timescale - W) / timescale)


def get_wsd_schedule(step, decay_type, num_decay_steps=20, min_lr_ratio=0.1):
    stable = T - W - num_decay_steps
    if step < W:
        return step / max(1, W) * (1.0 - min_lr_ratio) + min_lr_ratio
    if step < W + stable:
        return 1.0
    if step >= W + stable + num_decay_steps:
        return min_lr_ratio
    progress = (step - W - stable) / max(1, num_decay_steps)
    factor = {
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "1-sqrt": 1.0 - math.sqrt(progress),
    }[decay_type]
    return factor * (1.0 - min_lr_ratio) + min_lr_ratio


TRANSFORMERS = [
    (jr.Warmup(jr.Linear(RATE, T - W), W), get_linear_schedule_with_warmup),
    (jr.Warmup(jr.Cosine(RATE, T - W), W), get_cosine_schedule_with_warmup),
    (jr.Warmup(jr.Cosine(RATE, T - W, end=0.02), W), get_cosine_with_min_lr_schedule_with_warmup),
    (
        jr.Warmup(jr.Join((jr.CosineRestarts(RATE, (T - W) // 3), jr.Constant(0.0)), (T - W,)), W),
        get_cosine_with_hard_restarts_schedule_with_warmup,
    ),
    (jr.Warmup(jr.Polynomial(RATE, T - W, 1e-3, 2.0), W), get_polynomial_decay_schedule_with_warmup),
    (jr.InverseSqrt(RATE, W), get_inverse_sqrt_schedule),
    (jr.InverseSqrt(RATE, W, timescale=20), lambda step: get_inverse_sqrt_schedule(step, 20)),
    *[
        (
            jr.WarmupStableDecay(RATE, T, W, 20, 0.1 * RATE, 0.1 * RATE, shape),
            lambda step, shape=shape: get_wsd_schedule(step, shape),
        )
        for shape in ("linear", "cosine", "1-sqrt")
    ],
]


@pytest.mark.parametrize(("schedule", "factor"), TRANSFORMERS, ids=[repr(schedule) for schedule, _ in TRANSFORMERS])
def test_transformers(schedule, factor):
    after_the_end = T if factor is get_cosine_schedule_with_warmup or "min_lr" in factor.__name__ else UPDATES
    assert_equal(schedule, [RATE * factor(step) for step in range(after_the_end + 1)])


def test_attention_is_all_you_need():
    d, warmup = 512, 10
    t = np.arange(1, UPDATES)
    expected = d**-0.5 * np.minimum(t**-0.5, t * warmup**-1.5)
    np.testing.assert_allclose(jr.InverseSqrt((d * warmup) ** -0.5, warmup)(jnp.asarray(t)), expected, rtol=1e-12)


def test_t5():
    warmup = 10
    schedule = jr.Join((jr.Constant(warmup**-0.5), jr.InverseSqrt(warmup**-0.5, 0, warmup)), (warmup,))
    assert_equal(schedule, 1 / np.sqrt(np.maximum(np.arange(UPDATES), warmup)))
