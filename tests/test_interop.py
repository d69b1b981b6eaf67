"""Our rules, as they are, where Optax's are expected: optax.chain, nnx.Optimizer, TrainState, an Equinox loop.

The packages are the dependency group `interop`; a test whose package is absent is skipped.
"""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_rules as jr
from jaxopt_rules.families import families
from jaxopt_rules.rules.adam import AdamState
from jaxopt_rules.select import matrices, select
from jaxopt_rules.state import (
    find,
    hyperparams,
    leaf_names,
    load_state_dict,
    memory,
    reset,
    set_hyperparams,
    state_dict,
)
from jaxopt_rules.trees import flatten, flatten_with_paths, paths

RNG = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32), "b": jnp.zeros(2)}
GRADS = [jax.tree.map(lambda p: jnp.asarray(RNG.normal(size=p.shape), p.dtype), PARAMS) for _ in range(5)]

# Optax's Adam in float32 is itself off by 7e-6 of its direction.
ADAM = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture
def optax():
    return pytest.importorskip("optax")


def train(rule, apply_updates=jr.apply_updates):
    params, state = PARAMS, rule.init(PARAMS)
    for g in GRADS:
        updates, state = jax.jit(rule.update)(g, state, params)
        params = apply_updates(params, updates)
    return params, state


def test_members_of_optax_chain(optax):
    mixed, state = train(optax.chain(optax.clip(0.5), jr.adamw(0.1)), optax.apply_updates)
    theirs, _ = train(optax.chain(optax.clip(0.5), optax.adamw(0.1, weight_decay=0.01)), optax.apply_updates)
    chex.assert_trees_all_close(mixed, theirs, **ADAM)
    np.testing.assert_allclose(optax.tree.get(state, "learning_rate"), 0.1, rtol=1e-6)
    state = optax.tree.set(state, learning_rate=jnp.float32(0.5))
    assert jr.hyperparams(state)["learning_rate"] == 0.5


def test_optax_members_of_our_chain(optax):
    ours, _ = train(jr.chain(optax.clip(0.5), optax.scale_by_adam(), jr.step(0.1)))
    theirs, _ = train(optax.chain(optax.clip(0.5), optax.adam(0.1)), optax.apply_updates)
    chex.assert_trees_all_close(ours, theirs, **ADAM)


@pytest.mark.parametrize("wrap", ["masked", "MultiSteps", "apply_if_finite", "partition", "inject"])
def test_inside_optax_wrappers(optax, wrap):
    def wrapped(rule):
        match wrap:
            case "masked":
                return optax.masked(rule, {"w": True, "b": False})
            case "MultiSteps":
                return optax.MultiSteps(rule, 2)
            case "apply_if_finite":
                return optax.apply_if_finite(rule, 3)
            case "partition":
                return optax.partition({"x": rule, "y": optax.sgd(0.1)}, {"w": "x", "b": "y"})
            case "inject":
                return optax.chain(rule, optax.inject_hyperparams(optax.scale)(1.0))

    ours, _ = train(wrapped(jr.sgd(0.1, 0.9)), optax.apply_updates)
    theirs, _ = train(wrapped(optax.sgd(0.1, 0.9)), optax.apply_updates)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_mutating_layer_takes_an_optax_transformation(optax):
    model_ours, model_theirs = PARAMS, PARAMS
    ours, theirs = jr.Optimizer(jr.adam(0.1)), jr.Optimizer(jr.Rule(*optax.adam(0.1)))
    for g in GRADS:
        model_ours, model_theirs = ours.update(model_ours, g), theirs.update(model_theirs, g)
    chex.assert_trees_all_close(model_ours, model_theirs, **ADAM)


