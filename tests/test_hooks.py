"""Hooks and directions: what the laws and the references do not show of them."""

import pickle
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit

import jaxopt_rules as jr
from jaxopt_rules.rule import definition_of

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
INF, NAN = jnp.inf, jnp.nan


def once(rule, grads, params=None):
    return rule.update(grads, rule.init(grads if params is None else params), params)[0]


def tanh(grads):
    return jax.tree.map(jnp.tanh, grads)


def towards(grads, params):
    return jax.tree.map(lambda g, p: g + p, grads, params)


def halves(count):
    return 0.5**count


RULES = [
    jr.clip_by_value(0.5),
    jr.clip_by_leaf_norm(0.5),
    jr.clip_by_block_rms(0.5),
    jr.adaptive_grad_clip(axis=[0], where="w"),
    jr.centralize(axis=(0,)),
    jr.add_noise(0.1, key=3),
    jr.add_noise(halves, 0.0),
    jr.zero_nonfinite(),
    jr.grokfast(),
    jr.ema(0.9),
    jr.trace(0.9),
    jr.set_to_zero(),
    jr.scale(2.0),
    jr.stateless(tanh),
    jr.stateless(towards),
    jr.trust_ratio(max_ratio=1.0),
    jr.sign(),
    jr.normalize(),
    jr.scale_by_leaf_rms(),
    jr.scale_by_path({"w": 2.0, re.compile("b"): halves}),
    jr.layerwise_decay(0.5, ["w", "b"]),
]
COMPLEX = [
    rule
    for rule in RULES
    if rule not in (jr.clip_by_value(0.5), jr.stateless(tanh), jr.adaptive_grad_clip(axis=[0], where="w"))
]
every_rule = pytest.mark.parametrize("rule", RULES, ids=repr)


# Each as a value, and as a member


@every_rule
def test_a_value(rule):
    copy = pickle.loads(pickle.dumps(rule))
    assert copy == rule
    assert hash(copy) == hash(rule)
    assert repr(copy) == repr(rule)
    chex.assert_trees_all_equal(once(copy, PARAMS, PARAMS), once(rule, PARAMS, PARAMS))


def test_text():
    assert repr(jr.scale_by_path({"w": 2.0})) == "scale_by_path({'w': 2.0})"
    assert repr(jr.stateless(tanh)) == "stateless(tanh)"
    assert repr(jr.trace(0.9)) == "momentum_direction(0.9)"


@every_rule
def test_absent_leaves_and_other_leaves(rule):
    params = PARAMS | {"n": jnp.arange(3)}
    state = rule.init(params)
    grads = {"w": PARAMS["w"], "b": None, "n": None}
    out, after = quick_jit(rule.update)(grads, state, params)
    assert (out["b"], out["n"]) == (None, None)
    assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.parametrize("rule", COMPLEX, ids=repr)
def test_complex_arrays(rule):
    rng = np.random.default_rng(0)
    g = {key: jnp.asarray(rng.normal(size=p.shape) + 1j * rng.normal(size=p.shape)) for key, p in PARAMS.items()}
    out = once(rule, g, g)
    assert out["w"].dtype == jnp.complex64
    assert all(bool(jnp.isfinite(x).all()) for x in out.values())


def test_complex_arrays_have_no_order():
    with pytest.raises(TypeError, match=r"ClipByValue compares numbers.*'w' is complex64"):
        once(jr.clip_by_value(1.0), {"w": jnp.ones(2, jnp.complex64)})


@every_rule
def test_zero_gradients_have_finite_slopes(rule):
    """Also of parameters that are zero, as those of a new layer are."""

    def total(tree, state):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(rule.update(tree, state, tree)[0]))

    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    value, slopes = jax.value_and_grad(total, allow_int=True)(zeros, rule.init(zeros))
    assert bool(jnp.isfinite(value))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(slopes))


