"""What a state can be asked, how it is changed and saved: through chains, groups, wrappers, and foreign states."""

import collections
import io
import types
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_rules as jr
from jaxopt_rules.families import families, map_families
from jaxopt_rules.hyperparameters import Scheduled
from jaxopt_rules.rules.adam import AdamState
from jaxopt_rules.state import (
    find,
    hyperparams,
    leaf_names,
    load_state_dict,
    memory,
    metrics,
    reset,
    set_hyperparams,
    state_dict,
)
from jaxopt_rules.tables import Table

PARAMS = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}


def test_hyperparams_have_bare_names_where_these_are_unique():
    state = jr.chain(jr.clip_grad(2.0), jr.adamw(1e-3, b2=0.9999)).init(PARAMS)
    found = jr.hyperparams(state)
    assert set(found) == {"max_norm", "b1", "b2", "eps", "learning_rate", "weight_decay"}
    np.testing.assert_allclose(found["b2"], 0.9999, rtol=1e-7)
    # 1 − b2 keeps its digits: float32 1 − 0.9999 is off by 2e-4.
    np.testing.assert_allclose(state[1][0].hyper["one_minus_b2"], 1e-4, rtol=1e-7)


@pytest.mark.parametrize(
    ("rule", "names"),
    [
        (
            jr.chain(jr.weight_decay(0.1), jr.adamw()),
            {"weight_decay.weight_decay", "step.weight_decay"},
        ),
        (
            jr.chain(first=jr.weight_decay(0.1), second=jr.weight_decay(0.2), third=jr.sgd(0.1)),
            {"first.weight_decay", "second.weight_decay"},
        ),
        (
            jr.chain(jr.weight_decay(0.1), jr.chain(a=jr.weight_decay(0.2), s=jr.sgd(0.1))),
            {"weight_decay.weight_decay", "a.weight_decay.weight_decay"},
        ),
        (
            jr.chain(jr.weight_decay(0.1), jr.weight_decay(0.2), jr.sgd(0.1)),
            {"0.weight_decay.weight_decay", "1.weight_decay.weight_decay"},
        ),
    ],
)
def test_and_labels_where_they_are_not(rule, names):
    state = rule.init(PARAMS)
    found = jr.hyperparams(state)
    assert {name for name in found if name.endswith("weight_decay")} == names
    for i, name in enumerate(sorted(names)):
        state = jr.set_hyperparams(state, **{name: 0.5 + i})
        assert jr.hyperparams(state)[name] == 0.5 + i


def test_set_hyperparams_keeps_dtype_and_shape_and_sees_traced_values():
    rule = jr.adamw()
    state = rule.init(PARAMS)
    new = jr.set_hyperparams(state, learning_rate=1, b2=np.float64(0.9999), weight_decay=jnp.bfloat16(0.5))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new)
    assert not any(x.weak_type for x in jax.tree.leaves(new))
    np.testing.assert_allclose(new[0].hyper["one_minus_b2"], 1e-4, rtol=1e-6)

    @jax.jit
    def trained(rate):
        return rule.apply(PARAMS, jr.set_hyperparams(state, learning_rate=rate), PARAMS)[0]["b"][0]

    assert trained(0.5) < trained(0.1) < 1


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"lr": 0.1}, KeyError, "no hyperparameter 'lr'; it has b1, b2, eps, learning_rate"),
        ({"learning_rate": -1.0}, ValueError, "learning_rate must be at least 0, not -1.0"),
        ({"learning_rate": float("nan")}, ValueError, "must be at least 0, not nan"),
        ({"b1": 1.0}, ValueError, r"b1 must lie in \[0, 1\)"),
        ({"b1": jnp.ones(2)}, ValueError, r"b1 must be a scalar, not an array of shape \(2,\)"),
        ({"b1": "0.9"}, TypeError, "b1 must be a number"),
        ({"b1": None}, TypeError, "b1 must be a number"),
        ({"eps": jr.Constant(1.0)}, TypeError, "eps is set to a number; a schedule is given when the rule is made"),
    ],
)
def test_set_hyperparams_refuses(values, error, message):
    with pytest.raises(error, match=message):
        jr.set_hyperparams(jr.adam().init(PARAMS), **values)