def test_nnx_optimizer(optax):
    nnx = pytest.importorskip("flax.nnx")

    def losses(tx):
        model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 4)), jnp.float32)

        @nnx.jit
        def step(model, optimizer):
            loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
            optimizer.update(model, grads)
            return loss

        return [float(step(model, optimizer)) for _ in range(5)]

    ours = losses(jr.chain(jr.clip_grad(1.0), jr.adamw(0.1)))
    theirs = losses(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.01)))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_flax_train_state(optax):
    linen = pytest.importorskip("flax.linen")
    train_state = pytest.importorskip("flax.training.train_state")
    serialization = pytest.importorskip("flax.serialization")
    module = linen.Dense(2)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 4)), jnp.float32)

    def final(tx):
        state = train_state.TrainState.create(apply_fn=module.apply, params=module.init(jax.random.key(0), x), tx=tx)
        for _ in range(5):
            grads = jax.grad(lambda p: jnp.mean((module.apply(p, x) - 1) ** 2))(state.params)
            state = state.apply_gradients(grads=grads)
        return state

    ours, theirs = final(jr.adam(0.1)), final(optax.adam(0.1))
    chex.assert_trees_all_close(ours.params, theirs.params, **ADAM)
    saved = serialization.to_state_dict(ours)
    chex.assert_trees_all_equal(serialization.from_state_dict(ours, saved).opt_state, ours.opt_state)


def test_equinox_loop(optax):
    eqx = pytest.importorskip("equinox")
    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 4)), jnp.float32)

    def loss(model):
        return jnp.mean((jax.vmap(model)(x) - 1) ** 2)

    def final(tx, make_state, apply_updates):
        model = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
        state = make_state(tx, model)

        @eqx.filter_jit(donate="all")
        def step(model, state):
            grads = eqx.filter_grad(loss)(model)
            updates, state = tx.update(grads, state, model)
            return apply_updates(model, updates), state

        for _ in range(5):
            model, state = step(model, state)
        return eqx.filter(model, eqx.is_array)

    rule = jr.chain(jr.clip_grad(1.0), jr.adamw(0.1))
    # The raw module, with its static fields and functions, goes in.
    ours = final(rule, lambda tx, model: tx.init(model), jr.apply_updates)
    theirs = final(
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1, weight_decay=0.01)),
        lambda tx, model: tx.init(eqx.filter(model, eqx.is_inexact_array)),
        eqx.apply_updates,
    )
    chex.assert_trees_all_close(ours, theirs, **ADAM)
    chex.assert_trees_all_close(
        final(rule, lambda tx, model: tx.init(model), eqx.apply_updates), ours, rtol=1e-5, atol=1e-6
    )


def test_the_mutating_layer_on_an_equinox_module():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
    x = jnp.ones((8, 4))
    opt = jr.Optimizer(jr.adamw(0.01, where="**/weight"))
    loss = eqx.filter_jit(eqx.filter_value_and_grad(lambda model: jnp.mean((jax.vmap(model)(x) - 1) ** 2)))
    losses = []
    for _ in range(20):
        value, grads = loss(model)
        model = opt.update(model, grads)
        losses.append(float(value))
    assert losses[-1] < 0.1 * losses[0]
    assert model.activation is eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0)).activation


def nnx_model(nnx):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Linear(4, 3, rngs=rngs)
            self.blocks = nnx.List([nnx.Linear(3, 3, rngs=rngs)])
            self.norm = nnx.BatchNorm(3, rngs=rngs)

    return Model(nnx.Rngs(0))


MODEL_PATHS = ["blocks/0/bias", "blocks/0/kernel", "embed/bias", "embed/kernel", "norm/bias", "norm/scale"]