@pytest.mark.parametrize("place", ["hook", "behind"])
@pytest.mark.parametrize("rule", [jr.scale(2.0), jr.scale_by_path({"w": 2.0}), jr.layerwise_decay(0.5, ["w", "b"])])
def test_multipliers_stand_anywhere(rule, place):
    chained = jr.chain(rule, jr.sgd(0.1)) if place == "hook" else jr.chain(jr.sgd(0.1), rule)
    np.testing.assert_allclose(once(chained, PARAMS, PARAMS)["w"], -0.1 * once(rule, PARAMS, PARAMS)["w"], rtol=1e-6)


# Norms


WIDE = {"a": jnp.full(9, 400, jnp.float16)}  # its norm is 1200, its square no float16


@pytest.mark.parametrize(
    ("rule", "norm"),
    [
        (jr.clip_by_global_norm(3.0), 3),
        (jr.clip_by_leaf_norm(3.0), 3),
        (jr.clip_by_block_rms(1.0), 3),
        (jr.adaptive_grad_clip(0.5), 600),
        (jr.normalize(), 1),
        (jr.trust_ratio(0.5), 600),
        (jr.chain(jr.normalize(), jr.scale_by_leaf_rms()), 400),
    ],
    ids=repr,
)
def test_norms_of_float16_do_not_overflow(rule, norm):
    out = once(rule, WIDE, WIDE)["a"]
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(jnp.linalg.norm(out), norm, rtol=1e-6)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (jr.clip_by_value(2.0), [2, NAN, 1, -2]),
        (jr.zero_nonfinite(), [0, 0, 1, 0]),
        (jr.clip_by_leaf_norm(1.0), [NAN] * 4),
        (jr.clip_by_block_rms(1.0), [NAN] * 4),
        (jr.sign(), [1, NAN, 1, -1]),
        (jr.set_to_zero(), [0, 0, 0, 0]),
    ],
    ids=repr,
)
def test_what_is_not_finite(rule, expected):
    np.testing.assert_array_equal(once(rule, jnp.array([INF, NAN, 1, -INF])), expected)