def test_a_name_that_a_schedule_owns():
    rule = jr.adamw(jr.Linear(0.4, 4), weight_decay=jr.Constant(0.1))
    state = rule.init(PARAMS)
    assert jr.hyperparams(state)["learning_rate"] == np.float32(0.4)
    assert isinstance(state[1].hyper["learning_rate"], Scheduled)
    with pytest.raises(ValueError, match="learning_rate is owned by a schedule"):
        jr.set_hyperparams(state, learning_rate=0.1)
    for expected in (0.4, 0.3, 0.2):
        _, state = rule.update(PARAMS, state, PARAMS)
        np.testing.assert_allclose(jr.metrics(state)["learning_rate"], expected, rtol=1e-6)


def test_every_number_may_be_a_schedule():
    falling = jr.Linear(0.5, 10)
    scheduled = jr.chain(
        jr.clip_grad(falling),
        jr.weight_decay(falling),
        jr.adam_direction(falling, falling, falling),
        jr.step(falling, falling),
    )
    by_hand = jr.chain(jr.clip_grad(0), jr.weight_decay(0), jr.adam_direction(0, 0, 0), jr.step(0, 0))
    state, other = scheduled.init(PARAMS), by_hand.init(PARAMS)
    for count in range(3):
        other = jr.set_hyperparams(other, **dict.fromkeys(jr.hyperparams(other), falling(count)))
        updates, state = scheduled.update(PARAMS, state, PARAMS)
        expected, other = by_hand.update(PARAMS, other, PARAMS)
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    assert jr.hyperparams(state) == jr.hyperparams(other)


def test_a_population_with_a_rate_each():
    rule = jr.sgd(0.1)
    state = jax.vmap(lambda rate: jr.set_hyperparams(rule.init(PARAMS), learning_rate=rate))(jnp.arange(3.0))
    new = jr.set_hyperparams(state, learning_rate=jnp.ones(3))
    assert (new.hyper["learning_rate"] == 1).all()
    with pytest.raises(ValueError, match=r"learning_rate has shape \(3,\) in this state, not \(\)"):
        jr.set_hyperparams(state, learning_rate=1.0)
    with pytest.raises(ValueError, match="learning_rate must be at least 0"):
        jr.set_hyperparams(state, learning_rate=jnp.array([0.1, -1.0, 0.1]))


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        (lambda count: jnp.ones(3), ValueError, r"learning_rate must be a scalar, not an array of shape \(3,\)"),
        (lambda count: -1.0, ValueError, "learning_rate must be at least 0, not -1.0"),
        (lambda count: True, TypeError, "learning_rate must be a number"),
        (lambda count: jnp.nan, ValueError, "learning_rate must be at least 0, not nan"),
    ],
)
def test_what_a_schedule_gives_is_checked(schedule, error, message):
    with pytest.raises(error, match=message):
        jr.sgd(schedule).init(PARAMS)


def test_a_schedule_shares_no_array_with_the_state():
    held = jnp.float32(0.1)
    rule = jr.sgd(lambda count: held)
    _, state = rule.update(PARAMS, rule.init(PARAMS))
    assert state.hyper["learning_rate"].value.unsafe_buffer_pointer() != held.unsafe_buffer_pointer()


def test_states_in_other_mappings():
    mapping = types.MappingProxyType({"opt": jr.sgd(0.1).init(PARAMS)})
    ordered = collections.OrderedDict(mapping)
    default = collections.defaultdict(list, mapping)
    for state in (mapping, ordered, default):
        new = jr.set_hyperparams(state, learning_rate=0.5)
        assert type(new) is type(state)
        assert jr.hyperparams(new)["learning_rate"] == 0.5
        assert jr.hyperparams(state)["learning_rate"] == np.float32(0.1)


