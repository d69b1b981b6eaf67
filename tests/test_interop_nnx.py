"""Flax NNX: modules are updated in place, by `Optimizer` and, inside transforms as well, by `interop.nnx.Optimizer`."""

import copy
import gc
import pickle
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import stepped
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxopt_rules as jr
from jaxopt_rules import stateful
from jaxopt_rules import variables as nnx_variables
from jaxopt_rules.rules.adam import AdamState

nnx = pytest.importorskip("flax.nnx")
interop = pytest.importorskip("jaxopt_rules.interop.nnx")

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32)
Y = jnp.asarray(RNG.normal(size=(8, 2)), jnp.float32)


class Scale(nnx.Param):
    """A kind of parameter of its own, for filters."""


class Model(nnx.Module):
    def __init__(self, rngs: Any, dtype: Any = jnp.float32) -> None:
        self.embed = nnx.Linear(3, 4, rngs=rngs, param_dtype=dtype)
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs, param_dtype=dtype) for _ in range(2)])
        self.again = self.blocks[0]
        self.norm = nnx.BatchNorm(4, rngs=rngs, param_dtype=dtype)
        self.gain = Scale(jnp.ones((), dtype))
        self.head = nnx.Linear(4, 2, rngs=rngs, param_dtype=dtype)

    def __call__(self, x: Any) -> Any:
        x = self.embed(x)
        for block in [*self.blocks, self.again]:
            x = jnp.tanh(block(x))
        return self.head(self.norm(x)) * self.gain


PATHS = ["blocks/0", "blocks/1", "embed", "head"]
PATHS = ["again/bias", "again/kernel", *(f"{path}/{x}" for path in PATHS[1:] for x in ("bias", "kernel"))]
PATHS = sorted([*PATHS, "norm/bias", "norm/scale", "gain"])


def loss_fn(model: Any) -> Any:
    return jnp.mean((model(X) - Y) ** 2)


def make(seed: int = 0, **keywords: Any) -> Any:
    return Model(nnx.Rngs(seed), **keywords)


def values(model: Any, wrt: Any = nnx.Param) -> dict[str, Any]:
    flat = nnx.to_flat_state(nnx.state(model, wrt))
    return {"/".join(map(str, path)): x.get_raw_value() for path, x in flat}


@nnx.jit
def loss_and_grads(model: Any) -> Any:
    return nnx.value_and_grad(loss_fn)(model)


def by_hand(rule: jr.Rule, steps: int, model: Any) -> dict[str, Any]:
    """The rule on `{path: array}`."""
    params = values(model)
    state = rule.init(params)
    for _ in range(steps):
        _, grads = loss_and_grads(model)
        params, state = stepped(rule, params, state, values(grads))
        nnx.update(model, nnx.from_flat_state({tuple(unwritten(path)): x for path, x in params.items()}))
    return params


def unwritten(path: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in path.split("/")]


def outside(optimizer: Any) -> Any:
    def step(model: Any) -> None:
        _, grads = loss_and_grads(model)
        assert optimizer.update(model, grads) is model

    return step


def inside(optimizer: Any) -> Any:
    @nnx.jit
    def compiled(model: Any, optimizer: Any) -> None:
        optimizer.update(model, nnx.grad(loss_fn)(model))

    return lambda model: compiled(model, optimizer)


