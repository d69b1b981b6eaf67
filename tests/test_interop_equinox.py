"""Raw Equinox modules, static fields included, under every rule, in every place where Equinox takes a model."""

from functools import cache, partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import QUICK, quick_jit
from table import ROWS, Row

import jaxopt_rules as jr
from jaxopt_rules.select import matrices
from jaxopt_rules.state import leaf_names, set_hyperparams
from jaxopt_rules.trees import flatten, paths

eqx = pytest.importorskip("equinox")

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
Y = np.sin(X @ np.ones((3, 1), np.float32))
quick_filter_jit = partial(eqx.filter_jit, compiler_options=QUICK)


class Net(eqx.Module):
    """What modules hold besides arrays of floating-point numbers."""

    first: eqx.nn.Linear
    second: eqx.nn.Linear  # its bias is None
    scale: jax.Array = eqx.field(converter=jnp.asarray)
    calls: jax.Array  # integers
    key: jax.Array
    rate: float
    activation: Any  # a function that is a leaf
    name: str = eqx.field(static=True)

    def __init__(self, seed: int | jax.Array = 0, dtype: Any = jnp.float32) -> None:
        keys = jax.random.split(jax.random.key(seed), 2)
        self.first = eqx.nn.Linear(3, 2, key=keys[0], dtype=dtype)
        self.second = eqx.nn.Linear(2, 1, use_bias=False, key=keys[1], dtype=dtype)
        self.scale, self.calls, self.key = jnp.ones((), dtype), jnp.arange(2), jax.random.key(7)
        self.rate, self.activation, self.name = 0.5, jnp.tanh, "net"

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.scale * self.second(self.activation(self.first(x)))


def mixed() -> Net:
    """Two dtypes in one module."""
    return eqx.tree_at(lambda net: net.second.weight, Net(), replace_fn=lambda w: w.astype(jnp.bfloat16))


def loss_fn(model: Any, x: Any = X, y: Any = Y) -> jax.Array:
    return jnp.mean((jax.vmap(model)(x) - y).astype(jnp.float32) ** 2)


gradient = quick_filter_jit(eqx.filter_grad(loss_fn))


@pytest.fixture(autouse=True)
def _fresh_trace_counter():
    chex.clear_trace_counter()


def arrays(tree: Any) -> list[Any]:
    """The arrays of a tree, typed keys as their numbers."""
    leaves = jax.tree.leaves(eqx.filter(tree, eqx.is_array))
    return [jax.random.key_data(x) if is_key(x) else x for x in leaves]


def copied(tree: Any) -> Any:
    """Of buffers of its own, to be donated."""
    return jax.tree.map(lambda x: x.copy() if eqx.is_array(x) else x, tree)