def test_new_values_compile_nothing_where_arrays_are_committed_to_a_device():
    device = jax.devices()[1]
    params = jax.device_put(PARAMS, device)
    rule = jr.adamw()
    state = rule.init(params)
    step = jax.jit(lambda params, state: rule.apply(params, state, params))
    params, state = step(params, state)
    assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(state))
    for values in ({"learning_rate": 0.5}, {"b1": 0.5}, {"b1": 0.1, "eps": 1e-3}):
        params, state = step(params, jr.set_hyperparams(state, **values))
    assert step._cache_size() == 1


def test_metrics_in_a_scan():
    rule = jr.chain(jr.clip_grad(1.0), jr.sgd(jr.Linear(0.1, 3)))

    def body(carry, g):
        params, state = rule.apply(g, carry[1], carry[0])
        return (params, state), jr.metrics(state)

    grads = jax.tree.map(lambda p: jnp.stack([p, 2 * p, 3 * p]), PARAMS)
    _, recorded = jax.lax.scan(body, (PARAMS, rule.init(PARAMS)), grads)
    np.testing.assert_allclose(recorded["grad_norm"], 3 * np.arange(1, 4), rtol=1e-6)
    np.testing.assert_allclose(recorded["learning_rate"], [0.1, 0.2 / 3, 0.1 / 3], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_norms_accumulate_in_float32(dtype):
    """A float16 tree of norm 1200, whose square overflows, and one of 1e-4, whose squares vanish."""
    rule = jr.clip_grad(1.0)
    for size, norm in ((12.0, 1200.0), (1e-6, 1e-4)):
        grads = {"w": jnp.full((100, 100), size, dtype)}
        _, state = rule.update(grads, rule.init(grads))
        exact = float(jnp.float32(grads["w"][0, 0])) * 100
        np.testing.assert_allclose(jr.metrics(state)["grad_norm"], exact, rtol=1e-5)
        np.testing.assert_allclose(exact, norm, rtol=0.2)


def test_clipping_leaves_absent_gradients_out_of_the_norm_and_propagates_what_is_not_finite():
    rule = jr.clip_grad(1.0)
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    _, state = rule.update(grads, rule.init(grads))
    assert jr.metrics(state)["grad_norm"] == 5
    _, state = rule.update({"a": jnp.array([3.0]), "b": None}, state)
    assert jr.metrics(state)["grad_norm"] == 3
    out, _ = rule.update({"a": jnp.array([jnp.inf]), "b": jnp.array([4.0])}, state)
    assert jnp.isnan(out["a"]).all()
    assert (out["b"] == 0).all()
    out, _ = rule.update({"a": jnp.array([jnp.nan]), "b": jnp.array([4.0])}, state)
    assert jnp.isnan(out["b"]).all()


def test_clipping_adds_its_epsilon_to_the_norm():
    """Where it is seen in float32: a norm of 1e-5, and one of exactly max_norm."""
    for size, max_norm in ((1e-5, 1e-6), (1e-3, 1e-3)):
        rule, g = jr.clip_grad(max_norm), jnp.array([size])
        out, _ = rule.update(g, rule.init(g))
        np.testing.assert_allclose(out, size * max_norm / (size + 1e-6), rtol=1e-6)


def test_leaf_names_do_not_move_when_a_hook_is_put_in_front():
    plain = jr.adamw()
    clipped = jr.chain(jr.clip_grad(1.0), plain)
    before, after = (leaf_names(rule.init(PARAMS)) for rule in (plain, clipped))
    assert set(before) < set(after)
    assert {"adam.m.w", "adam.v.b", "adam.count", "step.hyper.learning_rate"} <= set(before)
    assert "clip.metrics.grad_norm" in after
    twice = leaf_names(jr.chain(jr.weight_decay(0.1), jr.weight_decay(0.1), jr.sgd(0.1)).init(PARAMS))
    assert {"weight_decay.count", "weight_decay#2.count"} <= set(twice)
    assert len(set(twice)) == len(twice)


class WrapState(NamedTuple):
    count: Any
    hyper: Any
    metrics: Any
    mean: Any
    inner: Any


class TheirState(NamedTuple):
    """As a state of another library may be: named differently, without hyperparameters, maybe with a state inside."""

    count: Any
    mu: Any
    inner_state: Any


@jr.constructor
def wrap(rule, speed=2.0):
    """A rule in a state with an inner one, as wrappers have it."""

    def init(params):
        count, hyper, seen = jnp.zeros((), jnp.int32), {"speed": jnp.float32(speed)}, {"seen": jnp.zeros(())}
        return WrapState(count, hyper, seen, jax.tree.map(jnp.zeros_like, params), rule.init(params))

    def update(grads, state, params=None, **extra):
        updates, inner = rule.update(grads, state.inner, params, **extra)
        return updates, state._replace(count=state.count + 1, mean=grads, metrics={"seen": jnp.ones(())}, inner=inner)

    return jr.Rule(init, update)


def theirs(rule):
    def init(params):
        return TheirState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params), (rule.init(params), ()))

    def update(grads, state, params=None, **extra):
        updates, inner = rule.update(grads, state.inner_state[0], params, **extra)
        return updates, TheirState(state.count + 1, grads, (inner, ()))

    return jr.Rule(init, update)