WAYS = {
    "Optimizer": lambda model, rule: outside(jr.Optimizer(rule)),
    "interop, outside": lambda model, rule: outside(interop.Optimizer(model, rule)),
    "interop, nnx.jit": lambda model, rule: inside(interop.Optimizer(model, rule)),
}
RULES = [
    jr.chain(jr.clip_by_global_norm(0.5), jr.adamw(0.1, where="**/kernel")),
    jr.partition({"muon": jr.muon(0.05), "rest": jr.adam(0.1)}, {"muon": "embed/kernel"}),
    jr.freeze(jr.sgd(0.1, momentum=0.9), ["norm/*", "blocks/1/*"]),
    jr.accumulate(jr.skip_nonfinite(jr.average(jr.adafactor_pytorch(0.1))), 2),
    jr.chain(jr.add_noise(0.1), jr.sgd(0.1), jr.project(lambda p: p.clip(-1, 1), "**/kernel")),
    jr.schedule_free_adamw(0.1, b1=0.9),
    jr.chain(jr.momentum_direction(0.9), jr.step(jr.Linear(0.1, 3))),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("way", WAYS)
def test_a_module_is_updated_in_place_as_the_rule_updates_its_arrays(way, rule):
    model, other = make(), make()
    kernel = model.embed.kernel
    step = WAYS[way](model, rule)
    for _ in range(3):
        step(model)
    assert list(values(model)) == PATHS
    assert model.embed.kernel is kernel
    assert model.again is model.blocks[0]
    chex.assert_trees_all_close(values(model), by_hand(rule, 3, other), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("way", WAYS)
def test_dtypes_stay(way):
    model = make(dtype=jnp.bfloat16)
    before = values(model)
    step = WAYS[way](model, jr.adamw(0.1))
    step(model)
    after = values(model)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
    assert all((after[path] != before[path]).any() for path in PATHS)


@pytest.mark.parametrize("way", WAYS)
def test_what_the_model_holds_may_be_replaced(way):
    """Neither of the two takes the variables for those of the update before."""
    model = make()
    step = WAYS[way](model, jr.sgd(0.1))
    step(model)
    old, model.head = model.head, nnx.Linear(4, 2, rngs=nnx.Rngs(7))
    model.blocks[1].bias = nnx.Param(jnp.full(4, 2.0))
    before, kept = values(model), old.kernel.get_raw_value()
    step(model)
    after = values(model)
    assert all((after[path] != before[path]).any() for path in PATHS)
    chex.assert_trees_all_equal(old.kernel.get_raw_value(), kept)


def test_one_trace_whatever_the_values():
    model = make()
    rule = jr.chain(jr.clip_grad(1.0), jr.adamw(jr.Linear(0.1, 10), weight_decay=0.1))
    optimizer = interop.Optimizer(model, rule)
    traces = []

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)
        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss, optimizer.metrics

    losses = []
    for k in range(4):
        loss, recorded = step(model, optimizer)
        losses.append(float(loss))
        np.testing.assert_allclose(recorded["learning_rate"], 0.1 * (1 - k / 10), rtol=1e-6)
        optimizer.set_hyperparams(weight_decay=0.2)
    assert len(traces) == 1
    assert losses == sorted(losses, reverse=True)
    assert optimizer.hyperparams["weight_decay"] == np.float32(0.2)
    assert optimizer.metrics["grad_norm"] > 0
    with pytest.raises(ValueError, match="learning_rate is owned by a schedule"):
        optimizer.set_hyperparams(learning_rate=0.1)


# Filters


@pytest.mark.parametrize("outside", [True, False])
def test_wrt(outside):
    model = make()
    optimizer = interop.Optimizer(model, jr.sgd(0.1), wrt=Scale)
    before = values(model)

    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss_fn, argnums=nnx.DiffState(0, Scale))(model))

    (step if outside else nnx.jit(step))(model, optimizer)
    changed = [path for path, x in values(model).items() if (x != before[path]).any()]
    assert changed == ["gain"]
    kernels = interop.Optimizer(model, jr.adam(), wrt=nnx.All(nnx.Param, nnx.PathContains("kernel")))
    assert [name for name in kernels.state_dict() if ".m." in name] == [
        f"adam.m.{path}" for path in PATHS if path.endswith("kernel")
    ]
    with pytest.raises(ValueError, match="the gradients must be a tree like the parameters that wrt selects, but it"):
        kernels.update(model, nnx.grad(loss_fn)(model))


@pytest.mark.parametrize("inside_jit", [True, False])
def test_several_modules_in_a_list(inside_jit):
    models = [Small(nnx.Rngs(0)), Small(nnx.Rngs(1))]
    optimizer = interop.Optimizer(models, jr.sgd(0.1))

    def step(models, optimizer):
        optimizer.update(models, nnx.grad(lambda models: models[0].loss() + models[1].loss())(models))

    before = [model.layer.kernel.get_raw_value() for model in models]
    (nnx.jit(step) if inside_jit else step)(models, optimizer)
    assert all((model.layer.kernel.get_raw_value() != x).all() for model, x in zip(models, before, strict=True))


def test_a_line_search_of_optax_gets_its_gradient():
    optax = pytest.importorskip("optax")
    model = Small(nnx.Rngs(0))
    optimizer = interop.Optimizer(model, optax.lbfgs())
    losses = []
    for _ in range(3):
        loss, grads = nnx.value_and_grad(Small.loss)(model)
        optimizer.update(model, grads, value=loss, grad=grads, value_fn=Small.loss)
        losses.append(float(loss))
    assert losses[-1] < 1e-3 < losses[0]
    with pytest.raises(IndexError) as raised:
        jr.Optimizer(optax.lbfgs())
    assert "begins without parameters" in raised.value.__notes__[0]


