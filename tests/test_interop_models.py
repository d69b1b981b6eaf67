"""What models are made of in JAX besides modules: dicts, dataclasses, NamedTuples, nodes of one's own, Linen, Haiku.

Every rule meets every one of them: a rule on a tree is, operation for operation, the rule on the flat dict
`{path: array}` of the same arrays. What runs is then compared for a few rules on each of them.
"""

import collections
import dataclasses
import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit, stepped
from table import ROWS, Row

import jaxopt_rules as jr
from jaxopt_rules.numerics import is_inexact
from jaxopt_rules.state import leaf_names, load_state_dict, reset, state_dict
from jaxopt_rules.trees import flatten, paths

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
Y = np.sin(X @ np.ones((3, 1), np.float32))


# ---------------------------------------------------------------------------------------------------------------------
# The models
# ---------------------------------------------------------------------------------------------------------------------


def arrays() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of a perceptron with one hidden layer."""
    rng = np.random.default_rng(1)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(3, 2), (2,), (2, 1)])


def perceptron(w: jax.Array, b: jax.Array, v: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w + b) @ v


class Model(NamedTuple):
    """One kind of model: its parameters, and what it computes."""

    params: Any
    forward: Callable[[Any, jax.Array], jax.Array]
    paths: list[str]

    def loss(self, params: Any) -> jax.Array:
        return jnp.mean((self.forward(params, X) - Y) ** 2)


def nested() -> Model:
    w, b, v = arrays()
    params = {"layers": [{"w": w, "b": b}, (v,)]}

    def forward(p, x):
        return perceptron(p["layers"][0]["w"], p["layers"][0]["b"], p["layers"][1][0], x)

    return Model(params, forward, ["layers/0/b", "layers/0/w", "layers/1/0"])


def with_nothing_inside() -> Model:
    """Containers without leaves, absent leaves, and leaves that are no parameters."""
    w, b, v = arrays()
    params = {"a": {}, "b": b, "c": [], "d": ((), [None]), "n": jnp.arange(3), "v": v, "w": w}

    def forward(p, x):
        return perceptron(p["w"], p["b"], p["v"], x)

    return Model(params, forward, ["b", "d/1/0", "n", "v", "w"])


def one_array() -> Model:
    return Model(jnp.ones((3, 1)), lambda p, x: x @ p, [""])


class Pair(NamedTuple):
    weight: Any
    bias: Any


def named_tuple() -> Model:
    w, b, v = arrays()

    def forward(p, x):
        return perceptron(*p[0], p[1].weight, x)

    return Model((Pair(w, b), Pair(v, None)), forward, ["0/weight", "0/bias", "1/weight", "1/bias"])


@partial(jax.tree_util.register_dataclass, data_fields=["w", "b", "v"], meta_fields=["activation"])
@dataclasses.dataclass
class Registered:
    w: Any
    b: Any
    v: Any
    activation: str = "tanh"

    def __call__(self, x: jax.Array) -> jax.Array:
        return getattr(jnp, self.activation)(x @ self.w + self.b) @ self.v


def registered_dataclass() -> Model:
    return Model(Registered(*arrays()), lambda p, x: p(x), ["w", "b", "v"])


@chex.dataclass(frozen=True)
class OfChex:
    w: Any
    b: Any
    v: Any


def chex_dataclass() -> Model:
    w, b, v = arrays()
    return Model(OfChex(w=w, b=b, v=v), lambda p, x: perceptron(p.w, p.b, p.v, x), ["b", "v", "w"])


@jax.tree_util.register_pytree_with_keys_class
class Keyed:
    """A node that says what its parts are called."""

    def __init__(self, name: str, **parts: Any) -> None:
        self.name, self.parts = name, parts

    def tree_flatten_with_keys(self) -> Any:
        keys = map(jax.tree_util.GetAttrKey, self.parts)
        return tuple(zip(keys, self.parts.values(), strict=True)), (self.name, *self.parts)

    @classmethod
    def tree_unflatten(cls, aux: Any, parts: Any) -> "Keyed":
        return cls(aux[0], **dict(zip(aux[1:], parts, strict=True)))


def node_with_keys() -> Model:
    w, b, v = arrays()

    def forward(p, x):
        return perceptron(p.parts["w"], p.parts["b"], p.parts["head"].parts["w"], x)

    return Model(Keyed("net", w=w, b=b, head=Keyed("head", w=v)), forward, ["w", "b", "head/w"])


@jax.tree_util.register_pytree_node_class
class Keyless:
    """A node that says nothing of its parts: their paths are positions."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def tree_flatten(self) -> Any:
        return self.parts, None

    @classmethod
    def tree_unflatten(cls, _: None, parts: Any) -> "Keyless":
        return cls(*parts)