@jr.constructor
def grouped(**rules):
    """States in a dict by label. Each rule sees all parameters, which is as good for the tests of states."""

    def init(params):
        return {label: rule.init(params) for label, rule in rules.items()}

    def update(grads, state, params=None):
        new = {label: rule.update(grads, state[label], params) for label, rule in rules.items()}
        return grads, {label: part for label, (_, part) in new.items()}

    return jr.Rule(init, update)


def trained(rule, params=PARAMS, steps=3):
    state = rule.init(params)
    for _ in range(steps):
        _, state = rule.update(params, state, params)
    return state


NESTED = wrap(jr.chain(jr.clip_grad(1.0), wrap(jr.adamw(), 3.0)))


def test_families_of_a_wrapper_and_of_what_is_inside():
    state = NESTED.init(PARAMS)
    assert [(family.name, family.place) for family in families(state)] == [
        ("wrap", ()),
        ("clip", (0, 0)),
        ("wrap", (0, 1)),
        ("adam", (0, 1, 0, 0)),
        ("step", (0, 1, 0, 1)),
    ]
    assert all("inner" not in family.own for family in families(state))
    assert [family.slots for family in families(state)] == [("mean",), (), ("mean",), ("m", "v"), ()]
    new = map_families(lambda family: family.state._replace(count=len(family.place)), state)
    assert [family.state.count for family in families(new)] == [0, 2, 2, 4, 4]
    assert jax.tree.structure(map_families(lambda family: family.state, state)) == jax.tree.structure(state)


def test_names_do_not_move_when_a_rule_is_wrapped():
    plain, wrapped = jr.adamw().init(PARAMS), wrap(jr.adamw()).init(PARAMS)
    assert set(leaf_names(plain)) < set(leaf_names(wrapped))
    assert {"wrap.mean.w", "wrap.metrics.seen"} <= set(leaf_names(wrapped))
    assert set(hyperparams(wrapped)) == {*hyperparams(plain), "speed"}
    assert set(metrics(trained(wrap(jr.adamw())))) == {"learning_rate", "seen"}


def test_hyperparameters_through_wrappers():
    state = NESTED.init(PARAMS)
    names = [name for name in hyperparams(state) if name.endswith("speed")]
    assert names == ["wrap.speed", "0.1.wrap.speed"]
    for i, name in enumerate(names):
        state = set_hyperparams(state, {name: 10 + i})
    assert (state.hyper["speed"], state.inner[1].hyper["speed"]) == (10, 11)
    assert set_hyperparams(state, learning_rate=0.5).inner[1].inner[1].hyper["learning_rate"] == 0.5


@pytest.mark.parametrize(
    "name", ["learning_rate", "matrix.learning_rate", "step.learning_rate", "matrix.step.learning_rate"]
)
def test_longer_spellings_of_a_hyperparameter(name):
    state = grouped(matrix=jr.adamw()).init(PARAMS)
    for new in (set_hyperparams(state, {name: 0.5}), set_hyperparams(state, **{name: 0.5})):
        assert hyperparams(new)["learning_rate"] == 0.5