@pytest.mark.parametrize("kind", [jr.Optimizer, interop.Optimizer])
def test_states_that_hold_the_parameters_themselves(kind):
    optax = pytest.importorskip("optax")
    model, tx = Small(nnx.Rngs(0)), optax.contrib.prodigy()
    optimizer = kind(tx) if kind is jr.Optimizer else kind(model, tx)
    before = model.layer.kernel.get_raw_value()
    for _ in range(2):
        optimizer.update(model, nnx.grad(Small.loss)(model))
    assert (model.layer.kernel.get_raw_value() != before).all()


@pytest.mark.parametrize("way", ["Optimizer", "interop"])
def test_absent_gradients(way):
    model = make()
    rule = jr.adamw(0.1, weight_decay=0.5)
    optimizer = jr.Optimizer(rule) if way == "Optimizer" else interop.Optimizer(model, rule)
    _, grads = loss_and_grads(model)
    before = values(model)
    grads["head"]["kernel"] = nnx.Param(None)
    grads["embed"]["bias"] = None
    optimizer.update(model, grads)
    same = [path for path, x in values(model).items() if (x == before[path]).all()]
    assert same == ["embed/bias", "head/kernel"]


# NNX's own containers and transforms


class Stack(nnx.Module):
    def __init__(self, rngs: Any) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def create(rngs):
            return nnx.Linear(3, 3, rngs=rngs)

        self.layers = create(rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(layer, x):
            return jnp.tanh(layer(x))

        return self.head(forward(self.layers, x))


def test_scanned_layers_and_a_scanned_training():
    first, second = Stack(nnx.Rngs(0)), Stack(nnx.Rngs(0))
    rule = jr.partition(
        {"muon": jr.muon(0.05, views=jr.MatrixView()), "rest": jr.adamw(0.1)}, {"muon": "layers/kernel"}
    )

    def body(carry):
        model, optimizer = carry
        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return (model, optimizer), loss

    optimizer = interop.Optimizer(first, rule)
    assert values(optimizer, interop.OptState)["opt_state/muon/0/m/layers/kernel"].shape == (3, 3, 3)
    scanned = nnx.scan(length=4, in_axes=(nnx.Carry,), out_axes=(nnx.Carry, 0))(body)
    losses = nnx.jit(scanned)((first, optimizer))[1]
    step, other = nnx.jit(lambda *carry: body(carry)[1]), interop.Optimizer(second, rule)
    np.testing.assert_allclose(losses, [step(second, other) for _ in range(4)], rtol=1e-5)
    chex.assert_trees_all_close(values(first), values(second), rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(optimizer.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-5)


def test_an_ensemble():
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def create(rngs):
        model = Stack(rngs)
        return model, interop.Optimizer(model, jr.chain(jr.clip_grad(0.1), jr.adamw(0.1)))

    @nnx.jit
    @nnx.vmap
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    models, optimizers = create(nnx.Rngs(0))
    optimizers.set_hyperparams(learning_rate=jnp.array([0.1, 0.0]))
    losses = jnp.stack([step(models, optimizers) for _ in range(3)])
    assert (jnp.diff(losses[:, 0]) < 0).all()
    assert (losses[:, 1] == losses[0, 1]).all()
    assert optimizers.metrics["grad_norm"].shape == (2,)


class Untied(Model):
    """Tree mode takes no variable twice."""

    def __init__(self, rngs: Any) -> None:
        super().__init__(rngs)
        self.again = nnx.Linear(4, 4, rngs=rngs)


def test_tree_mode():
    model, other = Untied(nnx.Rngs(0)), Untied(nnx.Rngs(0))
    optimizer, same = interop.Optimizer(model, jr.adamw(0.1)), interop.Optimizer(other, jr.adamw(0.1))

    def step(graph, model, optimizer):
        loss, grads = nnx.value_and_grad(loss_fn, graph=graph)(model)
        optimizer.update(model, grads)
        return loss

    for _ in range(2):
        nnx.jit(step, graph=False, static_argnums=0)(False, model, optimizer)
        step(True, other, same)
    chex.assert_trees_all_close(values(model), values(other), rtol=1e-5, atol=1e-6)


def test_split_merge_and_update():
    model = make()
    optimizer = interop.Optimizer(model, jr.adamw(0.1))
    graph, state = nnx.split((model, optimizer))

    @jax.jit
    def step(state):
        model, optimizer = nnx.merge(graph, state)
        optimizer.update(model, nnx.grad(loss_fn)(model))
        return nnx.state((model, optimizer))

    for _ in range(2):
        state = step(state)
    nnx.update((model, optimizer), state)
    chex.assert_trees_all_close(values(model), by_hand(jr.adamw(0.1), 2, make()), rtol=2e-5, atol=2e-6)
    assert optimizer.state_dict()["adam.count"] == 2
    only = nnx.state(optimizer, interop.OptState)
    assert len(nnx.to_flat_state(only).paths) == len(optimizer.state_dict())


@pytest.mark.parametrize("way", ["Optimizer", "interop"])
def test_variables_that_are_references(way):
    rule = jr.adamw(0.1)
    with nnx.var_defaults(ref=True):
        model = make()
        optimizer = jr.Optimizer(rule) if way == "Optimizer" else interop.Optimizer(model, rule)
    ref, before = model.embed.kernel.get_raw_value(), values(make())
    _, grads = loss_and_grads(make())
    optimizer.update(model, grads)
    assert model.embed.kernel.get_raw_value() is ref
    expected, _ = stepped(rule, before, rule.init(before), values(grads))
    chex.assert_trees_all_close({path: x[...] for path, x in values(model).items()}, expected, rtol=1e-5, atol=1e-6)


# Sharding


class Sharded(nnx.Module):
    def __init__(self, rngs: Any) -> None:
        init = nnx.initializers.lecun_normal()
        self.w = nnx.Param(init(rngs.params(), (4, 2)), out_sharding=("data", None))
        self.b = nnx.Param(jnp.zeros(4), out_sharding=(None,), optimizer_sharding=("data",))

    def __call__(self, x: Any) -> Any:
        return jnp.concatenate([x, x[:, :1]], 1) @ self.w.get_value() + self.b.get_value()[:2]


@pytest.mark.parametrize("way", ["outside", "nnx.jit", "born in nnx.jit"])
def test_sharding_and_its_metadata(way):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    rule = jr.chain(jr.clip_grad(1.0), jr.adafactor_pytorch(0.1), jr.record("norm", jr.global_norm))

    def create():
        model = Sharded(nnx.Rngs(0))
        return model, interop.Optimizer(model, jr.chain(jr.trace(0.9), rule))

    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss_fn)(model))

    with jax.set_mesh(mesh):
        model, optimizer = (nnx.jit(create) if way == "born in nnx.jit" else create)()
        for _ in range(2):
            (step if way == "outside" else nnx.jit(step))(model, optimizer)
    slots = {path: x for path, x in nnx.to_flat_state(nnx.state(optimizer))}
    traced = {path[-1]: x for path, x in slots.items() if "trace" in path or path[:3] == ("opt_state", 0, "v")}
    assert {name: x.get_metadata("out_sharding") for name, x in traced.items()} == {
        "w": ("data", None),
        "b": ("data",),
    }
    for variable in (traced["w"], traced["b"], model.w):
        x = variable.get_raw_value()
        assert x.sharding.is_equivalent_to(jax.NamedSharding(mesh, P("data")), x.ndim)
    # What has not the shape of its parameter has not its axes.
    factored = [x for path, x in slots.items() if "w" in path and x.get_raw_value().shape != (4, 2)]
    assert factored
    assert all("out_sharding" not in x.get_metadata() for x in factored)
    specs = nnx.get_partition_spec(nnx.state(model))
    assert specs["w"].get_value() == P("data", None)