def node_without_keys() -> Model:
    w, b, v = arrays()

    def forward(p, x):
        return perceptron(p.parts[0], p.parts[1]["b"], p.parts[2].parts[0], x)

    return Model(Keyless(w, {"b": b}, Keyless(v)), forward, ["0", "1/b", "2/0"])


def flax_struct() -> Model:
    struct = pytest.importorskip("flax.struct")
    of_flax = struct_class(struct)
    return Model(of_flax(*arrays()), lambda p, x: perceptron(p.w, p.b, p.v, x), ["w", "b", "v"])


@cache
def struct_class(struct: Any) -> Any:
    @struct.dataclass
    class OfFlax:
        w: Any
        b: Any
        v: Any
        name: str = struct.field(pytree_node=False, default="net")

    return OfFlax


def linen() -> Model:
    module, variables = linen_module()
    statistics = {"batch_stats": variables["batch_stats"]}

    def forward(p, x):
        return module.apply({"params": p, **statistics}, x, train=True, mutable=["batch_stats"])[0]

    names = [f"{x}/{y}" for x, y in [("Dense_0", "bias"), ("Dense_0", "kernel"), ("Dense_1", "kernel")]]
    return Model(variables["params"], forward, ["BatchNorm_0/bias", "BatchNorm_0/scale", *names])


def linen_frozen() -> Model:
    plain = linen()
    return plain._replace(params=pytest.importorskip("flax.core").freeze(plain.params))


@cache
def linen_module() -> Any:
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any, train: bool) -> Any:
            x = nn.tanh(nn.BatchNorm(use_running_average=not train)(nn.Dense(2)(x)))
            return nn.Dense(1, use_bias=False)(x)

    return Net(), Net().init(jax.random.key(0), X, train=True)


def haiku() -> Model:
    hk = pytest.importorskip("haiku")
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([2, 1], activation=jnp.tanh)(x)))
    names = [f"mlp/~/linear_{i}/{name}" for i in (0, 1) for name in "bw"]
    return Model(net.init(jax.random.key(0), X), net.apply, names)


OF_JAX = [
    nested,
    with_nothing_inside,
    one_array,
    named_tuple,
    registered_dataclass,
    node_with_keys,
    node_without_keys,
]
OF_LIBRARIES = [chex_dataclass, flax_struct, linen, linen_frozen, haiku]
models = pytest.mark.parametrize("make", OF_JAX + OF_LIBRARIES, ids=lambda make: make.__name__)


# ---------------------------------------------------------------------------------------------------------------------
# Every rule on every one
# ---------------------------------------------------------------------------------------------------------------------

rows = pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=row.name, marks=[pytest.mark.thorough][: not row.laws or row.thorough]) for row in ROWS],
)
composites = pytest.mark.parametrize(
    "parts",
    [
        pytest.param(OF_JAX, id="jax"),
        pytest.param([one_array, *OF_LIBRARIES], id="libraries"),
    ],
)


def composite(parts: list[Callable[[], Model]]) -> Any:
    """One tree that has all of these models as its parts."""
    return {make.__name__: make().params for make in parts}


def as_flat(tree: Any) -> dict[str, Any]:
    """`{path: leaf}`, in the same order, which that of a plain dict, by name, need not be."""
    return collections.OrderedDict(zip(paths(tree), flatten(tree)[0], strict=True))


