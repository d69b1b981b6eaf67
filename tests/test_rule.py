"""Rules as values, the lifts that make them, and what both refuse."""

import functools
import gc
import pickle
import weakref
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_rules as jr
from jaxopt_rules.hooks import ClipState
from jaxopt_rules.rules.adam import AdamState
from jaxopt_rules.rules.sgd import VelocityState

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}


class CountState(NamedTuple):
    count: Any
    hyper: Any


class SlotState(NamedTuple):
    count: Any
    hyper: Any
    v: Any


# Values


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (jr.adamw(0.001, weight_decay=0.1), "adamw(0.001, weight_decay=0.1)"),
        (
            jr.chain(jr.clip_by_global_norm(1.0), jr.adamw(0.001, weight_decay=0.1)),
            "chain(clip_by_global_norm(1.0), adamw(0.001, weight_decay=0.1))",
        ),
        (jr.chain(clip=jr.clip_grad(1.0), rest=jr.sgd(0.1)), "chain(clip=clip_by_global_norm(1.0), rest=sgd(0.1))"),
        (jr.adam(jr.Warmup(jr.Cosine(0.1, 9), 2)), "adam(Warmup(Cosine(0.1, 9), 2))"),
        (jr.sgd(jnp.float32(0.5)), "sgd(0.5)"),
        (jr.identity(), "identity()"),
    ],
)
def test_a_rule_prints_as_it_was_written(rule, text):
    assert repr(rule) == text
    assert repr(rule.init) == f"{text}.init"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: jr.adam(1e-3, mask=None),
            r"adam: got an unexpected keyword.*'mask'; mask is where.*; it takes learning_r",
        ),
        (lambda: jr.adamw(lr=0.1), "lr is learning_rate; it takes learning_rate, b1, b2"),
        (lambda: jr.rmsprop(0.1, eps_in_sqrt=False), 'eps_in_sqrt is eps_placement, "inside" or "outside"; it takes'),
        (lambda: jr.adam(betas=(0.9, 0.99)), "betas is b1 and b2"),
        (lambda: jr.adam(eps_root=1e-8), 'eps_root is eps with eps_placement="inside"'),
        (lambda: jr.adam(weight_decay=0.1), "unexpected keyword argument 'weight_decay'; it takes learning_rate"),
        (lambda: jr.sgd(), "sgd: missing a required argument: 'learning_rate'"),
        (lambda: jr.sgd(0.1, 0.9, True, "ema"), "sgd: too many positional arguments"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_with_those_that_do(make, text):
    with pytest.raises(TypeError, match=text):
        make()


def square_root(count):
    return 1 / jnp.sqrt(count + 1.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: jr.adamw(1e-3, weight_decay=0.1, where=["**/w", "b"]),
        lambda: jr.adam(jr.Cosine(0.1, 10)),
        lambda: jr.sgd(square_root),
        lambda: jr.chain(jr.clip_grad(1.0), optimizer=jr.momentum(0.1)),
        lambda: jr.sgd(np.float32(0.1)),
        lambda: jr.sgd(jnp.float32(0.1), momentum=np.array(0.9)),
    ],
)
def test_equal_arguments_make_equal_rules(make):
    rule, again = make(), make()
    assert rule == again
    assert hash(rule) == hash(again)
    copy = pickle.loads(pickle.dumps(rule))
    assert copy == rule
    assert repr(copy) == repr(rule)
    new, _ = copy.apply(PARAMS, copy.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(new, rule.apply(PARAMS, rule.init(PARAMS), PARAMS)[0])


def test_equality_is_by_value_with_defaults_filled_in():
    assert jr.adamw() == jr.adamw(1e-3, 0.9, weight_decay=0.01) == jr.adamw(learning_rate=0.001)
    assert jr.adamw() != jr.adam()
    assert jr.adamw(1e-3) != jr.adamw(2e-3)
    assert jr.chain(a=jr.sgd(0.1)) != jr.chain(b=jr.sgd(0.1))
    assert jr.sgd(0.1).init != jr.sgd(0.1).update


def test_a_rebuilt_rule_as_a_static_argument_hits_the_cache():
    @functools.partial(jax.jit, static_argnums=0)
    @chex.assert_max_traces(n=1)
    def step(rule, params, state):
        return rule.apply(params, state, params)

    for _ in range(3):
        rule = jr.chain(jr.clip_grad(1.0), jr.adamw(1e-3))
        step(rule, PARAMS, rule.init(PARAMS))


def test_what_a_rule_knows_survives_tuple_operations():
    rule = jr.adamw(0.1)
    for copy in (rule._replace(init=rule.init), jax.tree.map(lambda x: x, rule), jr.Rule(*rule)):
        assert repr(copy) == "adamw(0.1)"
        assert copy == rule


def test_a_pair_from_elsewhere_is_a_rule():
    pair = jr.Rule(lambda params: (), lambda grads, state, params=None: (grads, state))
    rule = jr.chain(pair, jr.sgd(0.1))
    new, _ = rule.apply(PARAMS, rule.init(PARAMS), PARAMS, value=1.0)
    np.testing.assert_allclose(new["w"], 0.9)
    new, _ = pair.apply(PARAMS, (), PARAMS)
    np.testing.assert_allclose(new["w"], 2.0)


def test_a_rule_with_a_key_prints_and_compares_while_something_is_traced():
    one, other = (jr.add_noise(0.1, key=jax.random.key(3)) for _ in range(2))
    seen = []
    jax.make_jaxpr(lambda x: seen.append((repr(one), one == other, hash(one) == hash(other))) or x)(1.0)
    assert seen == [(repr(one), True, True)]


def test_constructors_take_traced_values():
    def loss(rate):
        rule = jr.sgd(rate)
        return rule.apply(PARAMS, rule.init(PARAMS), PARAMS)[0]["w"].sum()

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(0.1), -6.0)
    rates = jnp.array([0.1, 0.2])
    np.testing.assert_allclose(jax.vmap(loss)(rates), 6 - 6 * rates, rtol=1e-6)

    def compare(rate):
        with pytest.raises(TypeError, match="traced hyperparameter cannot be compared or hashed"):
            hash(jr.sgd(rate))
        return rate

    jax.jit(compare)(0.1)