def test_a_spelling_of_several_hyperparameters_or_of_none():
    state = grouped(matrix=jr.adamw(), rest=jr.adamw()).init(PARAMS)
    both = "'learning_rate' may be matrix.learning_rate or rest.learning_rate; write one of these"
    with pytest.raises(KeyError, match=both):
        set_hyperparams(state, learning_rate=0.5)
    with pytest.raises(KeyError, match=r"may be matrix.learning_rate or rest.learning_rate"):
        set_hyperparams(state, {"step.learning_rate": 0.5})
    assert hyperparams(set_hyperparams(state, {"rest.step.learning_rate": 0.5}))["rest.learning_rate"] == 0.5
    for name in ("adam.learning_rate", "step.rest.learning_rate", "rest.matrix.learning_rate", "rate"):
        with pytest.raises(KeyError, match="the state has no hyperparameter"):
            set_hyperparams(state, {name: 0.5})
    with pytest.raises(ValueError, match="is given twice, under two of its names"):
        set_hyperparams(state, {"rest.learning_rate": 0.5}, **{"rest.step.learning_rate": 0.5})


def test_hyperparameters_with_dots_and_slashes_in_their_names():
    class ScaleByPathState(NamedTuple):
        count: Any
        hyper: Any

    scales = {"embed/**": jnp.float32(1), "layers.0/w": jnp.float32(2)}
    state = {"v1.0": (ScaleByPathState(jnp.int32(0), scales), jr.sgd(0.1).init(PARAMS))}
    for i, name in enumerate(["embed/**", "layers.0/w", "scale_by_path.layers.0/w", "v1.0.scale_by_path.embed/**"]):
        new = set_hyperparams(state, {name: i})
        assert hyperparams(new)["embed/**" if "embed" in name else "layers.0/w"] == i


def test_find():
    state = (theirs(grouped(a=jr.adam(), b=jr.sgd(0.1, 0.9))).init(PARAMS), NESTED.init(PARAMS).inner[0])
    assert find(state, TheirState) is state[0]
    assert find(state, AdamState) is state[0].inner_state[0]["a"][0]
    assert find(wrap(jr.adam()).init(PARAMS), AdamState).m.keys() == PARAMS.keys()
    with pytest.raises(KeyError, match="there is no WrapState in the state; it has TheirState, AdamState, StepState"):
        find(state, WrapState)


def test_find_of_several():
    state = grouped(matrix=jr.adam(), rest=wrap(jr.adam())).init(PARAMS)
    with pytest.raises(ValueError, match="several AdamState") as error:
        find(state, AdamState)
    for text in ("state['matrix'][0], state['rest'].inner[0]; ", "find(state['rest'], AdamState)"):
        assert text in str(error.value)
    assert find(state["rest"], AdamState) is eval("state['rest'].inner[0]")
    with pytest.raises(
        ValueError, match=r"several WrapState: state, state.inner\[1\]; .* find\(state.inner, WrapState\)"
    ):
        find(NESTED.init(PARAMS), WrapState)


def test_memory_before_anything_is_allocated():
    params = {"w": jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16), "b": jax.ShapeDtypeStruct((1024,), jnp.complex64)}
    table = memory(jax.eval_shape(NESTED.init, params))
    rows = {(row.slot, row.dtype): (row.arrays, row.bytes) for row in table.rows}
    assert rows["adam.m", "float32"] == (1, 2**22)
    assert rows["adam.m", "complex64"] == (1, 2**13)
    assert rows["adam.v", "float32"] == (2, 2**22 + 2**12)
    assert rows["wrap.mean", "bfloat16"] == (1, 2**21)
    assert table.rows[-1].slot == "scalars"
    assert isinstance(table.rows[0].bytes, int)
    assert table.total == ("total", "", sum(r.arrays for r in table.rows), sum(r.bytes for r in table.rows))
    assert "4.0 MiB" in str(table)