def test_an_infinite_element_makes_the_others_of_its_array_zero():
    grads = {"a": jnp.array([INF, 1.0]), "b": jnp.array([3.0, 4.0])}
    out = once(jr.clip_by_leaf_norm(1.0), grads)
    np.testing.assert_array_equal(out["a"], [NAN, 0])
    np.testing.assert_allclose(out["b"], [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize("rule", [jr.clip_by_leaf_norm(0), jr.clip_by_block_rms(0), jr.adaptive_grad_clip(0)], ids=repr)
def test_a_bound_of_zero(rule):
    out = once(rule, {"a": jnp.ones(2), "zero": jnp.zeros(2)}, {"a": jnp.ones(2), "zero": jnp.ones(2)})
    np.testing.assert_allclose([*out["a"], *out["zero"]], 0, atol=1e-30)


def test_a_bound_that_nothing_reaches():
    for rule in (jr.clip_by_leaf_norm(INF), jr.clip_by_block_rms(INF), jr.clip_by_value(INF)):
        np.testing.assert_array_equal(once(rule, jnp.array([0.0, 3.0])), [0, 3])


def test_trust_ratio_is_one_where_a_norm_is_zero():
    ones, zeros = jnp.ones(4), jnp.zeros(4)
    grads = {"new": ones, "still": zeros, "both": zeros, "moving": ones}
    params = {"new": zeros, "still": ones, "both": zeros, "moving": 3 * ones}
    out = once(jr.trust_ratio(0.5), grads, params)
    np.testing.assert_allclose([out[key][0] for key in grads], [1, 0, 0, 1.5])
    out = once(jr.trust_ratio(max_ratio=0.5), grads, params)
    np.testing.assert_allclose([out[key][0] for key in grads], [0.5, 0, 0, 0.5])


def test_sign():
    np.testing.assert_array_equal(once(jr.sign(), jnp.array([-2.0, 0.0, 3.0])), [-1, 0, 1])
    np.testing.assert_allclose(once(jr.sign(), jnp.array([3 + 4j, 0])), [0.6 + 0.8j, 0], rtol=1e-6)


# Units


def test_units_of_arrays_and_axes_of_ones_own():
    p = {"hwio": jnp.ones((2, 2, 3, 4)), "heads": jnp.ones((5, 2, 3)), "w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    rng = np.random.default_rng(0)
    g = {key: jnp.asarray(rng.normal(size=x.shape)) for key, x in p.items()}
    centered = once(jr.centralize(), g)
    for key, axes in {"hwio": (0, 1, 2), "heads": (0, 1), "w": (0,)}.items():
        np.testing.assert_allclose(centered[key].mean(axes), 0, atol=1e-6)
    np.testing.assert_array_equal(centered["b"], g["b"])
    np.testing.assert_allclose(once(jr.centralize(1), g)["w"].mean(1), 0, atol=1e-6)
    clipped = once(jr.adaptive_grad_clip(0.1, axis=-1), g, p)
    np.testing.assert_allclose(jnp.linalg.norm(clipped["w"], axis=1), 0.1 * np.sqrt(2), rtol=1e-5)
    np.testing.assert_allclose(jnp.linalg.norm(clipped["b"]), 0.1 * np.sqrt(2), rtol=1e-5)
    with pytest.raises(ValueError, match=r"axis \(0, 1, 2\) does not fit an array of shape \(3, 2\); masked"):
        once(jr.centralize((0, 1, 2)), {"w": g["w"]})


def test_adaptive_clipping_where_it_is_asked_for():
    out = once(jr.adaptive_grad_clip(0.01, where="w"), PARAMS, PARAMS)
    np.testing.assert_array_equal(out["b"], PARAMS["b"])
    np.testing.assert_allclose(out["w"], 0.01, rtol=1e-6)


# Filters


def test_schedules_of_hyperparameters():
    rules = {
        jr.clip_by_value(halves): [1, 0.5, 0.25],
        jr.scale(halves): [1, 0.5, 0.25],
        jr.scale_by_path({"a": halves}): [1, 0.5, 0.25],
        jr.layerwise_decay(halves, ["a", "b"]): [1, 0.5, 0.25],
    }
    grads = {"a": jnp.ones(2), "b": jnp.ones(2)}
    for rule, expected in rules.items():
        state, seen = rule.init(grads), []
        for _ in expected:
            out, state = rule.update(grads, state, grads)
            seen.append(float(out["a"][0]))
        np.testing.assert_allclose(seen, expected, rtol=1e-6)


def test_grokfast_begins_with_the_first_gradient():
    rule, g = jr.grokfast(0.9, 2.0), jnp.array([1.0, -2.0])
    out, state = rule.update(g, rule.init(g))
    np.testing.assert_allclose(out, 3 * g)
    np.testing.assert_array_equal(state.m, g)


def test_set_to_zero_is_a_hook_or_the_rule_of_a_group():
    rule = jr.chain(jr.set_to_zero(), jr.sgd(0.1))
    new, _ = rule.apply(PARAMS, rule.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(new, PARAMS)
    rule = jr.partition({"still": jr.set_to_zero(), "rest": jr.sgd(0.1)}, by={"still": "w"})
    new, _ = rule.apply(PARAMS, rule.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(new["w"], PARAMS["w"])
    assert (new["b"] < 1).all()


# Noise


def draws(rule, grads, updates=1):
    state, seen = rule.init(grads), []
    for _ in range(updates):
        out, state = rule.update(grads, state)
        seen.append(out)
    return seen, state


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.complex64])
def test_variance_of_noise(dtype):
    g = jnp.ones(100_000, dtype)
    seen, _ = draws(jr.add_noise(0.5, 0.7), g, 3)
    for count, out in enumerate(seen):
        noise = np.asarray(out - g)
        np.testing.assert_allclose(noise.mean(), 0, atol=0.01)
        np.testing.assert_allclose((np.abs(noise) ** 2).mean(), 0.5 / (1 + count) ** 0.7, rtol=0.02)
    if dtype == jnp.complex64:  # circular: both parts alike, and independent
        np.testing.assert_allclose((noise**2).mean(), 0, atol=0.01)


def test_noise_is_another_for_each_update_path_and_key_and_no_other_thing():
    rule, grads = jr.add_noise(1.0), {"a": jnp.zeros(5), "b": jnp.zeros(5)}
    (first, second), state = draws(rule, grads, 2)
    values = [first["a"], first["b"], second["a"], draws(jr.add_noise(1.0, key=1), grads)[0][0]["a"]]
    assert len({tuple(np.asarray(x)) for x in values}) == 4
    assert state.key == jax.random.key(0)
    chex.assert_trees_all_equal(draws(rule, grads)[0][0], first)
    chex.assert_trees_all_equal(draws(rule, {"b": grads["b"]})[0][0]["b"], first["b"])
    chex.assert_trees_all_equal(draws(jr.add_noise(1.0, key=jax.random.key(0)), grads)[0][0], first)


def test_noise_in_scan_and_under_vmap():
    rule, g = jr.add_noise(1.0), jnp.zeros(3)
    seen, state = draws(rule, g, 3)

    def body(state, _):
        out, state = rule.update(g, state)
        return state, out

    last, outs = quick_jit(lambda state: jax.lax.scan(body, state, length=3))(rule.init(g))
    np.testing.assert_allclose(outs, jnp.stack(seen), rtol=1e-6)
    assert last.key == state.key

    def of(seed):
        rule = jr.add_noise(1.0, key=jax.random.key(seed))
        return rule.update(g, rule.init(g))[0]

    np.testing.assert_allclose(jax.vmap(of)(jnp.arange(2))[0], seen[0], rtol=1e-6)
    etas = jax.vmap(lambda eta: once(jr.add_noise(eta), g))(jnp.array([1.0, 4.0]))
    np.testing.assert_allclose(etas[1], 2 * etas[0], rtol=1e-6)


def test_a_seed_may_be_an_array():
    g = jnp.zeros(3)
    expected = once(jr.add_noise(1.0, key=3), g)
    assert (once(jr.add_noise(1.0, key=jnp.int32(3)), g) == expected).all()
    traced = jax.jit(lambda seed: once(jr.add_noise(1.0, key=seed), g))
    np.testing.assert_allclose(traced(3), expected, rtol=1e-6)


@pytest.mark.parametrize("key", [jax.random.PRNGKey(0), 0.5, None, True])
def test_keys_that_are_refused(key):
    with pytest.raises(TypeError, match=r"seed \(an integer\) or a typed key, jax.random.key\(0\)|is given one"):
        jr.add_noise(1.0, key=key)


# Functions of trees


def test_stateless():
    grads = {"w": jnp.full(2, 0.5, jnp.bfloat16), "b": None}
    out = once(jr.stateless(tanh), grads)
    assert (out["w"].dtype, out["b"]) == (jnp.float32, None)
    np.testing.assert_allclose(out["w"], np.tanh(0.5), rtol=1e-6)
    np.testing.assert_array_equal(once(jr.stateless(towards), PARAMS, PARAMS)["w"], 2)
    with pytest.raises(TypeError, match="needs the parameters"):
        once(jr.stateless(towards), PARAMS)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda grads: {"w": grads["w"]}, "what the function of `stateless` returns must be a tree like .*lacks 'b'"),
        (lambda grads: grads | {"b": grads["b"][:1]}, r"function of `stateless` at 'b' has shape \(1,\)"),
    ],
)
def test_what_a_function_of_trees_returns_is_checked(fn, message):
    with pytest.raises(ValueError, match=message):
        once(jr.stateless(fn), PARAMS)