def roundings(actual: Any, expected: Any, n: int = 100) -> None:
    """That two trees are of one structure and dtypes, and differ by n roundings of float32, or one to bfloat16."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for x, y in zip(arrays(actual), arrays(expected), strict=True):
        assert x.dtype == y.dtype
        narrow = 2 * float(jnp.finfo(x.dtype).eps) if n and x.dtype == jnp.bfloat16 else 0.0
        tolerance = max(n * float(jnp.finfo(jnp.float32).eps), narrow)
        np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), tolerance, tolerance)


def precision(row: Row) -> int:
    """In roundings. Where a function is least, what searches with it knows to the root of a rounding alone."""
    return 10_000 if "value_fn" in row.extra else 100


def terminal(row: Row) -> jr.Rule:
    """The rule of a row, behind which there are updates."""
    return row.make() if row.rate is not None else jr.chain(row.make(), jr.step(0.1))


rows = pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=row.name, marks=[pytest.mark.thorough][: not row.laws or row.thorough]) for row in ROWS],
)

RULES = {
    "adamw": lambda: jr.chain(jr.clip_by_global_norm(1.0), jr.adamw(0.05, where="**/weight")),
    "groups": lambda: jr.partition({"matrix": jr.muon(0.05), "rest": jr.adafactor(0.05)}, {"matrix": matrices}),
    "nested": lambda: jr.accumulate(jr.skip_nonfinite(jr.average(jr.lookahead(jr.sgd(0.1, 0.9)))), 2),
    "noise": lambda: jr.chain(jr.add_noise(0.1), jr.sgd(0.1)),
}
rules = pytest.mark.parametrize("make", RULES.values(), ids=RULES)


# ---------------------------------------------------------------------------------------------------------------------
# Every rule
# ---------------------------------------------------------------------------------------------------------------------


@rows
def test_every_rule_in_a_loop_that_donates_all(row):
    """Two steps of a raw module, against `Optimizer` on the plain dict of the same arrays."""
    rule = terminal(row)
    model = mixed()
    names = paths(model)

    @partial(quick_filter_jit, donate="all")
    def step(model, state, grads):
        return rule.apply(grads, state, model, **row.extra)

    new, state = copied(model), rule.init(model)
    plain, optimizer = dict(zip(names, flatten(model)[0], strict=True)), jr.Optimizer(rule)
    for _ in range(2):
        grads = gradient(new)
        # Both have the gradients of one of them: a rounding may change the sign of a small one.
        plain = optimizer.update(plain, dict(zip(names, flatten(grads)[0], strict=True)), **row.extra)
        given = new, state
        new, state = step(new, state, grads)
        assert all(x.is_deleted() for x in jax.tree.leaves(eqx.filter(given[0], eqx.is_inexact_array)) if x.ndim)
        assert jax.tree.structure((new, state)) == jax.tree.structure(given)
    assert new.activation is model.activation
    roundings(new, jax.tree.unflatten(flatten(model)[1], [plain[name] for name in names]), precision(row))


# ---------------------------------------------------------------------------------------------------------------------
# bfloat16
# ---------------------------------------------------------------------------------------------------------------------


@rules
def test_a_bfloat16_module_stays_one(make):
    pytest.importorskip("optax")
    from jaxopt_rules.interop.optax import to_optax

    rule, model = make(), Net(dtype=jnp.bfloat16)
    grads = gradient(model)
    assert {str(x.dtype) for x in arrays(eqx.filter(grads, eqx.is_inexact_array))} == {"bfloat16"}
    state = rule.init(model)
    tx = to_optax(rule)
    theirs, of_tx = model, tx.init(model)
    ours, updated, optimizer = model, model, jr.Optimizer(rule)
    for _ in range(2):
        ours, state = quick_filter_jit(rule.apply)(grads, state, ours)
        updated = optimizer.update(updated, grads)
        updates, of_tx = quick_filter_jit(tx.update)(grads, of_tx, theirs)
        theirs = eqx.apply_updates(theirs, updates)
    assert {str(x.dtype) for x in arrays(eqx.filter(ours, eqx.is_inexact_array))} == {"bfloat16"}
    assert not eqx.tree_equal(ours, model)
    roundings(updated, ours)
    roundings(theirs, ours)


# ---------------------------------------------------------------------------------------------------------------------
# What Equinox offers for trees
# ---------------------------------------------------------------------------------------------------------------------


@rules
def test_the_arrays_alone_have_the_state_of_the_whole(make):
    """`eqx.partition` and `eqx.combine`, in a scan, which takes no functions."""
    rule, model = make(), Net()
    params, static = eqx.partition(model, eqx.is_inexact_array)
    assert leaf_names(rule.init(params)) == leaf_names(rule.init(model))

    def body(carry, _):
        params, state = carry
        grads = jax.grad(lambda params: loss_fn(eqx.combine(params, static)))(params)
        return rule.apply(grads, state, params), None

    (params, _), _ = quick_jit(partial(jax.lax.scan, body, length=2))((params, rule.init(params)))
    raw, state = model, rule.init(model)
    step = quick_filter_jit(lambda model, state: rule.apply(eqx.filter_grad(loss_fn)(model), state, model))
    for _ in range(2):
        raw, state = step(raw, state)
    roundings(eqx.combine(params, static), raw)


def is_key(x: Any) -> bool:
    return eqx.is_array(x) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def written(file: Any, x: Any) -> None:
    """Equinox writes no typed keys of itself."""
    eqx.default_serialise_filter_spec(file, jax.random.key_data(x) if is_key(x) else x)


def read(file: Any, like: Any) -> Any:
    if is_key(like):
        return jax.random.wrap_key_data(eqx.default_deserialise_filter_spec(file, jax.random.key_data(like)))
    return eqx.default_deserialise_filter_spec(file, like)


@rules
def test_a_state_is_born_abstract_and_read_from_a_file(make, tmp_path):
    rule, model = make(), Net()
    _, state = rule.apply(gradient(model), rule.init(model), model)
    eqx.tree_serialise_leaves(tmp_path / "state.eqx", (model, state), filter_spec=written)
    abstract = eqx.filter_eval_shape(lambda: (Net(), rule.init(Net())))
    assert jax.tree.structure(abstract[1]) == jax.tree.structure(state)
    # On an abstract module, a state is allocated: zeros, and the hyperparameters.
    chex.assert_trees_all_equal_shapes_and_dtypes(rule.init(abstract[0]), state)
    loaded = eqx.tree_deserialise_leaves(tmp_path / "state.eqx", (Net(5), rule.init(Net(5))), filter_spec=read)
    roundings(loaded[1], state, 0)
    assert eqx.tree_equal(loaded[0].first, model.first)


@rules
def test_what_a_filter_spec_freezes_stays_and_has_no_part(make):
    """Frozen by `filter_spec`, so that gradients are None there; what is left trains as if it were alone."""
    rule, model = make(), Net()

    def frozen(net):
        return net.first.bias, net.scale

    spec = eqx.tree_at(frozen, jax.tree.map(eqx.is_inexact_array, model), (False, False))
    trained, rest = eqx.partition(model, spec)
    grads = quick_filter_jit(eqx.filter_grad(lambda trained: loss_fn(eqx.combine(trained, rest))))(trained)
    assert grads.first.bias is None
    step = quick_filter_jit(rule.apply)
    new, state = step(grads, rule.init(model), model)
    part, _ = step(grads, rule.init(trained), trained)
    assert eqx.tree_equal(frozen(new), frozen(model))
    roundings(new, eqx.combine(part, rest))
    # A state of the trained part alone goes with the gradients of that part.
    assert set(leaf_names(rule.init(trained))) <= set(leaf_names(state))


@rules
def test_an_ensemble_has_a_state_for_each_member(make):
    rule = make()
    models = [Net(seed) for seed in range(3)]
    params = [eqx.filter(model, eqx.is_inexact_array) for model in models]
    static = eqx.filter(models[0], eqx.is_inexact_array, inverse=True)
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *params)
    grad = eqx.filter_grad(lambda p: loss_fn(eqx.combine(p, static)))
    state = eqx.filter_vmap(rule.init)(stacked)
    new, state = quick_filter_jit(eqx.filter_vmap(lambda p, s: rule.apply(grad(p), s, p)))(stacked, state)
    alone = quick_filter_jit(lambda p, s: rule.apply(grad(p), s, p))
    born = rule.init(params[0])
    for k, p in enumerate(params):
        # Of a rule that keeps a random key every member has the same, as `rule.init` makes it.
        expected = alone(p, rule.init(p))
        roundings(jax.tree.map(lambda x, k=k: x[k], (new, state)), expected)
    assert jax.tree.structure(state) == jax.tree.structure(born)


def test_members_of_an_ensemble_have_learning_rates_of_their_own():
    rule, models = (
        jr.sgd(0.1),
        eqx.filter_vmap(lambda key: eqx.nn.Linear(3, 1, key=key))(jax.random.split(jax.random.key(0), 3)),
    )
    rates = jnp.array([0.0, 0.1, 0.2])
    state = set_hyperparams(eqx.filter_vmap(rule.init)(models), learning_rate=rates)
    grads = jax.tree.map(jnp.ones_like, models)
    new, _ = eqx.filter_vmap(rule.apply)(grads, state, models)
    np.testing.assert_allclose((models.bias - new.bias)[:, 0], rates, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Layers with a state, tied weights
# ---------------------------------------------------------------------------------------------------------------------


class Normed(eqx.Module):
    linear: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    head: eqx.nn.Linear

    def __init__(self) -> None:
        keys = jax.random.split(jax.random.key(0), 2)
        self.linear, self.head = eqx.nn.Linear(3, 2, key=keys[0]), eqx.nn.Linear(2, 1, key=keys[1])
        self.norm = eqx.nn.BatchNorm(2, "batch", mode="batch")

    def __call__(self, x, statistics):
        x, statistics = self.norm(self.linear(x), statistics)
        return self.head(x), statistics


@rules
def test_a_module_with_batch_statistics(make):
    """Its statistics live in an `eqx.nn.State`, which no optimizer sees; a StateIndex in the module has no slots."""
    rule = make()
    model, statistics = eqx.nn.make_with_state(Normed)()
    born = model

    def loss(model, statistics):
        y, statistics = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(X, statistics)
        return jnp.mean((y - Y) ** 2), statistics

    @partial(quick_filter_jit, donate="all")
    def step(model, statistics, state):
        (value, statistics), grads = eqx.filter_value_and_grad(loss, has_aux=True)(model, statistics)
        model, state = rule.apply(grads, state, model)
        return value, model, statistics, state

    state = rule.init(model)
    per_parameter = {name.split(".")[-1] for name in leaf_names(state) if "/" in name}
    assert per_parameter <= set(paths(eqx.filter(model, eqx.is_inexact_array)))
    model, losses = copied(model), []
    for _ in range(4):
        value, model, statistics, state = step(model, statistics, state)
        losses.append(float(value))
    assert jax.tree.structure(model) == jax.tree.structure(born)
    assert not np.array_equal(model.norm.weight, born.norm.weight)


class Tied(eqx.Module):
    shared: eqx.nn.Shared

    def __init__(self) -> None:
        keys = jax.random.split(jax.random.key(0), 2)
        first, last = eqx.nn.Linear(3, 3, key=keys[0]), eqx.nn.Linear(3, 3, key=keys[1])
        self.shared = eqx.nn.Shared((first, last), lambda both: both[1].weight, lambda both: both[0].weight)

    def __call__(self, x):
        first, last = self.shared()
        return last(jnp.tanh(first(x))).sum(keepdims=True)


def test_tied_weights_are_one_parameter():
    model, rule = Tied(), jr.adamw(0.1)
    state = rule.init(model)
    assert len([name for name in leaf_names(state) if ".m." in name]) == 3
    grads = gradient(model)
    new, _ = rule.apply(grads, state, model)
    first, last = new.shared()
    assert first.weight is last.weight
    assert not np.array_equal(first.weight, model.shared()[0].weight)
    roundings(jr.Optimizer(rule).update(model, grads), new)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer.update(model, grads)
# ---------------------------------------------------------------------------------------------------------------------


def test_optimizer_returns_the_new_module_and_leaves_the_old():
    model = Net()
    before = copied(model)
    opt = jr.Optimizer(jr.adamw(0.1))
    new = opt.update(model, gradient(model))
    assert type(new) is Net
    assert eqx.tree_equal(model.first, before.first)
    assert (new.activation, new.name, new.rate) == (model.activation, "net", 0.5)
    assert new.calls is model.calls
    assert not np.array_equal(new.first.weight, model.first.weight)


def test_optimizer_donates_the_parameters_of_a_module():
    model = copied(Net())
    new = jr.Optimizer(jr.adamw(0.1), donate=True).update(model, gradient(model))
    assert model.first.weight.is_deleted()
    assert not model.calls.is_deleted()
    roundings(new, jr.Optimizer(jr.adamw(0.1)).update(Net(), gradient(Net())))


def test_optimizer_takes_layers_without_gradients():
    model, opt = Net(), jr.Optimizer(jr.adamw(0.1))
    grads = eqx.tree_at(lambda net: net.first, gradient(model), None)
    new = opt.update(model, grads)
    assert new.first is model.first or eqx.tree_equal(new.first, model.first)
    assert not np.array_equal(new.second.weight, model.second.weight)
    assert not [name for name in opt.state_dict(new) if "first" in name]
    again = opt.update(new, gradient(new))
    assert not np.array_equal(again.first.weight, model.first.weight)
    saved = opt.state_dict(again)
    other = jr.Optimizer(jr.adamw(0.1))
    other.load_state_dict(Net(), saved)
    chex.assert_trees_all_equal(other.state_dict(again), saved)


def without_bias(net: Net) -> Net:
    return eqx.tree_at(lambda net: net.first, net, eqx.nn.Linear(3, 2, use_bias=False, key=jax.random.key(0)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: eqx.tree_at(lambda n: n.first.weight, net, jnp.ones((2, 4))), "'first/weight' has shape"),
        (lambda net: {"first": net.first}, "it has besides 'activation', 'calls'"),
        (lambda net: eqx.tree_at(lambda n: n.second, net, eqx.nn.Identity()), "second/weight"),
    ],
    ids=["shape", "containers", "structure"],
)
def test_gradients_of_another_model_are_refused_by_path(change, message):
    model = Net()
    grads = gradient(model)
    opt = jr.Optimizer(jr.adamw(0.1))
    with pytest.raises(ValueError, match=message):
        opt.update(model, change(grads))
    with pytest.raises(ValueError, match=message):
        jr.adamw(0.1).apply(change(grads), jr.adamw(0.1).init(model), model)
    assert not np.array_equal(opt.update(model, grads).first.weight, model.first.weight)


def test_another_module_is_refused():
    model, opt = Net(), jr.Optimizer(jr.adamw(0.1))
    opt.update(model, gradient(model))
    other = eqx.tree_at(lambda n: n.activation, model, jax.nn.relu)
    assert opt.update(other, gradient(other)).activation is jax.nn.relu
    with pytest.raises(ValueError, match="the model must be a tree like the one that this optimizer updated before"):
        opt.update(without_bias(model), gradient(without_bias(model)))


@cache
def mesh() -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()[:2]), ("x",))


@rules
def test_a_module_on_a_mesh_by_filter_shard(make):
    rule = make()
    everywhere = jax.sharding.NamedSharding(mesh(), jax.sharding.PartitionSpec())
    model = eqx.filter_shard(eqx.filter(Net(), eqx.is_inexact_array), everywhere)
    state = rule.init(model)
    assert all(x.sharding.is_equivalent_to(everywhere, x.ndim) for x in jax.tree.leaves(state))
    step = partial(quick_filter_jit, donate="all")(chex.assert_max_traces(lambda m, s: rule.apply(m, s, m), n=1))
    for _ in range(2):
        model, state = step(model, state)
    assert all(x.sharding.is_equivalent_to(everywhere, x.ndim) for x in jax.tree.leaves((model, state)))