def test_memory_of_all_kinds_of_arrays():
    state = (TheirState(jnp.int32(0), {"w": jnp.ones(3, bool)}, ()), {"key": jax.random.key(0)}, {"n": 1})
    table = memory(state)
    assert [tuple(row) for row in table.rows] == [("0", "bool", 1, 3), ("scalars", "", 3, 4 + 8 + 4)]
    assert memory(()).total == ("total", "", 0, 0)
    born = jr.chain(jr.clip_grad(1.0), jr.adamw()).init(PARAMS)
    assert memory(born).total[3] == sum(x.nbytes for x in jax.tree.leaves(born))


def test_tables():
    table = Table(("leaf", "rate", "bytes"), (("a<b", 0.5, 100), ("longer", None, 3 * 2**29)), ("total", None, 1636))
    assert str(table).splitlines() == [
        "leaf    rate    bytes",
        "------  ----  -------",
        "a<b      0.5    100 B",
        "longer        1.5 GiB",
        "------  ----  -------",
        "total         1.6 KiB",
    ]
    html = table._repr_html_()
    assert "a&lt;b" in html
    assert html.count("<tr>") == 4
    assert table.rows[1].bytes == 3 * 2**29
    assert table.rows[0]._asdict() == {"leaf": "a<b", "rate": 0.5, "bytes": 100}
    assert str(Table(("leaf", "bytes"), ())) == "leaf  bytes\n----  -----"