# Multipliers


def test_factors_by_path():
    params = {"embed": {"w": jnp.ones(2)}, "b1": jnp.ones(2), "head": jnp.ones(2)}
    rule = jr.chain(jr.sgd(1.0), jr.scale_by_path({"embed/**": 0.1, "b1": 3.0}))
    state = rule.init(params)
    assert set(jr.hyperparams(state)) == {"learning_rate", "factor[embed/**]", "factor[b1]"}
    out, _ = rule.update(params, state, params)
    np.testing.assert_allclose([out["embed"]["w"][0], out["b1"][0], out["head"][0]], [-0.1, -3, -1])
    state = jr.set_hyperparams(state, **{"factor[b1]": -2.0})
    out, _ = rule.update(params | {"embed": None}, state, params)
    assert out["embed"] is None
    np.testing.assert_allclose(out["b1"], 2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: jr.scale_by_path({"w": 1.0, "*": 2.0}), ValueError, r"scale_by_path: \[w\] and \[\*\] match 'w'"),
        (lambda: jr.scale_by_path({"v": 1.0}), ValueError, "'v' matches none of 'b', 'w'"),
        (lambda: jr.scale_by_path({"w": "x"}), TypeError, r"factor\[w\] must be a number"),
        (lambda: jr.scale_by_path({"w": NAN}), ValueError, r"factor\[w\] must be a number, not nan"),
        (lambda: jr.scale_by_path("w"), TypeError, "a mapping from patterns"),
        (lambda: jr.layerwise_decay(0.5, ["w", "*"]), ValueError, "'w' belongs to two groups, 'layer 0' and 'layer 1'"),
        (lambda: jr.layerwise_decay(0.5, ["w"]), ValueError, "'b' belongs to none of the groups 'layer 0'"),
        (
            lambda: jr.layerwise_decay(0.5, lambda path, p: 2, 2),
            ValueError,
            "layer of 'b' is 2, not an integer from 0 to 1",
        ),
        (lambda: jr.layerwise_decay(0.5, lambda path, p: 2), TypeError, "comes with depth"),
        (lambda: jr.layerwise_decay(0.5, "w"), TypeError, "a sequence of selectors"),
        (lambda: jr.layerwise_decay(0.5, ["w"], 3), TypeError, "depth=3, and 1 layers"),
        (lambda: jr.layerwise_decay(-0.5, ["w", "b"]), ValueError, "layer_decay must be at least 0"),
        (lambda: jr.centralize("w"), TypeError, "axis is an integer"),
        (lambda: jr.ema(1.0), ValueError, r"decay must lie in \[0, 1\)"),
        (lambda: jr.add_noise(-1.0), ValueError, "eta must be at least 0"),
        (lambda: jr.clip_by_value(-1.0), ValueError, "max_value must be at least 0"),
        (lambda: jr.stateless(3), TypeError, "stateless takes a function"),
        (lambda: jr.stateless(lambda: 0), TypeError, "stateless takes a function"),
    ],
)
def test_rejected(make, error, message):
    with pytest.raises(error, match=message):
        make().init(PARAMS)