# Losses of the model


@pytest.mark.parametrize("outside", [True, False])
def test_rules_that_evaluate_the_loss_get_a_function_of_the_model(outside):
    model = make()
    optimizer = interop.Optimizer(model, jr.chain(jr.adam_direction(), jr.backtracking()))
    evaluations = []

    def evaluate(model):
        evaluations.append(1)
        return loss_fn(model)

    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads, value=loss, value_fn=evaluate)
        return loss

    losses = [float((step if outside else nnx.jit(step))(model, optimizer)) for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    assert evaluations
    chex.assert_tree_all_finite(values(model, nnx.BatchStat))


def test_a_plain_optimizer_hands_such_a_function_on_too():
    rule = jr.chain(jr.adam_direction(), jr.backtracking())
    model, other = make(), make()
    optimizer, same = jr.Optimizer(rule), interop.Optimizer(other, rule)
    for _ in range(2):
        for m, one in ((model, optimizer), (other, same)):
            loss, grads = loss_and_grads(m)
            one.update(m, grads, value=loss, value_fn=loss_fn)
    chex.assert_trees_all_close(values(model), values(other), rtol=1e-5, atol=1e-6)


def test_a_loss_that_no_rule_asks_for_compiles_nothing():
    model = make()
    optimizer = interop.Optimizer(model, jr.adamw(0.1))
    loss, grads = loss_and_grads(model)
    optimizer.update(model, grads, value=loss)
    before = interop._shared_program.cache_info().misses
    optimizer.update(model, grads, value=loss, value_fn=lambda model: loss_fn(model))
    assert interop._shared_program.cache_info().misses == before
    assert optimizer not in interop._own_programs


def live(kind: type) -> int:
    gc.collect()
    return sum(type(x) is kind for x in gc.get_objects())


class Batch:
    """Something that a loss holds on to."""


def test_losses_that_are_new_each_time_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(interop, "MOST_LOSSES", 2)
    monkeypatch.setattr(stateful, "MOST_LOSSES", 2)
    model = Small(nnx.Rngs(0))
    rule = jr.chain(jr.adam_direction(), jr.backtracking())
    optimizers = [jr.Optimizer(rule), interop.Optimizer(model, rule)]
    _, grads = nnx.value_and_grad(Small.loss)(model)
    for optimizer in optimizers:
        for _ in range(4):
            batch = Batch()
            optimizer.update(model, grads, value_fn=lambda model, batch=batch: model.loss())
    del batch
    assert live(Batch) <= 4
    del optimizers, optimizer
    assert live(Batch) == 0


def test_nothing_of_a_trace_is_left_behind():
    model = Small(nnx.Rngs(0))
    optimizer = interop.Optimizer(model, jr.chain(jr.adam_direction(), jr.backtracking()))

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(Small.loss)(model)
        optimizer.update(model, grads, value=loss, value_fn=lambda model: model.loss() + 0 * loss)

    with jax.checking_leaks():
        step(model, optimizer)


# Life and death of models and optimizers


class Small(nnx.Module):
    def __init__(self, rngs: Any) -> None:
        self.layer = nnx.Linear(2, 1, rngs=rngs)

    def loss(self) -> Any:
        return jnp.mean((self.layer(jnp.ones((3, 2))) - 2) ** 2)


@pytest.mark.parametrize("kind", [jr.Optimizer, interop.Optimizer])
def test_a_model_dies_with_its_optimizer(kind):
    for _ in range(3):
        model = Small(nnx.Rngs(0))
        model.layer.parent = nnx.data(model)
        optimizer = kind(jr.sgd(0.1)) if kind is jr.Optimizer else kind(model, jr.sgd(0.1))
        optimizer.update(model, nnx.grad(Small.loss)(model))
        del model, optimizer
    assert live(Small) == 0


def test_activations_that_a_module_keeps_are_not_kept_by_the_optimizer():
    model, optimizer = Small(nnx.Rngs(0)), jr.Optimizer(jr.sgd(0.1))
    for _ in range(4):
        model.seen = nnx.Intermediate(jnp.ones(3))
        optimizer.update(model, nnx.grad(Small.loss)(model))
    assert live(nnx.Intermediate) == 1


def pickled(pair: Any) -> Any:
    return pickle.loads(pickle.dumps(pair))


@pytest.mark.parametrize(
    ("kind", "how"), [(interop.Optimizer, copy.deepcopy), (interop.Optimizer, pickled), (jr.Optimizer, pickled)]
)
def test_model_and_optimizer_copied_together_go_on_as_one_pair(kind, how):
    rule = jr.adamw(0.1)
    model = Small(nnx.Rngs(0))
    optimizer = kind(rule) if kind is jr.Optimizer else kind(model, rule)
    grads = nnx.grad(Small.loss)(model)
    optimizer.update(model, grads)
    other, same = how((model, optimizer))
    optimizer.update(model, grads)
    same.update(other, grads)
    chex.assert_trees_all_equal(values(model), values(other))


def test_a_deep_copy_that_would_lose_its_model_is_refused():
    model, optimizer = Small(nnx.Rngs(0)), jr.Optimizer(jr.adamw(0.1))
    copy.deepcopy(optimizer)
    optimizer.update(model, nnx.grad(Small.loss)(model))
    with pytest.raises(TypeError, match="has other variables"):
        copy.deepcopy((model, optimizer))


def test_what_was_read_stays_readable():
    model = Small(nnx.Rngs(0))
    rule = jr.accumulate(jr.skip_nonfinite(jr.adamw(0.1)), 2)
    optimizer = interop.Optimizer(model, rule)
    grads = nnx.grad(Small.loss)(model)
    read = []
    for _ in range(3):
        optimizer.update(model, grads)
        read.append(optimizer.metrics | optimizer.hyperparams)
    assert [int(values["micro_step"]) for values in read] == [1, 0, 1]
    assert {float(values["learning_rate"]) for values in read} == {np.float32(0.1)}


def test_without_donation_clones_and_states_stay_valid():
    model = Small(nnx.Rngs(0))
    optimizer = interop.Optimizer(model, jr.adamw(0.1), donate=False)
    clone, state = nnx.clone(optimizer), nnx.state(optimizer)
    optimizer.update(model, nnx.grad(Small.loss)(model))
    assert clone.state_dict()["adam.count"] == 0
    chex.assert_tree_all_finite(jax.tree.leaves(state))


def test_optimizers_of_parts_of_a_model_take_turns(monkeypatch):
    """Each finds what it listed before, also when numbers and flags among the attributes have changed."""
    model = make()
    model.steps = 0
    parts = [nnx.All(nnx.Param, nnx.PathContains(name)) for name in ("embed", "head")]
    optimizers = [interop.Optimizer(model, jr.sgd(0.1), wrt=part) for part in parts]
    grads = [nnx.grad(loss_fn, argnums=nnx.DiffState(0, part))(model) for part in parts]
    for k in range(3):
        if k == 1:  # from then on nothing is listed anew
            monkeypatch.setattr(nnx_variables, "_listing", None)
        loss_and_grads(model)
        model.steps += 1000
        for optimizer, g in zip(optimizers, grads, strict=True):
            optimizer.update(model, g)
        model.eval()
        model.train()


# Averages, saving


@pytest.mark.parametrize("way", ["Optimizer", "interop"])
def test_evaluating(way):
    model = make()
    rule = jr.average(jr.sgd(0.1), decay=0.5)
    optimizer = jr.Optimizer(rule) if way == "Optimizer" else interop.Optimizer(model, rule)
    step = outside(optimizer)
    step(model)
    step(model)
    trained = values(model)
    with optimizer.evaluating(model) as same:
        assert same is model
        averaged = values(model)
    chex.assert_trees_all_equal(values(model), trained)
    assert all((averaged[path] != trained[path]).any() for path in PATHS)


@pytest.mark.parametrize("way", ["Optimizer", "interop"])
def test_state_dict_goes_on_bit_for_bit(way):
    rule = jr.chain(jr.clip_grad(1.0), jr.add_noise(0.1), jr.adamw(0.1))

    def optimizer_of(model):
        return jr.Optimizer(rule) if way == "Optimizer" else interop.Optimizer(model, rule)

    def save(optimizer, model):
        return optimizer.state_dict(model) if way == "Optimizer" else optimizer.state_dict()

    model, other = make(), make(1)
    optimizer, fresh = optimizer_of(model), optimizer_of(other)
    outside(optimizer)(model)
    saved = pickle.loads(pickle.dumps(save(optimizer, model)))
    assert {"adam.m.again/kernel", "adam.v.gain"} <= {name.removeprefix("rule.") for name in saved}
    nnx.update(other, nnx.state(model))
    if way == "Optimizer":
        fresh.load_state_dict(other, saved)
    else:
        assert str(fresh.load_state_dict(saved)) == "everything was loaded"
    outside(optimizer)(model)
    outside(fresh)(other)
    chex.assert_trees_all_equal(values(model), values(other))
    chex.assert_trees_all_equal(save(optimizer, model), save(fresh, other))


def test_a_state_dict_that_does_not_fit_changes_nothing():
    model = make()
    optimizer = interop.Optimizer(model, jr.adamw(0.1))
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match="the saved state does not fit"):
        optimizer.load_state_dict(before | {"adam.m.gain": np.ones(3)})
    chex.assert_trees_all_equal(optimizer.state_dict(), before)