def test_paths_in_nnx_are_those_of_a_dict():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx_model(nnx)
    state = nnx.state(model, nnx.Param)
    plain = nnx.to_pure_dict(state)
    assert paths(state) == paths(plain) == MODEL_PATHS
    assert [path for path, _ in flatten_with_paths(state)[0]] == MODEL_PATHS
    assert paths(state["embed"]["kernel"]) == [""]
    # With what is no parameter, as a whole module goes in.
    assert set(paths(model)) == {*MODEL_PATHS, "norm/mean", "norm/var"}
    for tree in (state, model, nnx.State(plain), [nnx.Param({"a": {"value": jnp.ones(1)}, "b": None}), None]):
        leaves, _ = flatten(tree)
        assert len(paths(tree)) == len(leaves)
        assert [path for path, x in zip(paths(tree), leaves, strict=True) if x is not None] == [
            path for path, _ in flatten_with_paths(tree)[0]
        ]
    assert paths([nnx.Param({"a": {"value": jnp.ones(1)}, "b": None}), None]) == ["0/a/value", "0/b", "1"]
    assert paths(nnx.Param(nnx.Param(jnp.ones(1)))) == [""]
    absent = jax.tree.map(lambda x: None, state)
    assert paths(absent) == MODEL_PATHS


def test_selection_in_nnx():
    nnx = pytest.importorskip("flax.nnx")
    params = nnx.state(nnx_model(nnx), nnx.Param)
    for where in ("**/kernel", matrices):
        assert select(where, paths(params), flatten(params)[0]) == [path.endswith("kernel") for path in MODEL_PATHS]
    rule = jr.adamw(0.1, weight_decay=0.5, where="**/kernel")
    zeros = jax.tree.map(jnp.zeros_like, params)
    new, state = rule.apply(zeros, rule.init(params), params)
    assert (abs(new["embed"]["kernel"][...]) < abs(params["embed"]["kernel"][...])).all()
    assert (new["norm"]["scale"][...] == 1).all()
    assert "adam.m.blocks/0/kernel" in leaf_names(state)
    assert hyperparams(set_hyperparams(state, learning_rate=0.5))["learning_rate"] == 0.5
    _, state = rule.apply(params, state, params)
    again = reset(rule, state, params, "blocks/**")
    m = nnx.to_pure_dict(find(again, AdamState).m)
    assert (m["blocks"][0]["kernel"] == 0).all()
    assert (m["embed"]["kernel"] != 0).any()
    loaded, _ = load_state_dict(rule.init(params), state_dict(state))
    chex.assert_trees_all_equal(loaded, state)


def test_selection_in_an_equinox_module():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
    hits = select("layers/*/weight", paths(model), flatten(model)[0])
    assert [path for path, hit in zip(paths(model), hits, strict=True) if hit] == ["layers/0/weight", "layers/1/weight"]
    assert select(matrices, paths(model), flatten(model)[0]) == hits
    state = jr.adamw().init(model)
    assert {row.slot: row.bytes for row in memory(state).rows}["adam.m"] == 4 * (8 * 4 + 8 + 2 * 8 + 2)
    assert "adam.v.layers/1/bias" in state_dict(state)
    reset(jr.adamw(), state, model, "layers/0/*")


# Rules for parts of a model, and of every kind

GROUPS = {"kernel": jr.sgd(0.1, momentum=0.9), "rest": jr.adamw(0.1)}


def groups_by_hand(kernels, rest, grads_of_kernels, grads_of_rest):
    """One step of both rules, each on leaves of its own."""
    new, _ = GROUPS["kernel"].apply(grads_of_kernels, GROUPS["kernel"].init(kernels), kernels)
    others, _ = GROUPS["rest"].apply(grads_of_rest, GROUPS["rest"].init(rest), rest)
    return new, others


