"""Rules that work on updates, or on whatever passes: project, reduce_on_plateau, record."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import stepped

import jaxopt_rules as jr

RNG = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(3, 2))), "b": jnp.asarray(RNG.normal(size=2))}
GRADS = [{"w": jnp.asarray(RNG.normal(size=(3, 2))), "b": jnp.asarray(RNG.normal(size=2))} for _ in range(20)]
ONES = jax.tree.map(jnp.ones_like, PARAMS)
NAN, INF = float("nan"), float("inf")
SGD = jr.sgd(1.0)
close = partial(chex.assert_trees_all_close, rtol=1e-6, atol=1e-6)
same = chex.assert_trees_all_equal


def run(rule: jr.Rule, grads: list[Any], params: Any = PARAMS, by_pair: bool = False) -> tuple[Any, Any]:
    state = rule.init(params)
    for g in grads:
        params, state = stepped(rule, params, state, g, by_pair=by_pair)
    return params, state


# project


def in_box(x):
    return jnp.clip(x, -0.3, 0.3)


def on_sphere(x):
    return x / jnp.linalg.norm(x)


def outside(tree, low, high):
    return sum(int(jnp.sum((x < low) | (x > high))) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("by_pair", [False, True], ids=["apply", "pair"])
@pytest.mark.parametrize("fn", [jax.nn.relu, in_box, on_sphere, jnp.abs])
def test_the_step_ends_where_its_projection_does(fn, by_pair):
    expected = PARAMS
    for g in GRADS:
        expected = jax.tree.map(lambda p, g: fn(p - g), expected, g)
    close(run(jr.chain(SGD, jr.project(fn)), GRADS, by_pair=by_pair)[0], expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda rule: rule,
        lambda rule: jr.accumulate(rule, 2),
        jr.skip_nonfinite,
        jr.average,
        lambda rule: jr.freeze(rule, lambda path, p: False),
        lambda rule: jr.partition({"all": rule}, by={}),
        jr.chain,
    ],
)
def test_bounds_hold_to_the_bit(wrap, dtype):
    low, high = (float(jnp.asarray(bound, dtype)) for bound in (0.001, 0.3))
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    rule = wrap(jr.chain(jr.sgd(0.37), jr.project(lambda x: jnp.clip(x, low, high))))
    apply, state, at_bound = jax.jit(lambda params, state, g: rule.apply(g, state, params)), rule.init(params), 0
    for n, g in enumerate(GRADS):
        params, state = apply(params, state, g)
        if n % 2:  # accumulate has made an update
            assert outside(params, low, high) == 0
            at_bound += sum(int(jnp.sum(x == low)) for x in jax.tree.leaves(params))
    assert at_bound > 10


def test_an_update_that_stays_inside_is_not_touched():
    rule, small = jr.chain(SGD, jr.project(lambda x: jnp.clip(x, -100, 100))), GRADS[0]
    projected, _ = rule.update(small, rule.init(PARAMS), PARAMS)
    same(projected, jax.tree.map(lambda g: -g, small))


@pytest.mark.parametrize("by_pair", [False, True], ids=["apply", "pair"])
@pytest.mark.parametrize("where", ["w", ["w"], lambda path, p: p.ndim == 2])
def test_project_where(where, by_pair):
    new, _ = run(jr.chain(SGD, jr.project(jnp.zeros_like, where)), GRADS[:1], by_pair=by_pair)
    close(new, {"w": jnp.zeros((3, 2)), "b": PARAMS["b"] - GRADS[0]["b"]})


def test_project_where_nothing_is_selected_raises():
    rule = jr.chain(SGD, jr.project(jnp.abs, "weights"))
    with pytest.raises(ValueError, match="the pattern 'weights' matches none of 'b', 'w'"):
        rule.apply(ONES, rule.init(PARAMS), PARAMS)


@pytest.mark.parametrize("by_pair", [False, True], ids=["apply", "pair"])
def test_what_is_absent_is_not_projected(by_pair):
    new, _ = run(jr.chain(SGD, jr.project(jnp.zeros_like)), [ONES | {"b": None}], by_pair=by_pair)
    same(new, {"w": jnp.zeros((3, 2)), "b": PARAMS["b"]})


def test_project_passes_over_what_is_no_array_of_floats():
    rule, others = jr.chain(SGD, jr.project(jnp.zeros_like)), {"n": jnp.arange(3), "f": jnp.tanh, "none": None}
    params = {"w": jnp.ones(2), **others}
    new, _ = rule.apply({"w": jnp.ones(2)} | dict.fromkeys(others), rule.init(params), params)
    assert {key: new[key] for key in others} == others
    same(new["w"], jnp.zeros(2))


@pytest.mark.parametrize(
    "make",
    [
        lambda: jr.chain(jr.project(jnp.abs), SGD),
        lambda: jr.chain(jr.project(jnp.abs), jr.clip_grad(1.0)),
        lambda: jr.chain(jr.record("norm", jr.global_norm), jr.project(jnp.abs), jr.adamw()),
    ],
)
def test_project_in_front_of_the_terminal_is_refused(make):
    with pytest.raises(ValueError, match=r"works on updates, and stands in front of .*; it belongs behind"):
        make()


@pytest.mark.parametrize("call", ["update", "apply"])
def test_a_projection_that_changes_the_shape_is_refused(call):
    rule = jr.project(lambda x: x[:1])
    with pytest.raises(ValueError, match=r"the projection gave the shape \((1|1, 2),?\) for"):
        getattr(rule, call)(ONES, rule.init(PARAMS), PARAMS)


# reduce_on_plateau


def scales(values, **options):
    """The scale behind each of these values, and the update that 1 has become."""
    rule = jr.reduce_on_plateau(**options)
    state, ones, found = rule.init(ONES), ONES, []
    update = jax.jit(lambda state, value: rule.update(ones, state, value=value))
    for value in values:
        updates, state = update(state, value)
        np.testing.assert_allclose(updates["b"], jr.metrics(state)["plateau_scale"])
        found.append(float(jr.metrics(state)["plateau_scale"]))
    return found


FLAT = [1.0] * 8


@pytest.mark.parametrize(
    ("options", "values", "expected"),
    [
        ({"factor": 0.5, "patience": 2}, FLAT, [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]),
        ({"factor": 0.5, "patience": 0}, FLAT[:4], [1, 0.5, 0.25, 0.125]),
        ({"factor": 0.5, "patience": 0, "min_scale": 0.3}, FLAT[:4], [1, 0.5, 0.3, 0.3]),
        ({"factor": 0.5, "patience": 0, "cooldown": 2}, FLAT, [1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]),
        ({"factor": 0.5, "patience": 0, "every": 2}, FLAT, [1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.125]),
        ({"factor": 0.5, "patience": 0, "every": 2}, [1, 3, 0, 3.8, 3, 1], [1, 1, 1, 1, 1, 0.5]),
        ({"factor": 0.5, "patience": 0}, [3, 2, 1, 0, -1, -2], [1] * 6),
        ({"factor": 0.5, "patience": 0, "threshold": 0.1}, [-10, -10.9, -11.1], [1, 0.5, 0.5]),
        ({"factor": 0.5, "patience": 0, "mode": "max"}, [1, 2, 3, 2, 4], [1, 1, 1, 0.5, 0.5]),
    ],
    ids=["patience", "at once", "min_scale", "cooldown", "every", "mean of two", "improving", "threshold", "max"],
)
def test_plateau(options, values, expected):
    np.testing.assert_allclose(scales(values, **options), expected, rtol=1e-6)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("first", [[], [1.0]], ids=["at first", "later"])
def test_a_value_that_is_not_finite_is_never_better(bad, mode, first):
    options = {"factor": 0.5, "patience": 1, "mode": mode}
    assert scales([*first, bad, bad, bad, bad], **options)[len(first) :] == [1, 0.5, 0.5, 0.25]


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_plateau_recovers_from_a_value_that_is_not_finite(bad):
    assert scales([1.0, bad, 0.9, bad, 0.8, 0.8], factor=0.5, patience=1) == [1] * 6


def test_a_value_that_is_missing_is_named():
    rule = jr.chain(SGD, jr.reduce_on_plateau())
    with pytest.raises(TypeError, match=r"Plateau needs value: update\(grads, state, params, value=...\)"):
        rule.update(ONES, rule.init(PARAMS), PARAMS)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match='mode must be "min" or "max", not \'least\''):
        jr.reduce_on_plateau(mode="least")


def test_live_options_of_a_plateau():
    rule, traces = jr.chain(SGD, jr.reduce_on_plateau(0.5, 0)), []

    @jax.jit
    def apply(params, state):
        traces.append(1)
        return rule.apply(ONES, state, params, value=1.0)

    params, state = apply(PARAMS, rule.init(PARAMS))
    params, state = apply(params, jr.set_hyperparams(state, factor=0.1))
    np.testing.assert_allclose(jr.metrics(state)["plateau_scale"], 0.1)
    _, state = apply(params, jr.set_hyperparams(state, patience=5))
    np.testing.assert_allclose(jr.metrics(state)["plateau_scale"], 0.1)
    assert len(traces) == 1


# record


def weighted_ratio(updates, *, p, t, value):
    return value * t * jr.global_norm(updates) / jr.global_norm(p)


def test_record_in_a_scan():
    rule = jr.chain(SGD, jr.record("ratio", weighted_ratio))

    def body(carry, g):
        params, state = rule.apply(g, carry[1], carry[0], value=3.0)
        return (params, state), jr.metrics(state)["ratio"]

    stacked = jax.tree.map(lambda *g: jnp.stack(g), *GRADS)
    _, ratios = jax.lax.scan(body, (PARAMS, rule.init(PARAMS)), stacked)
    params, expected = PARAMS, []
    for t, g in enumerate(GRADS, 1):
        expected.append(3 * t * jr.global_norm(g) / jr.global_norm(params))
        params = jax.tree.map(lambda p, g: p - g, params, g)
    np.testing.assert_allclose(ratios, expected, rtol=1e-5)


def test_record_in_front_of_the_terminal_and_behind_it():
    norm = jr.global_norm
    clip = jr.clip_by_global_norm(1e-3)
    rule = jr.chain(jr.record("before", norm), clip, jr.record("clipped", norm), jr.sgd(2.0), jr.record("u", norm))
    params, state = run(rule, GRADS[:1])
    found = {key: float(jr.metrics(state)[key]) for key in ("before", "clipped", "u")}
    assert found == pytest.approx({"before": float(norm(GRADS[0])), "clipped": 1e-3, "u": 2e-3}, rel=1e-3)
    close(params, run(jr.chain(clip, jr.sgd(2.0)), GRADS[:1])[0])


def test_what_is_recorded_passes_unchanged():
    grads = GRADS[0] | {"b": None}
    passed, _ = jr.record("norm", jr.global_norm).update(grads, jr.record("norm", jr.global_norm).init(PARAMS))
    same(passed, grads)


@pytest.mark.parametrize(
    ("name", "fn", "message"),
    [
        ("update norm", jr.global_norm, "record takes an identifier as a name, not 'update norm'"),
        (1, jr.global_norm, "record takes an identifier as a name, not 1"),
        ("norm", 1.0, "record takes a function of a tree, not 1.0"),
        ("one", lambda: 1.0, "record takes a function of a tree, not <function"),
        ("key", lambda tree, *, key: 1.0, "key"),
    ],
)
def test_what_cannot_be_recorded_is_refused(name, fn, message):
    with pytest.raises(TypeError, match=message):
        jr.record(name, fn)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_only_scalars_are_recorded(wrap):
    rule = jr.record("b", lambda tree: tree["b"])
    with pytest.raises(ValueError, match=r"record\('b'\) takes scalars, and its function gave the shape \(2,\)"):
        wrap(rule.update)(ONES, rule.init(PARAMS), PARAMS)


def test_a_missing_extra_argument_of_a_recorder_is_named():
    rule = jr.record("ratio", weighted_ratio)
    with pytest.raises(TypeError, match="Record needs value"):
        rule.update(ONES, rule.init(PARAMS), PARAMS)