def test_orbax(tmp_path):
    orbax = pytest.importorskip("orbax.checkpoint")
    rule = jr.chain(jr.clip_grad(1.0), jr.adamw(jr.Linear(0.1, 9)))
    model = make()
    optimizer = interop.Optimizer(model, rule)
    step = inside(optimizer)
    step(model)
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state((model, optimizer)))
    other = make(1)
    pair = (other, interop.Optimizer(other, rule))
    abstract = jax.tree.map(orbax.utils.to_shape_dtype_struct, nnx.state(pair))
    with orbax.StandardCheckpointer() as checkpointer:
        nnx.update(pair, checkpointer.restore(tmp_path / "state", abstract))
    step(model)
    inside(pair[1])(other)
    chex.assert_trees_all_equal(values(model), values(other))
    chex.assert_trees_all_equal(optimizer.state_dict(), pair[1].state_dict())


# What is refused


class Named(nnx.Module):
    def __init__(self, parts: Any) -> None:
        self.a = nnx.data(parts)


def test_errors():
    model = make()
    _, grads = loss_and_grads(model)
    with pytest.raises(ValueError, match=r"adam_direction\(\) gives a direction, not an update; end it with step"):
        interop.Optimizer(model, jr.adam_direction())
    with pytest.raises(TypeError, match="was it meant to be called"):
        interop.Optimizer(model, jr.adam)
    optimizer = interop.Optimizer(model, jr.adamw(0.1))
    before, state = values(model), optimizer.state_dict()
    with pytest.raises(TypeError, match="does not take valeu; the extra arguments it accepts are"):
        optimizer.update(model, grads, valeu=1.0)
    with pytest.raises(ValueError, match="'embed/kernel' has shape \\(2, 2\\), its parameter has shape \\(3, 4\\)"):
        optimizer.update(model, nnx.State({**grads, "embed": {**grads["embed"], "kernel": jnp.ones((2, 2))}}))
    with pytest.raises(ValueError, match="but it lacks 'embed/bias', 'embed/kernel'"):
        optimizer.update(model, nnx.State({name: g for name, g in grads.items() if name != "embed"}))
    with pytest.raises(ValueError, match="it has besides 'more'"):
        optimizer.update(model, nnx.State({**grads, "more": jnp.ones(2)}))
    for one in (optimizer, jr.Optimizer(jr.adamw(0.1))):
        with pytest.raises(TypeError, match="takes the model first"):
            one.update(grads, model)
    with pytest.raises(ValueError, match="two variables of the model have the same path, 'a/a/b'"):
        interop.Optimizer(Named({"a/b": nnx.Param(jnp.ones(2)), "a": {"b": nnx.Param(jnp.ones(2))}}), jr.sgd(0.1))
    with pytest.raises(ValueError, match="the module has no variable at 'more', where the gradients have one"):
        jr.Optimizer(jr.adamw(0.1)).update(model, nnx.State({**grads, "more": jnp.ones(2)}))
    chex.assert_trees_all_equal((values(model), optimizer.state_dict()), (before, state))