@cache
def gradient_of(make: Callable[[], Model]) -> Callable[[Any], tuple[jax.Array, Any]]:
    """params -> (loss, gradients), where what is no array of floating-point numbers has none."""
    model = make()
    leaves, treedef = flatten(model.params)
    inexact = [k for k, x in enumerate(leaves) if is_inexact(x)]

    def filled(values: Any, others: list[Any]) -> Any:
        whole = dict(enumerate(others)) | dict(zip(inexact, values, strict=True))
        return jax.tree.unflatten(treedef, whole.values())

    value_and_grad = quick_jit(jax.value_and_grad(lambda values: model.loss(filled(values, leaves))))

    def evaluated(params: Any) -> tuple[jax.Array, Any]:
        loss, grads = value_and_grad([flatten(params)[0][k] for k in inexact])
        return loss, filled(grads, [None] * len(leaves))

    return evaluated


def terminal(row: Row) -> jr.Rule:
    """The rule of a row, behind which there are updates."""
    return row.make() if row.rate is not None else jr.chain(row.make(), jr.step(0.1))


class Program(NamedTuple):
    """What a rule does in three steps on a tree."""

    text: str
    fixed: bool  # whether parameters and state came out built as they went in


def traced(row: Row, tree: Any) -> Program:
    """`init`, two steps by `apply`, and one by the pair; in the second, the first leaf has no gradient."""
    rule = terminal(row)
    leaves, treedef = flatten(tree)
    inexact = [k for k, x in enumerate(leaves) if is_inexact(x)]
    fixed = []

    def filled(values: Any, others: Any) -> Any:
        whole = list(others)
        for k, x in zip(inexact, values, strict=True):
            whole[k] = x
        return jax.tree.unflatten(treedef, whole)

    def program(ps: Any, gs: Any) -> Any:
        params, grads = filled(ps, leaves), filled(gs, [None] * len(leaves))
        partial_grads = filled([None, *gs[1:]], [None] * len(leaves))
        born = state = rule.init(params)
        start = params
        for g in (grads, partial_grads):
            params, state = rule.apply(g, state, params, **row.extra)
        updates, state = rule.update(grads, state, params, **row.extra)
        params = jr.apply_updates(params, updates)
        fixed.append(jax.tree.structure((params, state)) == jax.tree.structure((start, born)))
        return [x for x in jax.tree.leaves((params, updates, state)) if isinstance(x, jax.Array)]

    values = [leaves[k] for k in inexact]
    text = str(jax.make_jaxpr(program)(values, values))
    return Program(re.sub("0x[0-9a-f]+", "", text), all(fixed))


@rows
@composites
def test_a_rule_is_on_every_tree_what_it_is_on_a_flat_dict(row, parts):
    tree = composite(parts)
    on_tree, on_flat = traced(row, tree), traced(row, as_flat(tree))
    assert on_tree.fixed
    assert on_tree.text == on_flat.text


@rows
@composites
def test_what_tells_about_a_rule_names_leaves_by_path(row, parts):
    tree, rule = composite(parts), terminal(row)
    flat = as_flat(tree)
    state, of_flat = rule.init(tree), rule.init(flat)
    assert leaf_names(state) == leaf_names(of_flat)
    assert jr.explain(rule, tree).rows == jr.explain(rule, flat).rows
    assert jr.hyperparams(state) == jr.hyperparams(of_flat)
    saved = {name: x if ".hyper." in name else np.ones_like(x) for name, x in state_dict(of_flat).items()}
    loaded, _ = load_state_dict(state, saved)
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    chex.assert_trees_all_equal(state_dict(loaded), saved)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def is_matrix(path: str, x: Any) -> bool:
    return x.ndim == 2


RULES = {
    "adamw": lambda: jr.chain(jr.clip_by_global_norm(1.0), jr.adamw(0.05, where=is_matrix)),
    "groups": lambda: jr.partition({"matrix": jr.muon(0.05), "rest": jr.adafactor(0.05)}, lambda _, x: GROUPS[x.ndim]),
    "nested": lambda: jr.skip_nonfinite(jr.average(jr.freeze(jr.sgd(0.1, 0.9), lambda _, x: x.ndim == 1), 0.5)),
}
GROUPS = {1: "rest", 2: "matrix"}