# What is rejected when it is built


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: jr.sgd(-0.1), ValueError, "learning_rate must be at least 0, not -0.1"),
        (lambda: jr.sgd(float("nan")), ValueError, "learning_rate must be at least 0, not nan"),
        (lambda: jr.sgd("0.1"), TypeError, "learning_rate must be a number or a schedule"),
        (lambda: jr.sgd(None), TypeError, "learning_rate must be a number or a schedule"),
        (lambda: jr.sgd(True), TypeError, "learning_rate must be a number or a schedule"),
        (lambda: jr.sgd(1j), TypeError, "learning_rate must be a number or a schedule"),
        (lambda: jr.sgd(jnp.ones(2)), ValueError, r"learning_rate must be a scalar, not an array of shape \(2,\)"),
        (lambda: jr.sgd(jnp.float32(-1)), ValueError, "learning_rate must be at least 0, not -1.0"),
        (lambda: jr.sgd(0.1, momentum=float("nan")), ValueError, "momentum must be a number, not nan"),
        (lambda: jr.sgd(0.1, nesterov=True), ValueError, "nesterov=True needs a momentum"),
        (lambda: jr.adam(b1=1.0), ValueError, r"b1 must lie in \[0, 1\), not 1.0"),
        (lambda: jr.adam(b2=-0.1), ValueError, r"b2 must lie in \[0, 1\), not -0.1"),
        (lambda: jr.adam(bias_correction="none"), ValueError, 'must be "moments" or "step", not \'none\''),
        (lambda: jr.adamw(bias_correction="none"), ValueError, 'must be "moments" or "step", not \'none\''),
        (lambda: jr.clip_grad(-1.0), ValueError, "max_norm must be at least 0, not -1.0"),
        (lambda: jr.weight_decay(float("nan")), ValueError, "weight_decay must be a number, not nan"),
        (lambda: jr.chain(0.1), TypeError, "chain takes rules, .* not 0.1"),
        (lambda: jr.chain(jr.adam), TypeError, r"was it meant to be called, as in adam\(...\)?"),
        (lambda: jr.chain(jr.adam(), jr.sgd(0.1)), ValueError, r"sgd\(0.1\) stands behind adam\(\), which has turned"),
        (lambda: jr.chain(jr.adam(), jr.clip_grad(1.0)), ValueError, r"clip_by_global_norm\(1.0\) stands behind adam"),
        (lambda: jr.Warmup(3, jr.Cosine(0.1, 9)), TypeError, r"the schedule first: Warmup\(Cosine\(0.1, 9\), 3\)"),
        (lambda: jr.chain(jr.clip_grad(1.0), **{"0": jr.sgd(0.1)}), TypeError, "identifiers as names, not '0'"),
        (lambda: jr.Constant(1.0) and jr.Linear(0.1, True), ValueError, "steps must be an integer >= 1, not True"),
        (lambda: jr.Optimizer(0.1), TypeError, "Optimizer takes rules"),
        (lambda: jr.Optimizer(jr.adam_direction()), ValueError, r"chain\(adam_direction\(\), step\(learning_rate\)\)"),
        (lambda: jr.SGD(0.1, hook=[3]), TypeError, "hook takes rules"),
        (lambda: jr.AdamW(0.1), TypeError, "a rate is given as alpha=..."),
        (lambda: jr.AdamW(jr.Adam(), beta1=0.8), TypeError, "beta1 given both by the Adam and directly"),
    ],
)
def test_rejected(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_accepted():
    for rule in (
        jr.momentum(0.1, momentum=1),
        jr.sgd(0),
        jr.adamw(weight_decay=-0.1),
        jr.chain(jr.clip_grad(0), jr.sgd(0.1)),
        jr.chain(jr.clip_grad(float("inf")), jr.sgd(0.1)),
        jr.adam(b1=0, b2=0),
    ):
        rule.apply(PARAMS, rule.init(PARAMS), PARAMS)


# What is rejected when it is called


@pytest.mark.parametrize(
    ("grads", "params", "error", "message"),
    [
        ({"w": jnp.ones((2, 3))}, PARAMS, ValueError, "the parameters must be a tree like the gradients.*besides 'b'"),
        (PARAMS | {"x": jnp.ones(1)}, PARAMS, ValueError, "like the gradients, but it lacks 'x'"),
        ([jnp.ones(1)], PARAMS, ValueError, "it lacks '0'; it has besides 'b', 'w'"),
        (
            PARAMS | {"b": jnp.ones(4)},
            PARAMS,
            ValueError,
            r"at 'b' has shape \(4,\), its parameter has .*\(3,\)",
        ),
        (PARAMS | {"b": 1.0}, None, TypeError, r"the gradient at 'b' is a Python number"),
        (PARAMS | {"b": 1.0}, PARAMS, TypeError, r"the gradient at 'b' is a Python number.*jnp.array\(1.0\)"),
        (PARAMS, PARAMS | {"b": 1.0}, TypeError, "the parameter at 'b' is a Python number"),
        (PARAMS, None, TypeError, r"Step needs the parameters: update\(grads, state, params\)"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_bad_trees(grads, params, error, message, wrap):
    rule = jr.adamw()
    state = rule.init(PARAMS)
    with pytest.raises(error, match=message):
        wrap(lambda: rule.update(grads, state, params))()


def test_a_gradient_whose_parameter_had_no_slot():
    rule = jr.adam()
    state = rule.init(PARAMS | {"b": None})
    with pytest.raises(ValueError, match=r"Adam: the state has no m for 'b'.*init again"):
        rule.update(PARAMS, state, PARAMS)


def test_the_state_of_another_rule_of_the_family():
    with pytest.raises(TypeError, match="the state has the hyperparameters learning_rate, the rule has learning_"):
        jr.step(0.1, 0.1).update(PARAMS, jr.step(0.1).init(PARAMS), PARAMS)
    with pytest.raises(TypeError, match="a schedule owns learning_rate in the state, and this rule has none"):
        jr.sgd(0.1).update(PARAMS, jr.sgd(jr.Constant(0.1)).init(PARAMS))


def test_the_state_of_another_rule():
    with pytest.raises(TypeError, match="Adam: update got a state of type VelocityState, not AdamState"):
        jr.adam_direction().update(PARAMS, jr.momentum_direction().init(PARAMS))
    with pytest.raises(TypeError, match="chain: update got a state of type tuple where it needs states named a"):
        jr.chain(a=jr.sgd(0.1)).update(PARAMS, jr.chain(jr.sgd(0.1)).init(PARAMS))


def test_misspelt_extra_arguments():
    rule = jr.chain(jr.clip_grad(1.0), jr.sgd(0.1))
    state = rule.init(PARAMS)
    rule.update(PARAMS, state, PARAMS, value=1.0, grad=PARAMS, value_fn=jnp.sum, loss=1.0)
    for call in (rule.update, rule.apply):
        with pytest.raises(TypeError, match=r"does not take valeu; the extra .* accepts are grad, loss, value"):
            call(PARAMS, state, PARAMS, valeu=1.0)


def test_a_pair_that_takes_any_extra_argument_gets_it():
    seen = {}

    def update(grads, state, params=None, **extra):
        seen.update(extra)
        return grads, state

    def named(grads, state, params=None, *, noise):
        seen["noise"] = noise
        return grads, state

    rule = jr.chain(jr.Rule(lambda params: (), update), jr.sgd(0.1))
    rule.update(PARAMS, rule.init(PARAMS), PARAMS, anything=1)
    rule = jr.chain(jr.Rule(lambda params: (), named), jr.sgd(0.1))
    rule.update(PARAMS, rule.init(PARAMS), PARAMS, noise=2)
    assert seen == {"anything": 1, "noise": 2}
    with pytest.raises(TypeError, match=r"does not take nois; .* noise"):
        rule.update(PARAMS, rule.init(PARAMS), PARAMS, nois=2)


def test_a_rule_does_not_change_with_a_list_that_it_was_given():
    where = ["w"]
    rule = jr.adamw(where=where)
    where.append("b")
    assert rule == jr.adamw(where=["w"])
    assert repr(rule) == "adamw(where=('w',))"


def test_deeply_nested_rules_compare_in_no_time():
    def nested():
        rule = jr.sgd(0.1)
        for _ in range(40):
            rule = jr.chain(rule)
        return rule

    assert nested() == nested()
    assert hash(nested()) == hash(nested())
    assert nested() != jr.chain(nested())


def test_apply_updates_checks_shapes_and_leaves_the_rest_alone():
    with pytest.raises(ValueError, match=r"'w' has shape \(3,\)"):
        jr.apply_updates({"w": jnp.ones(2)}, {"w": jnp.ones(3)})
    params = {"n": jnp.arange(2), "w": jnp.ones(2, jnp.bfloat16), "f": jnp.tanh}
    new = jr.apply_updates(params, {"n": None, "w": jnp.full(2, 2**-9), "f": None})
    assert new["n"] is params["n"]
    assert new["f"] is params["f"]
    assert new["w"].dtype == jnp.bfloat16


def test_float64_numpy_arrays_where_only_32_bits_are_enabled():
    params = {"w": np.ones((2, 2)), "b": np.ones(3)}
    for rule in (jr.sgd(0.1), jr.adamw(0.1)):
        new, _ = rule.apply(params, rule.init(params), params)
        assert new["w"].dtype == jnp.float32


@pytest.mark.parametrize("rule", [jr.adam_direction(), jr.clip_grad(1.0), jr.chain(jr.clip_grad(1.0))], ids=repr)
def test_what_gives_no_update_cannot_be_applied(rule):
    with pytest.raises(ValueError, match=r"gives a direction, not an update; end it with step"):
        rule.apply(PARAMS, rule.init(PARAMS), PARAMS)


def test_an_empty_tree():
    rule = jr.chain(jr.clip_grad(1.0), jr.adamw())
    state = rule.init({})
    new, state = rule.apply({}, state, {})
    assert new == {}
    assert jr.metrics(state)["grad_norm"] == 0
    assert state[0].count == 1


@pytest.mark.parametrize("where", [None, "**/w", lambda path, p: p.ndim > 1])
def test_a_none_in_place_of_a_subtree(where):
    params = {"a": {"w": jnp.ones(2), "b": jnp.ones(1)}, "c": jnp.ones(3)}
    rule = jr.adamw(0.1, where=where)
    new, state = rule.apply({"a": None, "c": jnp.ones(3)}, rule.init(params), params)
    assert new["a"] == params["a"]
    assert (new["c"] < 1).all()
    assert jax.tree.structure(state) == jax.tree.structure(rule.init(params))


def test_a_complex_gradient_of_a_real_parameter():
    rule = jr.sgd(0.1)
    with pytest.raises(TypeError, match=r"the gradient at 'b' is complex \(complex64\), its parameter is real"):
        rule.update(PARAMS | {"b": jnp.ones(3, jnp.complex64)}, rule.init(PARAMS), PARAMS)


def test_the_global_norm_passes_over_what_is_no_inexact_array():
    assert (
        jr.global_norm({"a": jnp.array([3.0]), "b": jnp.array([4.0]), "n": jnp.arange(3), "f": jnp.tanh, "x": 1.0}) == 5
    )


def test_second_derivatives_at_a_zero_gradient():
    def end(rate):
        rule, p = jr.chain(jr.clip_grad(1.0), jr.adam(rate)), jnp.zeros(2)
        return rule.apply(p, rule.init(p), p)[0].sum()

    assert jnp.isfinite(jax.grad(jax.grad(end))(0.1))


def test_complex_parameters():
    """|g|² in v, which is real; compared with the formula."""
    g = jnp.array([3 + 4j, 1j])
    rule = jr.chain(jr.clip_grad(1.0), jr.adam(0.1))
    state = rule.init(g)
    assert (state[1][0].m.dtype, state[1][0].v.dtype) == (jnp.complex64, jnp.float32)
    updates, state = rule.update(g, state, g)
    np.testing.assert_allclose(updates, -0.1 * g / jnp.abs(g), rtol=1e-5)
    np.testing.assert_allclose(jr.metrics(state)["grad_norm"], np.sqrt(26), rtol=1e-6)


# The lifts


def _wrong_slots(g, m, *, t):
    return g


def _unknown_keyword(g, *, decay):
    return g


def _plain(g, *, rate):
    return rate * g


def _stored(g, *, one_minus_b1):
    return g


def _clocked(g, *, t):
    return g


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: jr.leafwise(_wrong_slots, SlotState),
            r"_wrong_slots\(g, m, \*, t\).* slots of SlotState, \('v',\)",
        ),
        (
            lambda: jr.leafwise(_unknown_keyword, CountState, rate=1.0),
            r"asks for decay, which is no .*: \('rate',\)",
        ),
        (lambda: jr.leafwise(_plain, CountState, rate=1.0, power=2.0), "does not ask for power"),
        (lambda: jr.leafwise(_plain, CountState, extra=("value",), rate=1.0), "does not ask for value"),
        (lambda: jr.leafwise(_plain, ClipState, rate=1.0), "a field `metrics` exactly where the rule records"),
        (lambda: jr.leafwise(_plain, CountState, where={"rat": "w"}, rate=1.0), "where names rat, which is no hyper"),
        (lambda: jr.leafwise(_stored, CountState, one_minus_b1=0.1), "one_minus_b1 is given by the lift and"),
        (lambda: jr.leafwise(_clocked, CountState, t=1.0), "t is given by the lift and cannot be a hyperparameter"),
        (
            lambda: jr.leafwise(_plain, CountState, slots={"vv": jnp.zeros_like}, rate=1.0),
            "vv is no slot of CountState",
        ),
        (lambda: jr.leafwise(_plain, jr.Rule, rate=1.0), "the fields of a state begin with count, hyper"),
    ],
)
def test_a_signature_that_does_not_fit(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def _by_loss(g, *, value, rate):
    return rate * value * g


def test_extra_arguments_reach_the_member_that_asks_for_them():
    direction = jr.leafwise(_by_loss, CountState, extra=("value",), rate=2.0)
    rule = jr.chain(jr.clip_grad(100.0), direction, jr.step(1.0))
    state = rule.init(PARAMS)
    new, _ = rule.apply(PARAMS, state, PARAMS, value=jnp.array(3.0), loss=1.0)
    np.testing.assert_allclose(new["w"], 1 - 6.0)
    with pytest.raises(TypeError, match=r"Count needs value: update\(grads, state, params, value=...\)"):
        rule.update(PARAMS, state, PARAMS)


class SharedState(NamedTuple):
    count: Any
    hyper: Any
    v: Any
    metrics: Any


def _shared(grads, v, *, t, p, one_minus_b):
    """A rule across leaves: all slots move by the mean square of all parameters."""
    mean = sum(jnp.sum(x**2) for x in jax.tree.leaves(p)) / sum(x.size for x in jax.tree.leaves(p))
    v = jax.tree.map(lambda v, g: v + one_minus_b * (g * mean - v), v, grads)
    return jax.tree.map(lambda v: v / t, v), (v,), {"mean_square": mean}


def test_treewise_has_slots_clock_parameters_and_records():
    rule = jr.treewise(_shared, SharedState, metrics=("mean_square",), b=0.75)
    params = {"a": jnp.full(2, 3.0), "b": None, "c": jnp.full(3, 3.0)}
    grads = {"a": jnp.ones(2), "b": None, "c": jnp.ones(3)}
    state = rule.init(params)
    assert jr.hyperparams(state) == {"b": 0.75}
    out, state = jax.jit(rule.update)(grads, state, params)
    np.testing.assert_allclose(out["a"], 9 / 4)
    assert out["b"] is None
    out, state = jax.jit(rule.update)(grads | {"a": None}, state, params)
    np.testing.assert_allclose(state.v["a"], 9 / 4)
    np.testing.assert_allclose(out["c"], (9 / 4 + (9 - 9 / 4) / 4) / 2, rtol=1e-6)
    assert jr.metrics(state) == {"mean_square": 9.0}


class DecayState(NamedTuple):
    count: Any
    hyper: Any


def _decayed(grads, *, p, weight_decay=None):
    if weight_decay is None:
        return grads
    return jax.tree.map(lambda g, p, rate: g if rate is None else g + rate * p, grads, p, weight_decay)


@pytest.mark.parametrize(("where", "expected"), [("a", (3.0, 1.0)), (None, (3.0, 3.0))])
def test_treewise_hands_over_a_tree_of_what_where_grants(where, expected):
    rule = jr.treewise(_decayed, DecayState, where={"weight_decay": where}, weight_decay=0.5)
    params, grads = {"a": jnp.full(2, 4.0), "b": jnp.full(3, 4.0)}, {"a": jnp.ones(2), "b": jnp.ones(3)}
    out, state = jax.jit(rule.update)(grads, rule.init(params), params)
    np.testing.assert_array_equal((out["a"][0], out["b"][0]), expected)
    out, _ = rule.update(grads | {"a": None}, state, params)
    assert out["a"] is None
    np.testing.assert_array_equal(out["b"][0], expected[1])


def test_an_argument_with_a_default_is_for_a_hyperparameter_that_may_be_missing():
    rule = jr.treewise(_decayed, DecayState)
    params = {"a": jnp.ones(2)}
    state = rule.init(params)
    assert jr.hyperparams(state) == {}
    np.testing.assert_array_equal(rule.update(params, state, params)[0]["a"], 1.0)


@pytest.mark.parametrize("lift", [jr.leafwise, jr.treewise])
def test_none_is_no_hyperparameter_where_there_is_a_default(lift):
    rule = lift(lambda g, *, factor=None: g, DecayState, factor=None, where={"factor": "no/such/path"})
    assert jr.hyperparams(rule.init(PARAMS)) == {}
    with pytest.raises(TypeError, match="factor must be a number or a schedule"):
        lift(lambda g, *, factor: g, DecayState, factor=None)


@pytest.mark.parametrize(
    "lift",
    [
        lambda form: jr.leafwise(lambda g, *, form: g if form == "up" else -g, DecayState, static={"form": form}),
        lambda form: jr.treewise(
            lambda gs, *, form: jax.tree.map(lambda g: g if form == "up" else -g, gs), DecayState, static={"form": form}
        ),
    ],
    ids=["leafwise", "treewise"],
)
def test_what_is_static_is_known_when_the_formula_is_traced(lift):
    params = {"a": jnp.ones(2)}
    for form, expected in (("up", 1.0), ("down", -1.0)):
        rule = lift(form)
        assert jr.hyperparams(rule.init(params)) == {}
        np.testing.assert_array_equal(jax.jit(rule.update)(params, rule.init(params))[0]["a"], expected)
    with pytest.raises(TypeError, match=r"static must be hashable, and form is {'up'}"):
        lift({"up"})


class PooledState(NamedTuple):
    count: Any
    hyper: Any
    v: Any


def test_a_birth_sees_what_is_static_and_what_its_leaf_is_given():
    def birth(p, size, by_name):
        return jnp.full(size, float(len(by_name)))

    def leaf(g, v, *, by_name):
        return g * len(by_name), (v,)

    rule = jr.leafwise(
        leaf, PooledState, slots={"v": birth}, static={"size": 3}, given={"by_name": lambda paths, leaves: paths}
    )
    params = {"a": jnp.ones(2), "long": jnp.ones((2, 2))}
    state = rule.init(params)
    np.testing.assert_array_equal(state.v["a"], [1.0, 1.0, 1.0])
    np.testing.assert_array_equal(state.v["long"], [4.0, 4.0, 4.0])
    np.testing.assert_array_equal(rule.update(params, state)[0]["long"], 4.0)


def test_a_slot_of_another_shape():
    def _row_sums(g, v, *, rate):
        v = v + rate * jnp.sum(g, 0)
        return g - v, (v,)

    rule = jr.leafwise(_row_sums, SlotState, slots={"v": lambda p: jnp.zeros(p.shape[1:])}, rate=1.0)
    grads = {"w": jnp.ones((2, 3))}
    out, state = rule.update(grads, rule.init(grads))
    assert state.v["w"].shape == (3,)
    np.testing.assert_allclose(out["w"], -1.0)


def _first_of_g(g, v, *, rate):
    return g[:1], (v,)


def _first_of_v(g, v, *, rate):
    return g, (v[:1],)


def _no_tuple(g, v, *, rate):
    return g, v


@pytest.mark.parametrize(
    ("leaf", "error", "message"),
    [
        (_first_of_g, ValueError, r"_first_of_g gave a result of shape \(1,\) for a gradient of shape \(3,\)"),
        (_first_of_v, ValueError, r"_first_of_v gave a slot of shape \(1,\) for one of shape \(3,\)"),
        (_no_tuple, TypeError, r"_no_tuple must return its result and a tuple of 1 new slots"),
    ],
)
def test_what_a_leaf_function_returns_is_checked(leaf, error, message):
    rule, g = jr.leafwise(leaf, SlotState, rate=1.0), jnp.ones(3)
    with pytest.raises(error, match=message):
        rule.update(g, rule.init(g))


def test_a_leaf_function_is_not_kept_alive():
    def references():
        def leaf(g, *, rate):
            return rate * g

        rule = jr.leafwise(leaf, CountState, rate=1.0)
        rule.update(PARAMS, rule.init(PARAMS))
        return weakref.ref(leaf)

    gone = references()
    gc.collect()
    assert gone() is None


def test_a_birth_that_hands_out_the_parameter_is_copied():
    def _keep(g, v, *, rate):
        return g, (v,)

    rule, p = jr.leafwise(_keep, SlotState, slots={"v": lambda p: p.astype(jnp.float32)}, rate=1.0), jnp.ones(3)
    assert rule.init(p).v.unsafe_buffer_pointer() != p.unsafe_buffer_pointer()


def test_the_counter_stops_at_its_largest_value():
    rule = jr.adam(jr.Constant(0.1))
    largest = jnp.array(2**31 - 1, jnp.int32)
    state = jax.tree.map(lambda x: largest if x.dtype == jnp.int32 else x, rule.init(PARAMS))
    updates, state = rule.update(PARAMS, state, PARAMS)
    assert state[0].count == largest
    assert bool(jnp.all(jnp.isfinite(updates["w"])))


def test_states_are_named_tuples_with_the_slots_after_count_and_hyper():
    adam, step = jr.adamw().init(PARAMS)
    assert isinstance(adam, AdamState)
    assert set(adam.hyper) == {"one_minus_b1", "one_minus_b2", "eps"}
    assert set(step.hyper) == {"learning_rate", "weight_decay"}
    assert isinstance(jr.sgd(0.1, 0.9).init(PARAMS)[0], VelocityState)