@pytest.mark.parametrize("by", [{"kernel": "**/kernel"}, {"kernel": matrices}, {"rest": ["**/bias", "**/scale"]}])
def test_groups_by_pattern_in_nnx(by):
    """Where labels are a tree, a dict of them does not fit `nnx.State` (google-deepmind/optax#1148, flax#3955)."""
    nnx = pytest.importorskip("flax.nnx")
    params = nnx.state(nnx_model(nnx), nnx.Param)
    rule = jr.partition(GROUPS, by)
    new, state = jax.jit(rule.apply)(params, rule.init(params), params)
    assert type(new) is type(params)
    flat = dict(zip(paths(params), jax.tree.leaves(params), strict=True))
    kernels = {path: x for path, x in flat.items() if path.endswith("kernel")}
    rest = {path: x for path, x in flat.items() if path not in kernels}
    expected = groups_by_hand(kernels, rest, kernels, rest)
    found = dict(zip(paths(new), jax.tree.leaves(new), strict=True))
    chex.assert_trees_all_close(found, expected[0] | expected[1], rtol=1e-5, atol=1e-6)
    assert {row.leaf: row.group for row in jr.explain(rule, params).rows} == {
        path: "kernel" if path in kernels else "rest" for path in MODEL_PATHS
    }
    assert {name for name in state_dict(state) if ".v." in name and name.startswith("kernel")} == {
        f"kernel.velocity.v.{path}" for path in kernels
    }


@pytest.mark.parametrize(
    "rule",
    [
        jr.partition(GROUPS, {"kernel": "**/kernel"}),
        jr.partition({"off": jr.set_to_zero(), "on": jr.adamw(0.1)}, {"off": "embed/*"}),
        jr.chain(jr.masked(jr.clip_grad(0.1), "blocks/**"), jr.adamw(0.1, where="**/kernel")),
        jr.chain(jr.adamw(0.1), jr.scale_by_path({"blocks/**": 0.5})),
        # A slot that is a tuple of arrays comes back from `nnx.Optimizer` as an `nnx.State`.
        jr.partition({"kernel": jr.adafactor_pytorch(0.1), "rest": jr.sm3(0.1)}, {"kernel": "**/kernel"}),
        jr.accumulate(jr.skip_nonfinite(jr.average(jr.partition(GROUPS, {"kernel": matrices}))), 2),
    ],
    ids=repr,
)
def test_patterns_in_nnx_optimizer(rule):
    """The same training with `nnx.Optimizer` and with the rule on a plain `nnx.State`."""
    nnx = pytest.importorskip("flax.nnx")
    pytest.importorskip("optax")
    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 4)), jnp.float32)

    def loss_fn(model):
        return jnp.mean((model.norm(model.blocks[0](model.embed(x)), use_running_average=True) - 1) ** 2)

    model = nnx_model(nnx)
    optimizer = nnx.Optimizer(model, rule, wrt=nnx.Param)
    graph, params, rest = nnx.split(nnx_model(nnx), nnx.Param, ...)
    start, state = params, rule.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda params: loss_fn(nnx.merge(graph, params, rest)))(params)
        return rule.apply(grads, state, params)

    @nnx.jit
    def nnx_step(model, optimizer):
        optimizer.update(model, nnx.grad(loss_fn)(model))

    for _ in range(4):
        nnx_step(model, optimizer)
        params, state = step(params, state)
    trained = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    chex.assert_trees_all_close(trained, nnx.to_pure_dict(params), rtol=1e-4, atol=1e-5)
    frozen = bool((start["embed"]["kernel"][...] == trained["embed"]["kernel"]).all())
    assert frozen == ("set_to_zero" in repr(rule))


def test_frozen_leaves_of_an_nnx_state():
    nnx = pytest.importorskip("flax.nnx")
    params = nnx.state(nnx_model(nnx), nnx.Param)
    rule = jr.freeze(jr.adamw(0.1, weight_decay=0.5), ["embed/*", "**/bias"])
    new, state = jax.jit(rule.apply)(params, rule.init(params), params)
    same = [
        path for path, p, q in zip(paths(params), *map(jax.tree.leaves, (params, new)), strict=True) if (p == q).all()
    ]
    assert same == ["blocks/0/bias", "embed/bias", "embed/kernel", "norm/bias"]
    assert {row.leaf for row in jr.explain(rule, params).rows if row.group == "frozen"} == set(same)
    assert [name for name in state_dict(state) if ".m." in name] == ["adam.m.blocks/0/kernel", "adam.m.norm/scale"]


