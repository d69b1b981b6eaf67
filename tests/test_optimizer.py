"""The mutating layer beyond the golden numbers: fields, hooks, state, pytrees, donation, errors."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import Bag
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxopt_rules as jr
from jaxopt_rules import stateful

RNG = np.random.default_rng(0)


def model(**shapes):
    return Bag({name: jr.Parameter(jnp.asarray(RNG.normal(size=shape), jnp.float32)) for name, shape in shapes.items()})


def fill(*models):
    for one in models:
        for parameter in one.params().values():
            parameter.grad = jnp.asarray(RNG.normal(size=parameter.data.shape), parameter.data.dtype)


def values(one):
    return {name: np.array(parameter.data) for name, parameter in one.params().items()}


def gradients(one):
    return {name: None if p.grad is None else np.array(p.grad) for name, p in one.params().items()}


class Traced:
    """A rule that counts how often it is traced."""

    def __init__(self, rule):
        self.count = 0

        def update(grads, state, params=None):
            self.count += 1
            return rule.update(grads, state, params)

        self.rule = jr.Rule(rule.init, update)


# Parameters


def test_parameter_takes_lists_and_strips_weak_types():
    assert jr.Parameter([1.0, 2.0]).data.dtype == jnp.float32
    assert not jr.Parameter(1.0).data.weak_type
    assert not jr.Parameter(jnp.full(2, 1.0)).data.weak_type
    array = jnp.ones(2, jnp.bfloat16)
    assert jr.Parameter(array).data is array
    assert repr(jr.Parameter(1.0)) == "Parameter(Array(1., dtype=float32), grad=None)"


def test_params_lists_those_with_a_gradient_and_hooks_persist():
    one = model(a=(2,), b=(2,))
    one.params()["a"].grad = jnp.array([3.0, 4.0])
    a = one.params()["a"]
    seen = []
    listed = jr.params(one, hook=[jr.clip_grad(1.0), seen.extend])
    assert listed == [a] == seen
    np.testing.assert_allclose(a.grad, [0.6, 0.8], rtol=1e-6)
    jr.cleargrads(one)
    assert jr.params(one, hook=[jr.clip_grad(1.0)]) == []
    with pytest.raises(TypeError, match=r"momentum_direction\(\) needs a state; give it to an Optimizer"):
        jr.params(one, hook=[jr.momentum_direction()])


def test_models_are_checked():
    with pytest.raises(TypeError, match=r"dict has no params.*pass the gradients too"):
        jr.SGD(0.1).update({"w": jnp.ones(2)})
    with pytest.raises(TypeError, match="must give Parameters, but 'w' is a"):
        jr.SGD(0.1).update(Bag({"w": jnp.ones(2)}))


def test_a_parameter_under_two_names_is_stepped_once():
    shared = jr.Parameter([1.0], [1.0])
    jr.SGD(0.1, hook=[jr.clip_grad(10.0)]).update(Bag({"a": shared, "b": shared}))
    np.testing.assert_allclose(shared.data, 0.9)


@pytest.mark.parametrize("hook", [[], [jr.clip_grad(1.0)], [jr.clip_grad(1.0), lambda listed: None]])
def test_integer_parameters_pass_through(hook):
    one = Bag({"n": jr.Parameter(jnp.arange(3), jnp.arange(3)), "w": jr.Parameter([1.0], [1.0])})
    jr.Adam(0.1, hook=hook).update(one)
    np.testing.assert_array_equal(one.params()["n"].data, [0, 1, 2])
    assert one.params()["w"].data[0] < 1


# Fields


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (lambda: jr.SGD(0.1), {"learning_rate": 0.1}),
        (lambda: jr.Momentum(0.1), {"learning_rate": 0.1, "momentum": 0.9}),
        (lambda: jr.Adam(), {"alpha": 0.001, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}),
        (lambda: jr.AdamW(jr.Adam(0.1, 0.8, 0.99)), {"alpha": 0.1, "beta1": 0.8, "beta2": 0.99, "weight_decay": 0.01}),
        (lambda: jr.AdamW(alpha=0.1, weight_decay=0.3), {"alpha": 0.1, "beta2": 0.999, "weight_decay": 0.3}),
        (lambda: jr.Optimizer(jr.adamw(3e-4, b2=0.9999)), {"learning_rate": 3e-4, "b2": 0.9999, "weight_decay": 0.01}),
    ],
)
def test_fields_read_as_they_were_written(make, fields):
    opt = make()
    assert {name: getattr(opt, name) for name in fields} == fields
    for name in fields:
        setattr(opt, name, 0.5)
        assert getattr(opt, name) == 0.5


def test_an_assignment_acts_at_the_next_update_without_a_trace():
    traced = Traced(jr.sgd(0.1))
    opt, one = jr.Optimizer(traced.rule), model(w=(2,))
    for rate in (0.1, 0.5, 0.25, 0.1):
        opt.learning_rate = rate
        before = values(one)["w"]
        fill(one)
        opt.update(one)
        np.testing.assert_allclose(values(one)["w"], before - rate * gradients(one)["w"], rtol=1e-6)
    assert traced.count == 1


@pytest.mark.parametrize(
    "make", [lambda: jr.SGD(0.5), lambda: jr.SGD(jr.Constant(0.5)), lambda: jr.Optimizer(jr.sgd(0.5))]
)
def test_schedules_and_numbers_take_turns(make):
    opt, one = make(), Bag({"w": jr.Parameter([0.0], [1.0])})
    moved = []

    def step(n=1):
        for _ in range(n):
            before = values(one)["w"]
            opt.update(one)
            moved.append(float(before[0] - values(one)["w"][0]))

    step()
    opt.learning_rate = schedule = jr.Linear(0.4, 4)
    assert opt.learning_rate is schedule
    step(2)
    np.testing.assert_allclose(opt.hyperparams["learning_rate"], 0.2, rtol=1e-6)
    opt.learning_rate = 1
    step()
    opt.learning_rate = jr.Constant(0.125)
    step()
    # The schedule sees the finished updates of this optimizer, one at first.
    np.testing.assert_allclose(moved, [0.5, 0.3, 0.2, 1.0, 0.125], rtol=1e-5)


def test_schedules_and_numbers_that_come_back_are_not_traced_again():
    traced = Traced(jr.sgd(0.1))
    opt, one = jr.Optimizer(traced.rule), Bag({"w": jr.Parameter([0.0], [1.0])})
    for rate in 2 * (0.1, jr.Linear(0.4, 4), 0.2, jr.Constant(0.125), jr.Linear(0.4, 4)):
        opt.learning_rate = rate
        opt.update(one)
    assert traced.count == 3


def test_adamw_takes_the_schedule_of_an_adam_over():
    schedule = jr.Linear(0.4, 4)
    source = jr.Adam(alpha=schedule)
    assert source.alpha is schedule
    opt, one = jr.AdamW(source, weight_decay=0.0), Bag({"w": jr.Parameter([0.0], [1.0])})
    assert opt.alpha is schedule
    for expected in (0.4, 0.3):
        opt.update(one)
        np.testing.assert_allclose(opt.hyperparams["learning_rate"], expected, rtol=1e-6)


@pytest.mark.parametrize("value", [0.1, jr.Constant(0.1)])
def test_a_replaced_schedule_does_not_come_back_with_newcomers_or_checkpoints(value):
    opt, one = jr.SGD(jr.Constant(0.5)), Bag({"a": jr.Parameter([0.0], [1.0]), "b": jr.Parameter([0.0])})
    opt.learning_rate = value
    opt.update(one)
    one.params()["b"].grad = jnp.ones(1)
    opt.update(one)
    saved = opt.state_dict(one)
    opt.load_state_dict(one, saved)
    opt.update(one)
    np.testing.assert_allclose(one.params()["a"].data, -0.3, rtol=1e-6)
    np.testing.assert_allclose(one.params()["b"].data, -0.2, rtol=1e-6)
    fresh = jr.SGD(jr.Constant(0.5))
    fresh.load_state_dict(one, saved)
    fresh.update(one)
    np.testing.assert_allclose(one.params()["a"].data, -0.8, rtol=1e-6)


def test_a_schedule_is_tried_when_it_is_assigned():
    opt = jr.SGD(0.1)
    for schedule, error in ((lambda count: count.missing, AttributeError), (lambda count: jnp.ones(2), ValueError)):
        with pytest.raises(error):
            opt.learning_rate = schedule
        assert opt.learning_rate == 0.1


def test_an_assignment_compiles_nothing():
    opt, one = jr.Adam(0.1), model(w=(2,))
    fill(one)
    opt.update(one)
    fill(one)
    size = stateful._shared_program.cache_info().misses
    for value in (0.2, 0.3):
        opt.alpha = value
        opt.update(one)
    opt.load_state_dict(one, opt.state_dict(one))
    opt.update(one)
    assert stateful._shared_program.cache_info().misses == size


def test_a_function_that_every_rule_ignores_compiles_nothing():
    opt, one = jr.Adam(0.1), model(w=(2,))
    fill(one)
    opt.update(one, value_fn=lambda x: x)
    size = stateful._shared_program.cache_info().misses
    opt.update(one, value_fn=lambda x: x)
    assert stateful._shared_program.cache_info().misses == size


def test_complements_read_back_in_decimals():
    assert jr.Adam(beta1=0.1, beta2=0.99999).beta1 == 0.1
    assert "alpha" in dir(jr.Adam())
    source = jr.Adam()
    source.eps = 1e-4
    assert jr.AdamW(source).eps == 1e-4


def test_a_copy_goes_on_by_itself():
    opt, one = jr.Adam(0.1), model(w=(2,))
    fill(one)
    opt.update(one)
    other = copy.copy(opt)
    other.alpha = 0.5
    assert opt.alpha == 0.1
    other.update(one)
    opt.update(one)
    assert opt.state_dict(one)["rule.adam.count"] == other.state_dict(one)["rule.adam.count"] == 2


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("alpha", -1.0, ValueError, "learning_rate must be at least 0"),
        ("beta1", 1.0, ValueError, r"b1 must lie in \[0, 1\)"),
        ("alpha", "1", TypeError, "must be a number or a schedule"),
        ("lr", 0.1, AttributeError, "Adam has no field 'lr'; its fields are .*alpha"),
        ("metrics", 0.1, AttributeError, "metrics"),
    ],
)
def test_bad_assignments(name, value, error, message):
    opt = jr.Adam()
    with pytest.raises(error, match=message):
        setattr(opt, name, value)
    assert opt.alpha == 0.001
    with pytest.raises(AttributeError, match="Adam has no attribute 'lr'"):
        _ = opt.lr


def test_repr():
    assert repr(jr.SGD(0.1)) == "SGD(learning_rate=0.1)"
    assert repr(jr.Optimizer(jr.adamw(0.1))) == "Optimizer(adamw(0.1))"
    text = repr(jr.Adam(0.1, hook=[jr.clip_grad(1.0)]))
    assert "alpha=0.1, " in text
    assert "hook=[clip_by_global_norm(1.0)]" in text


def test_metrics_and_hyperparams_are_numbers():
    opt, one = (
        jr.AdamW(alpha=0.1, hook=[jr.clip_grad(1.0), jr.weight_decay(0.5)]),
        Bag({"w": jr.Parameter([1.0], [3.0])}),
    )
    opt.update(one)
    assert opt.metrics == {"learning_rate": 0.1, "grad_norm": 3.0}
    assert opt.hyperparams["max_norm"] == 1.0
    assert opt.hyperparams["hook.weight_decay"] == 0.5
    assert opt.hyperparams["weight_decay"] == 0.01


# Hooks


def test_python_hooks_and_rules_run_in_order():
    """The same as rules alone; the hook with a state keeps it from update to update."""
    mixed, fused = model(w=(3,)), model(w=(3,))
    fused.params()["w"].data = mixed.params()["w"].data

    def double(listed):
        for parameter in listed:
            parameter.grad = 2 * parameter.grad

    python = jr.SGD(0.1, hook=[jr.momentum_direction(0.5), double, jr.weight_decay(0.1)])
    rules = jr.SGD(0.1, hook=[jr.momentum_direction(0.5), jr.chain(jr.momentum_direction(0.0)), jr.weight_decay(0.1)])
    for _ in range(3):
        fill(mixed)
        fused.params()["w"].grad = mixed.params()["w"].grad
        python.update(mixed)
        before = values(fused)["w"]
        rules.update(fused)
        # By hand: what the rules alone did not do is the doubling.
        velocity = python._state["hook"][0].v[python._keys[mixed.params()["w"]]]
        np.testing.assert_allclose(gradients(mixed)["w"], 2 * velocity + 0.1 * before, rtol=1e-5)
        fused.params()["w"].data = mixed.params()["w"].data


def test_hooks_run_on_an_empty_list_and_the_counter_advances():
    lengths = []
    opt, one = jr.Adam(hook=[lambda listed: lengths.append(len(listed)), jr.clip_grad(1.0)]), model(w=(2,))
    opt.update(one)
    opt.update(one)
    assert lengths == [0, 0]
    assert opt.state_dict(one)["rule.adam.count"] == 2
    assert not any(name.endswith(".w") for name in opt.state_dict(one))


def test_a_hook_keeps_the_gradients_dtype_and_the_update_uses_the_unrounded_one():
    parameter = jr.Parameter(jnp.zeros(1), jnp.ones(1, jnp.bfloat16))
    jr.SGD(1.0, hook=[jr.clip_grad(1 / 3)]).update(Bag({"w": parameter}))
    assert parameter.grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(parameter.data, -1 / 3, rtol=1e-5)
    assert abs(float(parameter.grad[0]) - 1 / 3) > 1e-4


def test_other_hooks_can_be_assigned():
    opt, one = jr.SGD(1.0, hook=[jr.clip_grad(1.0)]), Bag({"w": jr.Parameter([0.0], [3.0])})
    opt.update(one)
    opt.hook = []
    one.params()["w"].grad = jnp.array([3.0])
    opt.update(one)
    np.testing.assert_allclose(one.params()["w"].data, -4, rtol=1e-5)


def test_a_hook_may_drop_a_gradient_and_replace_a_parameter_of_the_list():
    one, other = model(a=(2,), b=(2,)), jr.Parameter([1.0], [1.0])
    fill(one)
    before = values(one)

    def change(listed):
        listed[0].grad = None
        listed[1] = other

    jr.SGD(0.5, hook=[change, jr.clip_grad(10.0)]).update(one)
    chex.assert_trees_all_equal(values(one), before)
    np.testing.assert_allclose(other.data, 0.5)


def test_a_hook_cannot_be_an_optimizer():
    with pytest.raises(ValueError, match=r"adam\(.* stands behind sgd\(0.1\), which has turned"):
        jr.Adam(hook=[jr.sgd(0.1)])


class Pair(NamedTuple):
    """What Optax calls a gradient transformation."""

    init: Callable
    update: Callable


def test_a_pair_from_elsewhere_is_a_hook():
    double = Pair(lambda params: (), lambda grads, state, params=None: (jax.tree.map(lambda g: 2 * g, grads), state))
    for hook in (double, [double]):
        one = Bag({"w": jr.Parameter([0.0], [1.0])})
        jr.SGD(0.1, hook=hook).update(one)
        np.testing.assert_allclose(one.params()["w"].data, -0.2, rtol=1e-6)
    with pytest.raises(TypeError, match=r"was it meant to be called, as in clip_by_global_norm\(...\)"):
        jr.SGD(0.1, hook=[jr.clip_grad])


class InterruptedOnce(jr.Parameter):
    """Its first new data meet an interrupt."""

    __slots__ = ("armed", "value")

    @property
    def data(self):
        return self.value

    @data.setter
    def data(self, data):
        if getattr(self, "armed", False):
            self.armed = False
            raise KeyboardInterrupt
        self.value = data


@pytest.mark.parametrize("hook", [[], [lambda listed: None]], ids=["fused", "python"])
def test_an_interrupt_behind_the_compiled_step_completes_it(hook):
    one = Bag({"a": jr.Parameter([0.0], [1.0]), "b": InterruptedOnce([0.0], [1.0])})
    opt = jr.Momentum(0.1, hook=hook)
    opt.update(one)
    one.params()["b"].armed = True
    with pytest.raises(KeyboardInterrupt):
        opt.update(one)
    opt.update(one)
    for parameter in one.params().values():
        np.testing.assert_allclose(parameter.data, -0.1 - 0.19 - 0.271, rtol=1e-5)
    assert opt.state_dict(one)["rule.momentum.count"] == 3


def test_a_hook_that_raises_changes_nothing():
    one = model(a=(2,), b=(3,))
    fill(one)

    def fail(listed):
        listed[0].grad = None
        raise RuntimeError("no")

    opt = jr.Adam(hook=[jr.clip_grad(0.1), fail])
    before = values(one), gradients(one), opt.state_dict(one)
    with pytest.raises(RuntimeError, match="no"):
        opt.update(one)
    chex.assert_trees_all_equal((values(one), gradients(one), opt.state_dict(one)), before)
    opt.hook = []
    opt.update(one)


# Errors


@pytest.mark.parametrize("hook", [[], [jr.clip_grad(1.0)], [lambda listed: None]], ids=["none", "rule", "function"])
def test_a_gradient_of_the_wrong_shape_changes_nothing(hook):
    opt, one = jr.Adam(hook=hook), model(a=(2,), b=(3,))
    fill(one)
    opt.update(one)
    fill(one)
    one.params()["b"].grad = jnp.ones(4)
    before = values(one), gradients(one), opt.state_dict(one)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"gradient at 'b' has shape \(4,\), its parameter has shape \(3,\)"):
            opt.update(one)
        chex.assert_trees_all_equal((values(one), gradients(one), opt.state_dict(one)), before)
    fill(one)
    opt.update(one)
    assert opt.state_dict(one)["rule.adam.count"] == 2


def test_a_failed_first_update_leaves_no_state():
    opt, one = jr.Adam(), Bag({"w": jr.Parameter([1.0], [1.0, 2.0])})
    with pytest.raises(ValueError, match="'w'"):
        opt.update(one)
    assert not any(name.endswith(".w") for name in opt.state_dict(one))


def test_misspelt_extra_arguments():
    opt, one = jr.Adam(hook=[jr.clip_grad(1.0)]), Bag({"w": jr.Parameter([1.0], [1.0])})
    with pytest.raises(TypeError, match="does not take valeu"):
        opt.update(one, valeu=1.0)
    opt.update(one, value=1.0, value_fn=lambda x: x)


def test_inside_jit_it_says_what_to_use():
    def step(g):
        jr.SGD(0.1).update(Bag({"w": jr.Parameter(jnp.ones(2), g)}))
        return g

    with pytest.raises(TypeError, match=r"use the rule: params, state = rule\.apply"):
        jax.jit(step)(jnp.ones(2))

    opt, one = jr.Adam(), Bag({"w": jr.Parameter([1.0], [1.0])})

    def concrete(x):
        opt.update(one)
        return x

    with pytest.raises(TypeError, match=r"use the rule: params, state = rule\.apply"):
        jax.jit(concrete)(jnp.ones(2))
    opt.update(one)
    np.testing.assert_allclose(one.params()["w"].data, 0.999, rtol=1e-6)


# State


def test_state_belongs_to_the_parameter_and_survives_newcomers():
    """Against one optimizer per parameter, with the counter of all."""
    opt = jr.Momentum(0.1)
    first, second = model(w=(2,)), model(w=(2,), b=(1,))
    second.parameters["w2"] = first.params()["w"]
    fill(first)
    opt.update(first)
    v = opt.state_dict(first)["rule.momentum.v.w"]
    fill(second)
    opt.update(second)
    saved = opt.state_dict(second)
    np.testing.assert_allclose(saved["rule.momentum.v.w2"], 0.9 * v - 0.1 * gradients(second)["w2"], rtol=1e-6)
    np.testing.assert_allclose(saved["rule.momentum.v.w"], -0.1 * gradients(second)["w"], rtol=1e-6)
    assert saved["rule.momentum.count"] == 2


def test_none_patterns_are_traced_once_each():
    traced = Traced(jr.adam())
    opt, one = jr.Optimizer(traced.rule), model(a=(2,), b=(2,))
    fill(one)
    opt.update(one)
    assert traced.count == 1
    for missing in ("a", "b", None, "a", "b", None):
        fill(one)
        if missing:
            one.params()[missing].grad = None
        before = values(one)
        opt.update(one)
        for name, value in values(one).items():
            assert np.array_equal(before[name], value) == (name == missing)
    assert traced.count == 3


def test_a_new_optimizer_does_not_compile_again():
    one = model(w=(2,))
    fill(one)
    jr.Adam(0.1, hook=[jr.clip_grad(1.0)]).update(one)
    size = stateful._shared_program.cache_info().misses
    for _ in range(3):
        fill(one)
        jr.Adam(0.1, hook=[jr.clip_grad(1.0)]).update(one)
    assert stateful._shared_program.cache_info().misses == size


@pytest.mark.parametrize(
    "make",
    [
        lambda x: jr.SGD(x, hook=[jr.clip_grad(1.0)]),
        lambda x: jr.Momentum(x, x),
        lambda x: jr.Adam(x, x, x),
        lambda x: jr.AdamW(jr.Adam(x), x),
    ],
)
def test_optimizers_that_differ_in_numbers_share_one_program(make):
    one = model(w=(2,))
    fill(one)
    first, second = make(0.1), make(0.2)
    first.update(one)
    size = stateful._shared_program.cache_info().misses
    second.update(one)
    assert stateful._shared_program.cache_info().misses == size
    assert all(a is b for a, b in zip(first._programs.values(), second._programs.values(), strict=True))


def test_models_that_take_turns_are_traced_once_each():
    traced = Traced(jr.momentum(0.1))
    opt, models = jr.Optimizer(traced.rule), [model(w=(2,)), model(w=(2,), b=(1,))]
    fill(*models)
    opt.update(models[0])
    for one in 3 * models[::-1]:
        opt.update(one)
    # One for the first model before the second was known.
    assert traced.count == 3


def test_a_model_may_change_between_updates():
    p, q, r = (jr.Parameter([0.0], [1.0]) for _ in range(3))
    opt, one = jr.Momentum(0.1), Bag({"a": p, "b": q})
    for parameters in ({"a": p, "b": q}, {"b": q, "a": p}, {"a": q}, {"a": r, "b": p, "c": p}, {"a": p, "b": q}):
        one.parameters = parameters
        opt.update(one)
    # Four, four and one of the steps of Momentum(0.1, 0.9) for a gradient of ones.
    four = -(0.1 + 0.19 + 0.271 + 0.3439)
    np.testing.assert_allclose([x.data[0] for x in (p, q, r)], [four, four, -0.1], rtol=1e-6)


def test_state_dict_round_trip():
    def run(opt, one, steps):
        for i in range(steps):
            for j, parameter in enumerate(one.params().values()):
                parameter.grad = jnp.cos(parameter.data + i + j)
            opt.update(one)

    rng = np.random.default_rng(3)
    start = {name: rng.normal(size=shape) for name, shape in {"a": (2, 2), "b": (3,)}.items()}

    def make():
        return Bag({name: jr.Parameter(value) for name, value in start.items()})

    straight, broken, resumed = make(), make(), make()
    hook = [jr.clip_grad(1.0), jr.momentum_direction(0.5)]
    whole = jr.AdamW(alpha=0.1, hook=hook)
    run(whole, straight, 6)
    first = jr.AdamW(alpha=0.1, hook=hook)
    run(first, broken, 3)
    saved = first.state_dict(broken)
    assert all(isinstance(value, np.ndarray) for value in saved.values())
    # Another optimizer, with another past and other settings, and a model whose Parameters are others.
    second = jr.AdamW(alpha=0.5, beta1=0.5, hook=hook)
    run(second, make(), 2)
    for name, parameter in resumed.params().items():
        parameter.data = jnp.array(broken.params()[name].data)
    second.load_state_dict(resumed, saved)
    assert second.alpha == 0.1
    for i in range(3, 6):
        for j, parameter in enumerate(resumed.params().values()):
            parameter.grad = jnp.cos(parameter.data + i + j)
        second.update(resumed)
    chex.assert_trees_all_equal(values(resumed), values(straight))


def test_a_parameter_without_state_has_none_after_loading():
    one = model(a=(2,), b=(2,))
    one.params()["a"].grad = jnp.ones(2)
    source = jr.Adam()
    source.update(one)
    saved = source.state_dict(one)
    target = jr.Adam()
    fill(one)
    target.update(one)
    target.load_state_dict(one, saved)
    assert not any(name.endswith(".b") for name in target.state_dict(one))
    fill(one)
    target.update(one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("rule.adam.m.a"), "rule.adam.m.a is missing"),
        (lambda d: d.pop("rule.adam.count"), "rule.adam.count is missing"),
        (lambda d: d.update(x=np.ones(1)), "x is unexpected"),
        (lambda d: d.update({"rule.adam.count": np.array(2.7)}), "rule.adam.count is of type float64, not int32"),
        (lambda d: d.update({"rule.step.hyper.learning_rate": np.array(-3.0)}), "learning_rate must be at least 0"),
        (lambda d: d.update({"rule.adam.m.a": np.ones(5)}), r"rule.adam.m.a has shape \(5,\), not \(2,\)"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    opt, one = jr.Adam(), model(a=(2,))
    fill(one)
    opt.update(one)
    saved = opt.state_dict(one)
    change(saved)
    before = opt.state_dict(one)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(one, saved)
    chex.assert_trees_all_equal(opt.state_dict(one), before)


def test_loading_keeps_parameters_of_one_name_apart():
    p, q = jr.Parameter([0.0], [1.0]), jr.Parameter([0.0], [2.0])
    opt, second = jr.Momentum(0.1), Bag({"a": q, "b": p})
    opt.update(Bag({"a": p}))
    opt.update(second)
    opt.load_state_dict(second, opt.state_dict(second))
    opt.update(second)
    np.testing.assert_allclose(p.data, -0.1 - 0.19 - 0.271, rtol=1e-5)
    np.testing.assert_allclose(q.data, -0.2 - 0.38, rtol=1e-5)


def test_a_parameter_that_has_another_shape_now():
    opt, one = jr.Adam(), Bag({"w": jr.Parameter([1.0], [1.0])})
    opt.update(one)
    one.params()["w"].data = one.params()["w"].grad = jnp.ones(4)
    with pytest.raises(ValueError, match=r"the gradient at 'w' has shape \(4,\), the state's m has shape \(1,\)"):
        opt.update(one)


def test_parameters_on_a_second_device():
    device = jax.devices()[1]
    one = Bag({"w": jr.Parameter(jax.device_put(jnp.ones(2), device))})
    one.params()["w"].grad = one.params()["w"].data
    opt = jr.Adam()
    opt.alpha = 0.1
    opt.update(one)
    opt.load_state_dict(one, opt.state_dict(one))
    opt.update(one)
    assert one.params()["w"].data.devices() == {device}


def test_parameters_on_a_mesh_take_the_scalars_along():
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))
    over_x = NamedSharding(mesh, PartitionSpec("x"))
    one = Bag({"w": jr.Parameter(jax.device_put(jnp.ones((4, 2)), over_x))})
    opt = jr.Adam(0.1, hook=[jr.clip_grad(1.0)])
    one.params()["w"].grad = one.params()["w"].data
    opt.update(one)
    size = stateful._shared_program.cache_info().misses
    opt.alpha = 0.2
    opt.update(one)
    assert stateful._shared_program.cache_info().misses == size
    assert all(leaf.sharding.mesh == mesh for leaf in opt._leaves)
    assert one.params()["w"].data.sharding.is_equivalent_to(over_x, 2)


# Donation


def test_an_array_that_is_still_held_stays_valid():
    opt, one = jr.Adam(0.1), model(w=(2,))
    held = one.params()["w"].data
    fill(one)
    opt.update(one)
    np.array(held)
    donating = jr.Optimizer(jr.adam(0.1), donate=True)
    held = one.params()["w"].data
    donating.update(one)
    assert held.is_deleted()


def test_one_array_in_two_parameters():
    array = jnp.ones(2)
    one = Bag({"a": jr.Parameter(array, jnp.ones(2)), "b": jr.Parameter(array, jnp.full(2, 2.0))})
    jr.SGD(0.1).update(one)
    np.testing.assert_allclose(one.params()["a"].data, 0.9)
    np.testing.assert_allclose(one.params()["b"].data, 0.8)
    one = Bag({"a": jr.Parameter(array, jnp.ones(2)), "b": jr.Parameter(array, jnp.ones(2))})
    with pytest.raises(ValueError, match="the data of 'a' and the data of 'b' are one array, which cannot be donated"):
        jr.SGD(0.1, donate=True).update(one)
    np.testing.assert_allclose(one.params()["a"].data, 1)
    with pytest.raises(ValueError, match="the data of 'a' and the gradient of 'a' are one array"):
        jr.SGD(0.1, donate=True).update(Bag({"a": jr.Parameter(array, array)}))


def test_parameters_without_gradients_share_no_array():
    opt = jr.Optimizer(jr.accumulate(jr.sgd(1.0), 2), donate=True)
    one = Bag({name: jr.Parameter(jnp.zeros(1), jnp.ones(1)) for name in "abc"})
    opt.update(one)
    one.params()["a"].grad = jnp.ones(1)
    one.params()["b"].grad = one.params()["c"].grad = None
    opt.update(one)
    assert [float(p.data[0]) for p in one.params().values()] == [-1.0, -0.5, -0.5]


# Pytrees


class Layer(NamedTuple):
    w: jax.Array
    b: jax.Array | None


TREE = {
    "layers": [Layer(jnp.ones((2, 2)), jnp.ones(2)), Layer(jnp.ones((2, 1)), None)],
    "f": jnp.tanh,
    "n": jnp.arange(2),
}
TREE_GRADS = {"layers": [Layer(jnp.ones((2, 2)), None), Layer(jnp.ones((2, 1)), None)], "f": None, "n": None}


@pytest.mark.parametrize("donate", [False, True])
def test_a_pytree_is_updated_as_by_the_rule(donate):
    rule = jr.chain(jr.clip_grad(1.0), jr.adamw(0.1, where="**/w"))
    opt = jr.Optimizer(rule, donate=donate)
    expected, state = TREE, rule.init(TREE)
    tree = jax.tree.map(lambda x: jnp.array(x) if isinstance(x, jax.Array) else x, TREE)
    for _ in range(3):
        expected, state = rule.apply(TREE_GRADS, state, expected)
        new = opt.update(tree, TREE_GRADS)
        assert new is not tree
        tree = new
    assert tree["f"] is jnp.tanh
    chex.assert_trees_all_close([tree["layers"], tree["n"]], [expected["layers"], expected["n"]], rtol=1e-6)
    assert {"rule.adam.m.layers/0/w", "rule.adam.m.layers/1/w"} <= set(opt.state_dict(tree))
    other = jr.Optimizer(rule)
    other.load_state_dict(tree, opt.state_dict(tree))
    chex.assert_trees_all_equal(other.update(tree, TREE_GRADS)["layers"], opt.update(tree, TREE_GRADS)["layers"])


def test_a_pytree_of_another_structure():
    opt = jr.Optimizer(jr.sgd(0.1))
    opt.update({"a": jnp.ones(2)}, {"a": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"must be a tree like the one that this optimizer updated before.* lacks 'a'"):
        opt.update({"b": jnp.ones(2)}, {"b": jnp.ones(2)})
    with pytest.raises(ValueError, match="the model must be a tree like the gradients"):
        opt.update({"a": jnp.ones(2)}, {"b": jnp.ones(2)})
    with pytest.raises(ValueError, match="has the state of a pytree; it cannot have that of Parameters"):
        opt.update(model(a=(2,)))
    with pytest.raises(TypeError, match="hooks that are Python functions see Parameters"):
        jr.Optimizer(jr.sgd(0.1), hook=[print]).update({"a": jnp.ones(2)}, {"a": jnp.ones(2)})


def test_gradient_patterns_of_a_pytree_come_and_go():
    traced = Traced(jr.momentum(0.1))
    opt, tree = jr.Optimizer(traced.rule), {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    one = jnp.ones(1)
    for grads in ({"a": one, "b": None}, {"a": one, "b": one}, {"a": None, "b": one}, {"a": one, "b": one}):
        tree = opt.update(tree, grads)
    # a: steps at 1, 2, 4; b: at 2, 3, 4. Each: −0.1, −0.19, −0.271.
    np.testing.assert_allclose([tree["a"][0], tree["b"][0]], [-0.561, -0.561], rtol=1e-6)
    assert traced.count == 3


# Rules around rules


def test_accumulated_gradients_count_where_the_last_call_has_none():
    opt, zero, one = jr.Optimizer(jr.accumulate(jr.sgd(1.0), 2)), jnp.zeros(1), jnp.ones(1)
    tree = opt.update({"a": zero, "b": zero}, {"a": one, "b": one})
    tree = opt.update(tree, {"a": one, "b": None})
    assert (float(tree["a"][0]), float(tree["b"][0])) == (-1.0, -0.5)


def test_and_those_of_parameters():
    opt = jr.Optimizer(jr.accumulate(jr.sgd(1.0), 2), hook=[jr.scale(1.0)])
    bag = Bag({"a": jr.Parameter([0.0], [1.0]), "b": jr.Parameter([0.0], [1.0])})
    opt.update(bag)
    bag.params()["b"].grad = None
    opt.update(bag)
    assert [float(p.data[0]) for p in bag.params().values()] == [-1.0, -0.5]
    assert bag.params()["b"].grad is None


@pytest.mark.parametrize("labels", [("w", "b"), ("b", "other")])
def test_labels_may_be_called_like_parameters(labels):
    first, second = labels
    rule = jr.partition(
        {first: jr.sgd(0.1, momentum=0.9), second: jr.adam(0.1)},
        by=lambda path, x: first if path == first else second,
    )
    bag = Bag({"w": jr.Parameter([1.0], [3.0]), "b": jr.Parameter([1.0], None)})
    opt, other = jr.Optimizer(rule), jr.Optimizer(rule)
    opt.update(bag)
    saved = opt.state_dict(bag)
    other.load_state_dict(bag, saved)
    chex.assert_trees_all_equal(other.state_dict(bag), saved)
    bag.params()["b"].grad = bag.params()["b"].data
    other.update(bag)
    assert len(other.state_dict(bag)) > len(saved)


def test_two_leaves_of_one_path_are_refused():
    tree = {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}
    with pytest.raises(ValueError, match=r"two leaves of the model have the same path, 'a/b'"):
        jr.Optimizer(jr.sgd(0.1)).update(tree, tree)


def test_evaluating_one_of_two_models():
    opt = jr.Optimizer(jr.average(jr.sgd(1.0), 0.5, debias=False))
    bags = [Bag({"w": jr.Parameter([0.0], [1.0])}) for _ in range(2)]
    for bag in (*bags, *bags):
        opt.update(bag)
    weight = bags[0].params()["w"]
    with opt.evaluating(bags[0]):
        assert float(weight.data[0]) == -1.5
    assert float(weight.data[0]) == -2.0
    with pytest.raises(ValueError, match=r"with opt.evaluating\(model\)"):
        opt.eval_params({"w": jnp.ones(1)})


# Functions of the model


SEARCHING = [
    jr.chain(jr.adam_direction(), jr.backtracking()),
    jr.sam(jr.sgd(0.1)),
    pytest.param(jr.lbfgs(), marks=pytest.mark.thorough),
    pytest.param(
        jr.partition({"a": jr.chain(jr.clip_grad(0.5), jr.polyak_sgd()), "rest": jr.sgd(0.1)}, {"a": "a"}),
        marks=pytest.mark.thorough,
    ),
]


def bowl(a, b, fixed):
    return jnp.sum((a - 1) ** 2) + jnp.sum(a * b) + 3 * jnp.sum((b - fixed) ** 2)


@pytest.mark.parametrize("rule", SEARCHING, ids=repr)
def test_a_loss_of_the_model_is_handed_to_the_rule(rule):
    """As one of Parameters, of a pytree with other leaves, and, by the rule itself, of a dict: the same numbers."""
    traces = []
    mutable = model(a=(3,), b=(3,), fixed=(3,))
    start = {name: p.data for name, p in mutable.params().items()}
    params = {name: start[name] for name in ("a", "b")}
    tree = start | {"name": "not an array", "none": None}

    def of_parameters(one):
        one.written = traces.append("parameters")
        return bowl(*(p.data for p in one.params().values()))

    def of_tree(tree):
        traces.append("tree")
        assert tree["name"] == "not an array"
        return bowl(tree["a"], tree["b"], tree["fixed"])

    def of_dict(params):
        return bowl(params["a"], params["b"], start["fixed"])

    one, other, state = jr.Optimizer(rule), jr.Optimizer(rule), rule.init(params)
    traced = []
    for _ in range(3):
        value, grads = jax.value_and_grad(of_dict)(params)
        params, state = rule.apply(grads, state, params, value=value, grad=grads, value_fn=of_dict)
        for name, g in grads.items():
            mutable.params()[name].grad = g
        one.update(mutable, value=value, value_fn=of_parameters)
        tree = other.update(tree, grads | dict.fromkeys(["fixed", "name", "none"]), value=value, value_fn=of_tree)
        traced.append(len(traces))
    assert len(set(traced)) == 1
    assert not hasattr(mutable, "written")
    chex.assert_trees_all_equal((tree["fixed"], mutable.params()["fixed"].data), (start["fixed"], start["fixed"]))
    for found in (values(mutable), tree):
        chex.assert_trees_all_close({name: found[name] for name in params}, params, rtol=2e-5, atol=2e-6)
