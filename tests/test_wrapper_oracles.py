"""Rules around rules against PyTorch and Optax, in float64. Needs the dependency group `oracles`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_rules as jr

pytestmark = [pytest.mark.oracle, pytest.mark.x64]

STEPS = 50
RNG = np.random.default_rng(0)
PARAMS = {"a": jnp.asarray(RNG.normal(size=(4, 3))), "b": jnp.asarray(RNG.normal(size=5))}
GRADS = [{"a": jnp.asarray(RNG.normal(size=(4, 3))), "b": jnp.asarray(RNG.normal(size=5))} for _ in range(STEPS)]
# Of few bits: the accumulator of Optax is float32 even among 64-bit types, and holds their sums exactly.
COARSE = [jax.tree.map(lambda g: jnp.round(64 * g) / 64, g) for g in GRADS]
BAD = jax.tree.map(lambda g: g.at[0].set(jnp.nan), GRADS[0])


def trajectory(rule, grads, params=PARAMS):
    state, passed = rule.init(params), []
    apply = jax.jit(lambda params, state, g: rule.apply(g, state, params))
    for g in grads:
        params, state = apply(params, state, g)
        passed.append(params)
    return passed


def trajectory_of_optax(optax, transform, grads, params=PARAMS):
    state, passed = transform.init(params), []

    @jax.jit
    def apply(params, state, g):
        updates, state = transform.update(g, state, params)
        return optax.apply_updates(params, updates), state

    for g in grads:
        params, state = apply(params, state, g)
        passed.append(params)
    return passed


def close(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


def values() -> list[float]:
    """A loss that falls, halts and jumps."""
    rng = np.random.default_rng(1)
    return [float(x) for x in 2 + np.maximum(3 - np.arange(200) / 20, 0) + 0.3 * rng.normal(size=200)]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"factor": 0.5, "patience": 2}, {"factor": 0.5, "patience": 2}),
        ({"factor": 0.5, "patience": 0, "cooldown": 3}, {"factor": 0.5, "patience": 0, "cooldown": 3}),
        ({"patience": 3, "threshold": 0.05}, {"patience": 3, "threshold": 0.05}),
        ({"factor": 0.7, "patience": 1, "min_scale": 0.1}, {"factor": 0.7, "patience": 1, "min_lr": 0.01}),
        ({"factor": 0.5, "patience": 4, "mode": "max"}, {"factor": 0.5, "patience": 4, "mode": "max"}),
    ],
    ids=["default", "patience", "cooldown", "threshold", "min", "max"],
)
@pytest.mark.parametrize("nan_at", [None, 0, 30])
def test_reduce_on_plateau_is_that_of_pytorch_one_step_earlier(ours, theirs, nan_at):
    """PyTorch's scheduler is told a value behind the step, so that the next one is the first that is smaller; here the
    step that is given the value is. The learning rate behind `scheduler.step(value)` is that of this very step."""
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], 0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, eps=0, **theirs)
    rule, params = jr.chain(jr.sgd(0.1), jr.reduce_on_plateau(**ours)), jnp.zeros(1)
    state = rule.init(params)
    update = jax.jit(lambda state, value: rule.update(jnp.ones(1), state, params, value=value))
    for step, value in enumerate(values()):
        value = float("nan") if step == nan_at else value
        scheduler.step(value)
        updates, state = update(state, value)
        np.testing.assert_allclose(-updates[0], optimizer.param_groups[0]["lr"], rtol=1e-12)
    assert optimizer.param_groups[0]["lr"] < 0.1


@pytest.mark.parametrize(("k", "reduce"), [(1, "mean"), (2, "mean"), (1, "sum"), (2, "sum"), (3, "sum"), (7, "sum")])
def test_accumulate_is_multi_steps(k, reduce):
    optax = pytest.importorskip("optax")
    transform = optax.MultiSteps(optax.adamw(0.1, weight_decay=0.1), k, use_grad_mean=reduce == "mean")
    rule = jr.accumulate(jr.adamw(0.1, weight_decay=0.1), k, reduce=reduce)
    close(trajectory(rule, COARSE), trajectory_of_optax(optax, transform, COARSE))


def test_accumulate_with_a_schedule_is_multi_steps():
    optax = pytest.importorskip("optax")

    def every(count):
        return jnp.where(count < 5, 2, 5)

    transform = optax.MultiSteps(optax.adamw(0.1), every, use_grad_mean=False)
    rule = jr.accumulate(jr.adamw(0.1, weight_decay=1e-4), every, reduce="sum")
    close(trajectory(rule, COARSE), trajectory_of_optax(optax, transform, COARSE))


def test_accumulate_around_a_rule_of_optax():
    optax = pytest.importorskip("optax")
    expected = trajectory_of_optax(optax, optax.MultiSteps(optax.adam(0.1), 3, use_grad_mean=False), COARSE)
    close(trajectory(jr.accumulate(optax.adam(0.1), 3, reduce="sum"), COARSE), expected)


@pytest.mark.parametrize("wrap", [jr.average, lambda rule: jr.average(rule, window=3), jr.skip_nonfinite])
def test_around_a_rule_of_optax(wrap):
    optax = pytest.importorskip("optax")
    close(trajectory(wrap(optax.adam(0.1)), GRADS), trajectory_of_optax(optax, optax.adam(0.1), GRADS))


@pytest.mark.parametrize(("every", "alpha"), [(6, 0.5), (3, 0.8)])
def test_lookahead_is_that_of_optax(every, alpha):
    """Whose parameters are a pair of the fast and the slow weights."""
    optax = pytest.importorskip("optax")
    transform = optax.lookahead(optax.sgd(0.1, 0.9), every, alpha)
    start = optax.LookaheadParams.init_synced(PARAMS)
    expected = trajectory_of_optax(optax, transform, GRADS, start)
    rule, params = jr.lookahead(jr.sgd(0.1, 0.9), every, alpha), PARAMS
    state = rule.init(params)
    for g, pair in zip(GRADS, expected, strict=True):
        params, state = rule.apply(g, state, params)
        close(params, pair.fast)
        close(jr.eval_params(state, params), pair.slow)


def test_skip_nonfinite_is_apply_if_finite_as_long_as_that_skips():
    optax = pytest.importorskip("optax")
    grads = [BAD if i % 3 == 1 else g for i, g in enumerate(GRADS)]
    transform = optax.apply_if_finite(optax.adamw(0.1, weight_decay=0.1), max_consecutive_errors=5)
    expected = trajectory_of_optax(optax, transform, grads)
    close(trajectory(jr.skip_nonfinite(jr.adamw(0.1, weight_decay=0.1)), grads), expected)


def test_skip_nonfinite_never_takes_the_nan_that_apply_if_finite_takes():
    optax = pytest.importorskip("optax")
    grads = [GRADS[0], BAD, BAD, BAD, GRADS[1]]
    theirs = trajectory_of_optax(optax, optax.apply_if_finite(optax.adam(0.1), max_consecutive_errors=2), grads)[-1]
    ours = trajectory(jr.skip_nonfinite(jr.adam(0.1)), grads)[-1]
    assert bool(jnp.isnan(theirs["b"]).any())
    close(ours, trajectory(jr.adam(0.1), [GRADS[0], GRADS[1]])[-1])


@pytest.mark.parametrize("step_size", [0.0, 0.005, 1.0])
def test_incremental_update_is_that_of_optax(step_size):
    optax = pytest.importorskip("optax")
    close(jr.incremental_update(GRADS[0], PARAMS, step_size), optax.incremental_update(GRADS[0], PARAMS, step_size))


@pytest.mark.parametrize("count", range(5))
def test_periodic_update_is_that_of_optax(count):
    optax = pytest.importorskip("optax")
    steps = jnp.array(count)
    close(jr.periodic_update(GRADS[0], PARAMS, steps, 2), optax.periodic_update(GRADS[0], PARAMS, steps, 2))


@pytest.mark.parametrize("state", ["adam", "MultiSteps", "lookahead", "ema"])
def test_a_state_of_optax_has_no_averages_of_ours(state):
    optax = pytest.importorskip("optax")
    made = {
        "adam": lambda: optax.adam(0.1).init(PARAMS),
        "MultiSteps": lambda: optax.MultiSteps(optax.adam(0.1), 2).init(PARAMS),
        "lookahead": lambda: optax.lookahead(optax.sgd(0.1), 2, 0.5).init(optax.LookaheadParams.init_synced(PARAMS)),
        "ema": lambda: optax.chain(optax.ema(0.9), optax.sgd(0.1)).init(PARAMS),
    }
    assert jr.eval_params(made[state](), PARAMS) == PARAMS