EVERY_KIND = [
    jr.sgd(0.1),
    jr.sgd(0.1, momentum=0.9),
    jr.momentum(0.1),
    jr.adam(),
    jr.adamw(where="**/weight"),
    jr.adamw(decay="initial"),
    jr.chain(jr.clip_by_global_norm(1.0), jr.weight_decay(0.1, matrices), jr.adamw()),
    jr.chain(jr.clip_by_value(1.0), jr.centralize(), jr.zero_nonfinite(), jr.add_noise(0.1), jr.sgd(0.1)),
    jr.chain(jr.adaptive_grad_clip(), jr.adam_direction(), jr.trust_ratio(), jr.step(0.1)),
    jr.chain(jr.normalize(), jr.sign(), jr.scale_by_leaf_rms(), jr.step(0.1)),
    jr.chain(jr.cautious(jr.adam_direction()), jr.step(0.1, 0.1)),
    jr.chain(jr.grokfast(), jr.ema(0.9), jr.sgd(0.1)),
    jr.chain(jr.stateless(lambda g: jax.tree.map(jnp.tanh, g)), jr.record("norm", jr.global_norm), jr.sgd(0.1)),
    jr.chain(jr.adamw(), jr.project(lambda x: x.clip(-1, 1), "**/weight"), jr.scale_by_path({"**/bias": 2.0})),
    jr.chain(jr.sgd(0.1), jr.layerwise_decay(0.5, ["layers/0/*", "layers/1/*"])),
    jr.partition({"w": jr.sgd(0.1), "rest": jr.adamw()}, {"w": "**/weight"}),
    jr.freeze(jr.adamw(), "layers/1/*"),
    jr.chain(jr.masked(jr.clip_grad(1.0), "**/weight"), jr.adamw()),
    jr.when(jr.adamw(), lambda count: count % 2 == 0),
    jr.accumulate(jr.chain(jr.clip_grad(1.0), jr.adamw()), 1),
    jr.skip_nonfinite(jr.adamw()),
    jr.skip_spikes(jr.adamw()),
    jr.average(jr.adamw()),
    jr.average(jr.sgd(0.1), window=2),
    jr.lookahead(jr.adamw(), 2),
    jr.accumulate(jr.skip_nonfinite(jr.average(jr.lookahead(jr.partition(GROUPS, {"kernel": matrices})))), 1),
]


@pytest.mark.parametrize("rule", EVERY_KIND, ids=repr)
def test_an_unfiltered_equinox_module(rule):
    """Which of Optax's rules take one is a matter of luck (optax with equinox#69, #105, #590, #853)."""
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 4)), jnp.float32)

    @eqx.filter_jit
    def step(model, state):
        grads = eqx.filter_grad(lambda model: jnp.mean((jax.vmap(model)(x) - 1) ** 2))(model)
        return rule.apply(grads, state, model)

    state = rule.init(model)
    new, new_state = step(model, state)
    new, new_state = step(new, new_state)
    assert new.activation is model.activation
    assert (new.layers[0].weight != model.layers[0].weight).any()
    chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
    assert jax.tree.structure(jr.eval_params(new_state, new)) == jax.tree.structure(model)


@pytest.mark.parametrize("rule", EVERY_KIND, ids=repr)
def test_a_filtered_equinox_module_has_the_state_of_the_whole(rule):
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
    filtered = eqx.filter(model, eqx.is_inexact_array)
    assert leaf_names(rule.init(filtered)) == leaf_names(rule.init(model))