@models
def test_paths_of_a_model(make):
    model = make()
    assert sorted(paths(model.params)) == sorted(model.paths)


@models
@pytest.mark.parametrize("name", RULES)
def test_three_ways_to_train_a_model(make, name):
    """`apply` on the model, `Optimizer` on the model, and `apply` on the flat dict, along the same gradients.

    A bias in front of a normalization has gradients of the size of roundings, which Adafactor makes large.
    """
    rule, model = RULES[name](), make()
    value_and_grad = gradient_of(make)
    params, state = model.params, rule.init(model.params)
    flat, of_flat = as_flat(params), rule.init(as_flat(params))
    updated, optimizer = params, jr.Optimizer(rule)
    losses = []
    for _ in range(3):
        loss, grads = value_and_grad(params)
        losses.append(float(loss))
        updated = optimizer.update(updated, grads)
        flat, of_flat = stepped(rule, flat, of_flat, as_flat(grads))
        params, state = stepped(rule, params, state, grads)
    np.testing.assert_allclose(value_and_grad(updated)[0], value_and_grad(params)[0], rtol=1e-4)
    assert losses[-1] < losses[0]
    assert jax.tree.structure(params) == jax.tree.structure(updated) == jax.tree.structure(model.params)
    close = partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-5)
    close(as_flat(params), flat)
    close(as_flat(updated), flat)
    # Names of an optimizer's state are those of its rule's, which is one part of it.
    close({name.removeprefix("rule."): x for name, x in optimizer.state_dict(updated).items()}, state_dict(state))
    chex.assert_trees_all_equal(load_state_dict(rule.init(params), state_dict(state))[0], state)
    close(as_flat(jr.eval_params(state, params)), as_flat(optimizer.eval_params(updated)))
    chex.assert_trees_all_equal(reset(rule, state, params), rule.init(params))


# ---------------------------------------------------------------------------------------------------------------------
# Nodes that refuse what is no array
# ---------------------------------------------------------------------------------------------------------------------


@partial(jax.tree_util.register_dataclass, data_fields=["w", "b"], meta_fields=[])
@dataclasses.dataclass
class Strict:
    """Looks at its parts whenever it is built, which JAX advises against: it builds nodes of placeholders itself."""

    w: Any
    b: Any

    def __post_init__(self) -> None:
        if self.w.shape[-1:] != self.b.shape:
            raise ValueError("the shapes do not fit")


@pytest.mark.parametrize("rule", [jr.sgd(0.1, 0.9), jr.adamw(), jr.adan(0.1)], ids=repr)
def test_what_only_holds_arrays_works_where_slots_are_like_the_parameters(rule):
    """Absent leaves, and slots of another shape, cannot be in such a node: it takes no `partition` or `adafactor`."""
    params = Strict(jnp.ones((3, 2)), jnp.ones(2))
    params, state = rule.apply(params, rule.init(params), params)
    loaded, _ = load_state_dict(rule.init(params), state_dict(state))
    chex.assert_trees_all_equal(loaded, state)
    assert {row.leaf for row in jr.explain(rule, params).rows} == {"w", "b"}
    new = jr.Optimizer(rule).update(params, params)
    assert isinstance(new, Strict)
    chex.assert_trees_all_equal_shapes(jr.eval_params(state, new), params)


@pytest.mark.parametrize(
    "other", [jr.adamw(), jr.adafactor(0.1), jr.average(jr.adamw()), jr.schedule_free(jr.sgd(0.1))], ids=repr
)
def test_a_group_may_have_nothing_of_one_array(other):
    """Its gradients and its parameters are None then, which is not to be taken for parameters that were not given."""
    rule = jr.partition({"matrix": jr.sgd(0.1), "rest": other}, lambda _, x: GROUPS[x.ndim])
    p = jnp.ones((3, 2))
    new, state = rule.apply(p, rule.init(p), p)
    updates, _ = rule.update(p, state, new)
    np.testing.assert_allclose(new, 0.9, rtol=1e-6)
    np.testing.assert_allclose(updates, -0.1, rtol=1e-6)