def test_layers_from_the_input_to_the_output():
    params = {"embed": jnp.ones(1), "blocks": [jnp.ones(1), jnp.ones(1)], "norm": jnp.ones(1), "head": jnp.ones(1)}
    by_selectors = jr.layerwise_decay(0.5, ["embed", "blocks/0", "blocks/1", ["norm", "head"]])
    number = {"embed": 0, "blocks/0": 1, "blocks/1": 2, "norm": 3, "head": 3}
    for rule in (by_selectors, jr.layerwise_decay(0.5, lambda path, p: number[path], 4)):
        state = rule.init(params)
        out, _ = rule.update(params, state, params)
        chex.assert_trees_all_close(
            out,
            {"embed": jnp.full(1, 0.125), "blocks": [jnp.full(1, 0.25), jnp.full(1, 0.5)]}
            | {"norm": jnp.ones(1), "head": jnp.ones(1)},
        )
        out, _ = rule.update(params | {"blocks": None}, jr.set_hyperparams(state, layer_decay=1.0), params)
        np.testing.assert_array_equal(out["embed"], 1)
    assert once(jr.layerwise_decay(0.0, ["w", "b"]), PARAMS)["b"][0] == 1


def test_what_a_multiplier_says_of_its_leaves():
    paths, leaves = ["a", "b", "c"], [jnp.ones(1)] * 3
    by_path = definition_of(jr.scale_by_path({"a": 2.0, "b": halves}))
    assert [share.rate for share in by_path.shares(paths, leaves)] == [2.0, 1.0, 1.0]
    by_layer = definition_of(jr.chain(jr.sgd(0.1), jr.layerwise_decay(0.5, ["a", ["b", "c"]])))
    assert [share.rate for share in by_layer.shares(paths, leaves)] == [0.5, 1.0, 1.0]