def same(a, b):
    return all(bool((x == y).all()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_reset_of_some_parameters():
    rule = jr.chain(theirs(jr.identity()), wrap(jr.chain(jr.clip_grad(1.0), jr.adamw())))
    state = set_hyperparams(trained(rule), learning_rate=0.5)
    fresh = rule.init(PARAMS)
    for where in ("w", lambda path, p: p.ndim == 2):
        new = reset(rule, state, PARAMS, where)

        def slots(s):
            return s[0].mu, s[1].mean, find(s, AdamState).m, find(s, AdamState).v

        for before, after, born in zip(slots(state), slots(new), slots(fresh), strict=True):
            assert same(after["w"], born["w"])
            assert same(after["b"], before["b"])
            assert not same(before["w"], born["w"])
        restored = dict(zip(leaf_names(new), jax.tree.leaves(new), strict=True))
        for name, x in zip(leaf_names(state), jax.tree.leaves(state), strict=True):
            assert name.endswith((".w", "/w")) or same(restored[name], x)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    rule.update(PARAMS, new, PARAMS)


def test_reset_of_everything():
    rule = wrap(jr.chain(theirs(jr.clip_grad(1.0)), jr.adamw(jr.Linear(0.5, 10))))
    state = set_hyperparams(trained(rule), b1=0.5, speed=7)
    new = reset(rule, state, PARAMS)
    assert same(new, set_hyperparams(rule.init(PARAMS), b1=0.5, speed=7))
    assert new.count == 0
    assert hyperparams(new)["learning_rate"] == 0.5


def test_the_clock_goes_on_when_some_parameters_are_reset():
    rule, g = jr.adam(1.0), jnp.ones(2)
    params = {"a": g, "b": g}
    adam, step = trained(rule, params)
    new = reset(rule, (adam._replace(count=jnp.int32(100_000)), step), params, "a")
    updates, _ = rule.update(params, new, params)
    np.testing.assert_allclose(-updates["a"], 0.1 / 0.001**0.5, rtol=1e-3)


def test_reset_of_parameters_in_a_tuple():
    """A tuple of parameters is built like a tuple of states."""
    params = (jnp.ones(2), jnp.ones(3))
    rule = theirs(jr.adam())
    new = reset(rule, trained(rule, params), params, "0")
    state = new.inner_state[0][0]
    assert (state.count, new.count) == (3, 3)
    assert [bool((m == 0).all()) for m in (*state.m, *new.mu)] == [True, False, True, False]


def test_reset_refuses():
    with pytest.raises(ValueError, match="the pattern 'x' matches none of 'b', 'w'"):
        reset(jr.adam(), trained(jr.adam()), PARAMS, "x")
    with pytest.raises(ValueError, match="the state is made of StepState, and the rule makes AdamState, StepState"):
        reset(jr.adam(), jr.sgd(0.1).init(PARAMS), PARAMS, "w")
    with pytest.raises(ValueError, match="the state's m must be a tree like the parameters"):
        reset(jr.adam(), trained(jr.adam(), {"w": PARAMS["w"]}), PARAMS, "w")


class NoiseState(NamedTuple):
    count: Any
    hyper: Any
    key: Any
    m: Any


def _noise(g, m, *, key, scale):
    return g + scale * jax.random.normal(key, g.shape, g.dtype), (m + g,)


def noisy(seed):
    half = {"m": lambda p: jnp.zeros_like(p, dtype=jnp.bfloat16)}
    return jr.leafwise(_noise, NoiseState, slots=half, key=jax.random.key(seed, impl="rbg"), scale=0.1)


def through_a_file(arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    file.seek(0)
    return np.load(file)


def test_a_state_through_a_file():
    rule = theirs(wrap(jr.chain(jr.clip_grad(1.0), noisy(1), jr.adamw(jr.Linear(0.1, 5)))))
    state = trained(rule)
    saved = state_dict(state)
    assert list(saved) == leaf_names(state)
    assert all(type(x) is np.ndarray and x.flags.c_contiguous for x in saved.values())
    assert saved["noise.key"].dtype == np.uint32
    assert saved["adam.m.w"].shape == (2, 3)
    assert saved["adam.count"].shape == ()
    for source in (saved, through_a_file(saved)):
        loaded, report = load_state_dict(rule.init(PARAMS), source)
        assert str(report) == "everything was loaded"
        assert report == ((), (), (), ())
        chex.assert_trees_all_equal_shapes_and_dtypes(loaded, state)
        assert not any(x.weak_type for x in jax.tree.leaves(loaded) if hasattr(x, "weak_type"))
        assert same(loaded, state)


def lost(saved, wanted):
    """Whether an array of this type, through a file of NumPy, is refused as one of the wanted type."""
    like = {"w": jnp.zeros(2, wanted)}
    arrays = through_a_file(state_dict({"w": jnp.ones(2, saved)}))
    loaded, report = load_state_dict(like, arrays, strict=False)
    assert loaded["w"].dtype == wanted
    if not report.problems:
        assert (loaded["w"] == 1).all()
        return False
    assert (loaded["w"] == 0).all()
    assert report.retyped == (("w", str(arrays["w"].dtype), wanted),)
    with pytest.raises(ValueError, match=rf"w is of type \|V[12], not {wanted} \(.* and Orbax keeps it"):
        load_state_dict(like, arrays)
    assert same(
        load_state_dict({"w": jnp.ones(2, saved)}, {"w": arrays["w"].view(saved)})[0], {"w": jnp.ones(2, saved)}
    )
    return True


@pytest.mark.parametrize("wanted", ["float16", "int16", "uint16", "float32", "int8", "float8_e5m2"])
def test_bfloat16_through_a_file_is_read_as_nothing_else(wanted):
    assert not lost("bfloat16", "bfloat16")
    assert lost("bfloat16", wanted)


@pytest.mark.parametrize("wanted", ["float8_e4m3fn", "float8_e5m2", "int8", "uint8", "bool", "int4", "bfloat16"])
@pytest.mark.parametrize("saved", ["float8_e4m3fn", "int4"])
def test_types_of_one_byte_through_a_file_are_not_guessed(saved, wanted):
    """Nor is the right one, which cannot be told from the others."""
    assert lost(saved, wanted)


def test_records_of_two_bytes_are_not_bfloat16():
    saved = {"w": np.zeros(2, [("a", np.int8), ("b", np.int8)])}
    with pytest.raises(ValueError, match="the saved state does not fit: w is of type"):
        load_state_dict({"w": jnp.zeros(2, jnp.bfloat16)}, saved)


def test_a_state_goes_on_behind_other_hooks_and_wrappers():
    saved = state_dict(trained(jr.adamw(jr.Constant(0.1))))
    rule = wrap(jr.chain(jr.clip_grad(1.0), jr.adamw(0.2)))
    with pytest.raises(ValueError, match=r"the saved state does not fit: wrap.count is missing, .*, and 3 more"):
        load_state_dict(rule.init(PARAMS), saved)
    state, report = load_state_dict(rule.init(PARAMS), saved, strict=False)
    assert {name.partition(".")[0] for name in report.missing} == {"wrap", "clip"}
    assert not report.unexpected
    assert find(state, AdamState).count == 3
    assert hyperparams(state)["learning_rate"] == np.float32(0.1)
    rule.update(PARAMS, state, PARAMS)
    state, report = load_state_dict(rule.init(PARAMS), saved, strict=False, hyperparams="new")
    assert "wrap.hyper.speed" not in report.missing
    assert hyperparams(state)["learning_rate"] == np.float32(0.2)
    assert find(state, AdamState).count == 3


def test_what_does_not_fit():
    saved = state_dict(trained(jr.adam()))
    template = jr.adam().init(PARAMS)
    saved["adam.m.w"] = np.ones((3, 3))
    saved["adam.v.w"] = np.ones((2, 3), complex)
    saved["step.count"] = np.float64(1)
    saved["sgd.hyper.momentum"] = np.float64(1)
    del saved["adam.v.b"]
    state, report = load_state_dict(template, saved, strict=False)
    assert report.missing == ("adam.v.b",)
    assert report.unexpected == ("sgd.hyper.momentum",)
    assert report.reshaped == (("adam.m.w", (3, 3), (2, 3)),)
    assert report.retyped == (("adam.v.w", "complex128", "float32"), ("step.count", "float64", "int32"))
    assert "adam.m.w has shape (3, 3), not (2, 3)\n" in str(report)
    assert (state[0].m["w"] == 0).all()
    assert (state[0].m["b"] != 0).all()
    assert (state[0].count, state[1].count) == (3, 0)
    assert not load_state_dict(template, saved, strict=False, hyperparams="new")[1].unexpected
    with pytest.raises(ValueError, match=r"adam.v.b is missing, sgd.hyper.momentum is unexpected, adam.m.w has shape"):
        load_state_dict(template, saved)
    with pytest.raises(ValueError, match="hyperparams is 'saved' or 'new'"):
        load_state_dict(template, saved, hyperparams="old")


@pytest.mark.parametrize("name", ["step.hyper.learning_rate", "adam.hyper.one_minus_b1"])
def test_saved_hyperparameters_are_checked(name):
    saved = state_dict(jr.adam().init(PARAMS)) | {name: np.float32(-1)}
    with pytest.raises(ValueError, match=r"learning_rate must be at least 0|b1 must lie in \[0, 1\)"):
        load_state_dict(jr.adam().init(PARAMS), saved)
    load_state_dict(jr.adam().init(PARAMS), saved, hyperparams="new")


def test_a_state_is_loaded_where_the_template_is():
    params = jax.device_put(PARAMS, jax.devices()[1])
    state, _ = load_state_dict(jr.adam().init(params), state_dict(trained(jr.adam())))
    assert all(x.devices() == {jax.devices()[1]} for x in jax.tree.leaves(state))


@pytest.mark.parametrize("params", [jnp.ones(2), {"w": jnp.ones(2)}], ids=["array", "dict"])
def test_reset_leaves_the_memory_of_the_whole_rule(params):
    rule = jr.average(jr.sgd(0.1))
    state = rule.init(params)
    for _ in range(3):
        params, state = rule.apply(params, state, params)
    assert jr.reset(rule, state, params, lambda path, x: True).samples == 3


def test_two_leaves_of_one_path_cannot_be_saved():
    params = {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}
    with pytest.raises(ValueError, match=r"two leaves of the state have the same path, 'adam.m.a/b'"):
        jr.state_dict(jr.adam().init(params))
