"""Averages of the parameters against NumPy, and the parameters to evaluate with through any nesting."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import stepped
from reference import core as ref
from table.row import each

import jaxopt_rules as jr

STEPS = 50
RNG = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(3, 2))), "b": jnp.asarray(RNG.normal(size=2))}
GRADS = [{"w": RNG.normal(size=(3, 2)), "b": RNG.normal(size=2)} for _ in range(STEPS)]
SGD = jr.sgd(0.1, 0.9)
ADAMW = jr.adamw(0.1)
close = partial(chex.assert_trees_all_close, rtol=1e-6, atol=1e-6)
same = chex.assert_trees_all_equal


def run(rule: jr.Rule, grads: list[Any], params: Any = PARAMS, state: Any = None, by_pair: bool = False) -> Any:
    """(parameters, state) behind each of these gradients, from those before the first on."""
    state = rule.init(params) if state is None else state
    passed = [(params, state)]
    for g in grads:
        passed.append(stepped(rule, *passed[-1], jax.tree.map(jnp.asarray, g), by_pair=by_pair))
    return passed


def evaluated(passed: Any) -> list[Any]:
    return [jr.eval_params(state, params) for params, state in passed]


def weighted(weights: Any, samples: Any) -> Any:
    total = sum(weights)
    return {key: sum(w * x[key] for w, x in zip(weights, samples, strict=True)) / total for key in PARAMS}


def ema_weights(rates: list[float]) -> list[float]:
    """Of each sample: its share, and then what the later ones left of it."""
    return [(1 - rate) * np.prod(rates[i + 1 :]) for i, rate in enumerate(rates)]


def debiased(n: int) -> list[float]:
    return ema_weights([0.9] * n)


def biased(n: int) -> list[float]:
    return ema_weights([0.0] + [0.9] * (n - 1))


def warming_up(n: int) -> list[float]:
    return ema_weights([min(0.9, (1 + i) / (10 + i)) for i in range(n)])


def warming_up_biased(n: int) -> list[float]:
    return ema_weights([0.0] + [min(0.9, (1 + i) / (10 + i)) for i in range(1, n)])


def rising(count):
    return count / (count + 3.0)


def under_a_schedule(n: int) -> list[float]:
    return ema_weights([rising(count) for count in range(n)])


def equal(n: int) -> list[float]:
    return [1.0] * n


def last_three(n: int) -> list[float]:
    return [0.0] * (n - 3) + [1.0] * min(n, 3)


@pytest.mark.parametrize(
    "precision", [pytest.param(1e-6, id="f32"), pytest.param(1e-12, id="f64", marks=pytest.mark.x64)]
)
@pytest.mark.parametrize("by_pair", [False, True], ids=["apply", "pair"])
@pytest.mark.parametrize(
    ("make", "weights", "start", "every"),
    [
        (lambda: jr.average(SGD, 0.9), debiased, 0, 1),
        (lambda: jr.average(SGD, 0.9, debias=False), biased, 0, 1),
        (lambda: jr.average(SGD, 0.9, warmup=True), warming_up, 0, 1),
        (lambda: jr.average(SGD, 0.9, warmup=True, debias=False), warming_up_biased, 0, 1),
        (lambda: jr.average(SGD, rising), under_a_schedule, 0, 1),
        (lambda: jr.average(SGD, 0.9, start=5, every=3), debiased, 5, 3),
        (lambda: jr.average(SGD, 0.9, debias=False, start=7), biased, 7, 1),
        (lambda: jr.average(SGD, None), equal, 0, 1),
        (lambda: jr.average(SGD, None, debias=False, start=10, every=4), equal, 10, 4),
        (lambda: jr.average(SGD, window=3), last_three, 0, 1),
        (lambda: jr.average(SGD, window=3, start=4, every=5), last_three, 4, 5),
    ],
    ids=[
        "ema", "ema biased", "ema warmup", "ema warmup biased", "ema schedule", "ema start every", "ema biased start",
        "swa", "swa start every", "lawa", "lawa start every",
    ],
)  # fmt: skip
def test_an_average_is_the_weighted_mean_of_its_samples(make, weights, start, every, by_pair, precision):
    passed = run(make(), GRADS, by_pair=by_pair)
    wide = [{key: np.asarray(p, np.float64) for key, p in params.items()} for params, _ in passed]
    for n, actual in enumerate(evaluated(passed)):
        samples = [wide[t] for t in range(1, n + 1) if t > start and (t - start) % every == 0]
        expected = weighted(weights(len(samples)), samples) if samples else wide[n]
        chex.assert_trees_all_close(actual, expected, rtol=precision, atol=precision)


@pytest.mark.parametrize(
    "rule", [jr.average(SGD), jr.average(SGD, None, every=3), jr.average(SGD, window=3, start=2)], ids=repr
)
def test_an_average_leaves_the_rule_as_it_is(rule):
    plain, averaged = run(SGD, GRADS), run(rule, GRADS)
    close([params for params, _ in averaged], [params for params, _ in plain])
    close([state.inner for _, state in averaged], [state for _, state in plain])


@pytest.mark.parametrize(
    "precision", [pytest.param(1e-6, id="f32"), pytest.param(1e-12, id="f64", marks=pytest.mark.x64)]
)
@pytest.mark.parametrize("by_pair", [False, True], ids=["apply", "pair"])
@pytest.mark.parametrize(("every", "alpha"), [(1, 0.5), (6, 0.5), (3, 0.8), (2, 1.0), (2, 0.0)])
def test_lookahead(every, alpha, by_pair, precision):
    passed = run(jr.lookahead(SGD, every, alpha), GRADS, by_pair=by_pair)
    inner = ref.chain(each(ref.velocity, 0.9)(), each(ref.step, 0.1)())
    next(inner)
    fast = {key: np.asarray(p, np.float64) for key, p in PARAMS.items()}
    slow = fast
    for t, (params, state) in enumerate(passed[1:], 1):
        updates = inner.send((GRADS[t - 1], fast))
        fast = {key: fast[key] + updates[key] for key in fast}
        if t % every == 0:
            slow = fast = {key: slow[key] + alpha * (fast[key] - slow[key]) for key in fast}
        chex.assert_trees_all_close(params, fast, rtol=precision, atol=5 * precision)
        chex.assert_trees_all_close(jr.eval_params(state, params), slow, rtol=precision, atol=5 * precision)


# The parameters to evaluate with


def mean_of(passed: Any, key: str) -> Any:
    return np.mean([params[key] for params, _ in passed[1:]], 0)


SWA = jr.average(SGD, None)


@pytest.mark.parametrize(
    "rule",
    [
        SWA,
        jr.chain(jr.clip_grad(1.0), SWA),
        jr.chain(clip=jr.clip_grad(1.0), rest=SWA),
        jr.chain(jr.chain(SWA), jr.record("norm", jr.global_norm)),
        jr.skip_nonfinite(SWA),
        jr.accumulate(SWA, 1),
        jr.partition({"a": SWA, "b": jr.chain(SWA)}, by={"a": "w"}),
        jr.average(jr.average(SGD, 0.5), None),
        jr.average(jr.lookahead(SGD, 2), None),
    ],
    ids=repr,
)
def test_eval_params_through(rule):
    passed = run(rule, GRADS[:9])
    actual = evaluated(passed)[-1]
    close(actual, {key: mean_of(passed, key) for key in PARAMS})
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, PARAMS)


@pytest.mark.parametrize("outer", [jr.average(jr.average(SGD, None), window=1), jr.lookahead(jr.average(SGD), 1, 1.0)])
def test_of_averages_within_averages_the_outermost_counts(outer):
    params, state = run(outer, GRADS[:5])[-1]
    close(jr.eval_params(state, params), params)


@pytest.mark.parametrize(
    "rule",
    [
        jr.partition({"a": SWA, "b": SGD}, by={"a": "w"}),
        jr.freeze(SWA, "b"),
        jr.partition({"a": SWA, "b": jr.freeze(jr.average(SGD, window=2), "b")}, by={"a": "w"}),
    ],
    ids=repr,
)
def test_parameters_that_are_not_averaged_are_themselves(rule):
    passed = run(rule, GRADS[:9])
    actual = evaluated(passed)[-1]
    close(actual["w"], mean_of(passed, "w"))
    same(actual["b"], passed[-1][0]["b"])


@pytest.mark.parametrize("by_pair", [False, True], ids=["apply", "pair"])
@pytest.mark.parametrize(
    "wrap",
    [
        jr.lookahead,
        jr.average,
        partial(jr.average, decay=None, every=2),
        partial(jr.average, debias=False),
        partial(jr.average, window=3),
    ],
)
def test_the_average_of_a_frozen_parameter_is_the_parameter(wrap, by_pair):
    passed = run(wrap(jr.freeze(ADAMW, "b")), GRADS[:8], by_pair=by_pair)
    for actual in evaluated(passed):
        same(actual["b"], PARAMS["b"])


@pytest.mark.parametrize("by_pair", [False, True], ids=["apply", "pair"])
@pytest.mark.parametrize("wrap", [jr.average, partial(jr.average, decay=None), partial(jr.average, window=3)])
def test_an_average_of_what_is_absent_at_times_lies_among_its_values(wrap, by_pair):
    grads = [g | {"b": None} if i % 3 != 2 else g for i, g in enumerate(GRADS[:9])]
    passed = run(wrap(SGD), grads, {"w": PARAMS["w"], "b": jnp.array([5.0, 6.0])}, by_pair=by_pair)
    values = np.array([params["b"] for params, _ in passed])
    for actual in evaluated(passed):
        assert (actual["b"] >= values.min(0) - 1e-6).all()
        assert (actual["b"] <= values.max(0) + 1e-6).all()


@pytest.mark.parametrize("by_pair", [False, True], ids=["apply", "pair"])
@pytest.mark.parametrize(
    "rule", [jr.lookahead(SGD, 1), jr.average(SGD), jr.average(SGD, None), jr.average(SGD, window=2)], ids=repr
)
def test_a_missing_gradient_leaves_parameter_and_average(rule, by_pair):
    start = run(rule, GRADS[:4], by_pair=by_pair)[-1]
    params, state = run(rule, [GRADS[4] | {"b": None}], *start, by_pair=by_pair)[-1]
    for slot in {"slow", "average", "recent"} & set(state._fields):
        same(getattr(state, slot)["b"], getattr(start[1], slot)["b"])
    same(params["b"], start[0]["b"])
    assert (params["w"] != start[0]["w"]).all()


def test_accumulate_averages_behind_updates_alone():
    passed = run(jr.accumulate(SWA, 3), GRADS[:10])
    close(evaluated(passed)[-1], weighted([1, 1, 1], [passed[n][0] for n in (3, 6, 9)]))


@pytest.mark.parametrize("rule", [jr.lookahead(SGD, 2), jr.average(SGD), jr.average(SGD, window=2)], ids=repr)
def test_parameters_in_bfloat16_have_float32_averages(rule):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    passed = run(rule, GRADS[:5], params)
    _, state = passed[-1]
    slot = next(getattr(state, name) for name in ("slow", "average", "recent") if name in state._fields)
    assert {x.dtype for x in jax.tree.leaves(slot)} == {jnp.dtype(jnp.float32)}
    chex.assert_trees_all_equal_shapes_and_dtypes(evaluated(passed)[-1], passed[-1][0], params)


def test_a_slow_average_of_bfloat16_moves():
    """Its steps are smaller than the spacing of bfloat16 numbers: kept in bfloat16, it would stay where it was."""
    params = {"w": jnp.full(3, 256.0, jnp.bfloat16)}
    rule = jr.average(jr.sgd(1.0), 0.999, debias=False)
    state = run(rule, [{"w": jnp.zeros(3)}] + [{"w": jnp.full(3, 2.0)}] * 40, params)[-1][1]
    assert (state.average["w"] < 255).all()


@pytest.mark.parametrize("state", [(), {}, {"a": 1}, jr.adamw().init(PARAMS), None], ids=lambda s: type(s).__name__)
def test_of_a_state_without_averages_the_parameters_are_returned(state):
    assert jr.eval_params(state, PARAMS) == PARAMS


@pytest.mark.parametrize("rule", [jr.average(SGD), jr.average(SGD, window=2), jr.lookahead(SGD, 2)], ids=repr)
def test_eval_params_stay_valid_when_state_and_parameters_are_donated(rule):
    params, state = run(rule, GRADS[:4])[-1]
    kept = jr.eval_params(state, params)
    donating = jax.jit(lambda params, state: rule.apply(params, state, params), donate_argnums=(0, 1))
    donating(params, state)
    assert not any(x.is_deleted() for x in jax.tree.leaves(kept))


@pytest.mark.parametrize("rule", [jr.lookahead(SGD, 1), jr.lookahead(SGD, 2), jr.average(SGD)], ids=repr)
def test_an_eager_step_returns_no_aliases(rule):
    params, state = PARAMS, rule.init(PARAMS)
    for g in GRADS[:2]:
        params, state = rule.apply(jax.tree.map(jnp.asarray, g), state, params)
    leaves = jax.tree.leaves((params, state))
    assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)


def test_lookahead_drops_into_a_scan_that_knows_plain_parameters():
    def loss(params):
        return sum(jnp.sum((p - 1) ** 2) for p in params.values())

    @jax.jit
    def train(params, state):
        def body(carry, _):
            params, state = carry
            updates, state = rule.update(jax.grad(loss)(params), state, params)
            return (jr.apply_updates(params, updates), state), loss(params)

        return jax.lax.scan(body, (params, state), length=200)

    rule = jr.lookahead(jr.sgd(0.1), 5)
    (params, state), losses = train(PARAMS, rule.init(PARAMS))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, PARAMS)
    close(jr.eval_params(state, params), jax.tree.map(jnp.ones_like, PARAMS))
    assert losses[-1] < 1e-8


@pytest.mark.parametrize("wrap", [jr.lookahead, jr.average, partial(jr.average, window=2)])
@pytest.mark.parametrize("call", ["update", "apply"])
def test_a_gradient_whose_parameter_had_no_slot_is_refused(wrap, call):
    rule = wrap(jr.sgd(0.1))
    with pytest.raises(ValueError, match=r"the state has no (slow|average|recent) for 'b'.*init again"):
        getattr(rule, call)(PARAMS, rule.init(PARAMS | {"b": None}), PARAMS)


@pytest.mark.parametrize("rule", [jr.average(SGD), jr.lookahead(SGD)], ids=repr)
def test_an_average_needs_the_parameters(rule):
    with pytest.raises(TypeError, match=r"needs the parameters: update\(grads, state, params\)"):
        rule.update(PARAMS, rule.init(PARAMS))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jr.average(SGD, 1.0), r"decay must lie in \[0, 1\), not 1.0"),
        (lambda: jr.average(SGD, start=-1), "start must be an integer >= 0, not -1"),
        (lambda: jr.average(SGD, every=0), "every must be an integer >= 1, not 0"),
        (lambda: jr.average(SGD, window=True), "window must be an integer >= 1, not True"),
        (lambda: jr.lookahead(SGD, 0), "every must be a whole number, at least 1, not 0"),
        (lambda: jr.lookahead(SGD, alpha=float("nan")), "alpha must be a number, not nan"),
    ],
)
def test_rejected(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Target networks

NEW = jax.tree.map(lambda p: p + 1, PARAMS)


@pytest.mark.parametrize("step_size", [0.0, 0.005, 1.0])
def test_incremental_update(step_size):
    expected = {key: (1 - step_size) * PARAMS[key] + step_size * NEW[key] for key in PARAMS}
    close(jax.jit(jr.incremental_update)(NEW, PARAMS, step_size), expected)


@pytest.mark.parametrize(("count", "renewed"), [(0, True), (1, False), (2, False), (3, True)])
def test_periodic_update(count, renewed):
    same(jax.jit(jr.periodic_update, static_argnums=3)(NEW, PARAMS, count, 3), NEW if renewed else PARAMS)


UPDATES = pytest.mark.parametrize(
    "update",
    [lambda new, old: jr.incremental_update(new, old, 0.5), lambda new, old: jr.periodic_update(new, old, 0, 2)],
)


@UPDATES
def test_a_target_keeps_its_dtypes_and_what_is_no_array_of_floats(update):
    old = {"w": jnp.ones(2, jnp.bfloat16), "n": jnp.arange(2), "f": jnp.tanh, "none": None}
    new = {"w": jnp.full(2, 3.0), "n": jnp.arange(2) + 5, "f": jnp.sin, "none": None}
    target = update(new, old)
    assert target["w"].dtype == jnp.bfloat16
    assert (target["n"], target["f"], target["none"]) == (old["n"], jnp.tanh, None)


@UPDATES
def test_a_target_of_another_tree_is_refused(update):
    with pytest.raises(ValueError, match="the new tree must be a tree like the old one, but it lacks 'b'"):
        update({"w": NEW["w"]}, PARAMS)


@UPDATES
def test_a_target_of_another_shape_is_refused(update):
    with pytest.raises(ValueError, match=r"the new tree has shape \(1,\) at 'b', not \(2,\)"):
        update(NEW | {"b": jnp.ones(1)}, PARAMS)


@pytest.mark.parametrize("by_pair", [False, True])
def test_the_slope_of_a_synchronised_step(by_pair):
    """Half of the way back: half of the slope, also where the slow weight is where the fast one is."""

    def end(g):
        rule, params = jr.lookahead(jr.sgd(1.0), 1, 0.5), {"w": jnp.ones(())}
        state = rule.init(params)
        if not by_pair:
            return rule.apply({"w": g}, state, params)[0]["w"]
        return jr.apply_updates(params, rule.update({"w": g}, state, params)[0])["w"]

    np.testing.assert_allclose(jax.grad(end)(0.0), -0.5, rtol=1e-6)


@pytest.mark.parametrize("by_pair", [False, True])
def test_the_average_of_what_is_frozen_stays(by_pair):
    rule = jr.average(jr.freeze(jr.sgd(0.1), "a"), decay=0.5)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    moved = params | {"a": jnp.full(1, 7.0)}
    _, state = stepped(rule, moved, rule.init(params), params, by_pair=by_pair)
    same(state.average["a"], params["a"])