def test_an_interrupted_update_is_completed(monkeypatch):
    model, other = make(), make()
    optimizer, same = (interop.Optimizer(m, jr.adamw(0.1)) for m in (model, other))
    _, grads = loss_and_grads(model)
    store = interop.write

    def interrupted(variables, new):
        monkeypatch.setattr(interop, "write", store)
        raise KeyboardInterrupt

    monkeypatch.setattr(interop, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.update(model, grads)
    same.update(other, grads)
    chex.assert_trees_all_equal((values(model), optimizer.state_dict()), (values(other), same.state_dict()))


def test_a_plain_optimizer_inside_of_a_transform_says_which_one_goes_there():
    model = make()
    optimizer = jr.Optimizer(jr.adamw(0.1))

    @nnx.jit
    def step(model):
        optimizer.update(model, nnx.grad(loss_fn)(model))

    with pytest.raises(TypeError, match=r"or, for a Flax NNX module, jaxopt_rules\.interop\.nnx\.Optimizer"):
        step(model)


def test_the_state_is_found_by_its_type():
    optimizer = interop.Optimizer(make(), jr.adamw(0.1))
    assert jr.find(optimizer.opt_state, AdamState).m.keys() == set(PATHS)
    assert type(jr.find(optimizer.opt_state, AdamState).count) is interop.OptState