def test_groups_by_pattern_in_an_equinox_module():
    """A module is callable, and as a tree of labels it is called (google-deepmind/optax#913, equinox#193)."""
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
    rule = jr.partition(GROUPS, {"kernel": "layers/*/weight"})
    new, _ = eqx.filter_jit(rule.apply)(eqx.filter(model, eqx.is_inexact_array), rule.init(model), model)
    kernels, rest = [layer.weight for layer in model.layers], [layer.bias for layer in model.layers]
    expected = groups_by_hand(kernels, rest, kernels, rest)
    chex.assert_trees_all_close([layer.weight for layer in new.layers], expected[0], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close([layer.bias for layer in new.layers], expected[1], rtol=1e-5, atol=1e-6)
    table = {row.leaf: row.group for row in jr.explain(rule, model).rows if row.group != "absent"}
    assert table == {
        f"layers/{i}/{name}": "kernel" if name == "weight" else "rest" for i in (0, 1) for name in ("weight", "bias")
    }


def test_frozen_layers_of_an_equinox_module():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(4, 2, 8, 1, key=jax.random.key(0))
    opt = jr.Optimizer(jr.freeze(jr.adamw(0.1, weight_decay=0.5), "layers/0/*"))
    new = opt.update(model, jax.tree.map(lambda x: x if eqx.is_inexact_array(x) else None, model))
    chex.assert_trees_all_equal(new.layers[0].weight, model.layers[0].weight)
    assert (new.layers[1].weight != model.layers[1].weight).all()
    assert not [name for name in opt.state_dict(new) if "layers/0" in name]


def test_states_of_optax_inside_ours_and_ours_inside_theirs(optax):
    rule = jr.chain(jr.clip_grad(1.0), optax.scale_by_adam(), jr.step(0.1))
    _, state = train(rule)
    assert find(state, optax.ScaleByAdamState) is state[1]
    fresh = rule.init(PARAMS)
    new = reset(rule, state, PARAMS, "w")
    assert (new[1].mu["w"] == 0).all()
    chex.assert_trees_all_equal((new[1].count, new[1].mu["b"]), (state[1].count, state[1].mu["b"]))
    chex.assert_trees_all_equal(reset(rule, state, PARAMS), fresh)
    assert {row.slot: row.bytes for row in memory(state).rows}["1"] == 2 * 4 * (6 + 2)
    loaded, _ = load_state_dict(fresh, state_dict(state))
    chex.assert_trees_all_equal(loaded, state)

    wrapped = optax.MultiSteps(optax.chain(optax.trace(0.9), jr.adam(0.1)), 2)
    state = wrapped.init(PARAMS)
    assert [family.name for family in families(state)] == ["adam", "step"]
    state = set_hyperparams(state, learning_rate=0.5)
    assert hyperparams(state)["learning_rate"] == 0.5
    assert find(state, AdamState).m.keys() == PARAMS.keys()
    assert find(state, optax.TraceState).trace.keys() == PARAMS.keys()
    chex.assert_trees_all_equal(load_state_dict(wrapped.init(PARAMS), state_dict(state))[0], state)
    new = reset(jr.Rule(wrapped.init, wrapped.update), jax.tree.map(jnp.ones_like, state), PARAMS, "w")
    assert (find(new, optax.TraceState).trace["w"] == 0).all()
    assert (new.acc_grads["w"] == 0).all()
    assert (new.acc_grads["b"] == 1).all()

    masked = optax.masked(optax.scale_by_adam(), {"w": True, "b": False})
    new = reset(jr.Rule(*masked), jax.tree.map(jnp.ones_like, masked.init(PARAMS)), PARAMS, "w")
    assert (find(new, optax.ScaleByAdamState).nu["w"] == 0).all()


class NoisyState(NamedTuple):
    count: Any
    hyper: Any
    key: Any
    m: Any


def test_a_state_through_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    slots = {"m": lambda p: jnp.zeros_like(p)}
    rule = jr.chain(jr.leafwise(lambda g, m, *, key: (g, (g,)), NoisyState, slots=slots, key=0), jr.adam(0.1))
    _, state = rule.update(params, rule.init(params), params)
    safetensors.save_file(state_dict(state), tmp_path / "state.safetensors")
    saved = safetensors.load_file(tmp_path / "state.safetensors")
    assert saved["noisy.m.w"].dtype == jnp.bfloat16
    loaded, _ = load_state_dict(rule.init(params), saved)
    chex.assert_trees_all_equal(loaded, state)
