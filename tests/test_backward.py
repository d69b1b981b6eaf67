"""`backward`: what it adds to which gradients, how often it traces, and what it leaves behind."""

import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer

import jaxopt_rules as jr


class Pair:
    """Two parameters a and b, and an attribute."""

    def __init__(self, a=(1.0, 2.0, 3.0), b=(4.0, 5.0, 6.0)):
        self.a, self.b = jr.Parameter(jnp.array(a)), jr.Parameter(jnp.array(b))
        self.memory: Any = None

    def params(self):
        return {"a": self.a, "b": self.b}


def product(model, x=1.0):
    return jnp.sum(model.a.data * model.b.data * x)


def test_value_and_gradients_are_those_of_jax():
    model, x = Pair(), jnp.array([1.0, -1.0, 2.0])

    def function(a, b):
        return jnp.sum(jnp.sin(a) * b * x)

    value, (a, b) = jax.value_and_grad(function, (0, 1))(model.a.data, model.b.data)
    loss = jr.backward(lambda model, x: jnp.sum(jnp.sin(model.a.data) * model.b.data * x), model, x)
    assert loss == value
    np.testing.assert_array_equal(model.a.grad, a)
    np.testing.assert_array_equal(model.b.grad, b)


def test_traces_once_for_each_set_of_shapes_and_dtypes():
    traces = []

    def loss_fn(model, x, y=None):
        traces.append(None)
        return product(model, x)

    model = Pair()
    for _ in range(3):
        jr.backward(loss_fn, model, jnp.ones(3))
        model.a.data = model.a.data + 1
        model.memory = "something else"
    assert len(traces) == 1
    jr.cleargrads(model)
    jr.backward(loss_fn, model, np.full(3, 2.0, np.float32))
    assert len(traces) == 1
    jr.backward(loss_fn, model, jnp.ones((2, 3)))
    assert len(traces) == 2
    jr.backward(loss_fn, model, jnp.ones(3), None)
    assert len(traces) == 3
    jr.backward(loss_fn, model, jnp.ones(3), jnp.ones(3))
    assert len(traces) == 4
    jr.backward(loss_fn, model, jnp.ones(3, jnp.int32))
    assert len(traces) == 5
    for x in (jnp.ones(3), jnp.ones((2, 3)), jnp.ones(3, jnp.int32)):
        jr.backward(loss_fn, model, x)
    assert len(traces) == 5


def test_gradients_accumulate_until_they_are_cleared():
    model = Pair()
    jr.backward(product, model)
    once = model.a.grad
    jr.backward(product, model, jnp.float32(2.0))
    np.testing.assert_array_equal(model.a.grad, 3 * model.b.data)
    np.testing.assert_array_equal(model.b.grad, 3 * model.a.data)
    np.testing.assert_array_equal(once, model.b.data)
    jr.cleargrads(model)
    assert model.a.grad is None
    assert model.b.grad is None
    jr.backward(product, model)
    np.testing.assert_array_equal(model.a.grad, model.b.data)


def test_accumulates_on_top_of_what_hooks_left():
    model = Pair()
    opt = jr.SGD(0.0, hook=[jr.clip_grad(1.0)])
    jr.backward(product, model)
    opt.update(model)
    clipped = jnp.asarray(model.a.grad)
    jr.backward(product, model)
    np.testing.assert_array_equal(model.a.grad, clipped + model.b.data)


def test_a_parameter_without_a_gradient_keeps_the_one_that_it_has():
    model = Pair()
    jr.backward(product, model)
    before = model.b.grad
    jr.backward(lambda model: jnp.sum(model.a.data), model)
    assert model.b.grad is before
    np.testing.assert_array_equal(model.a.grad, model.b.data + 1)


def through_scan(model):
    """b is scanned over and carried, and used by neither the sum nor what follows."""

    def body(carry, xs):
        total, unused = carry
        a, b = xs
        return (total + a, unused * b), None

    (total, _), _ = jax.lax.scan(body, (0.0, 1.0), (model.a.data, model.b.data))
    return total


def through_cond(model):
    return jax.lax.cond(
        jnp.sum(model.b.data) > 0, lambda a, b: jnp.sum(a), lambda a, b: 2 * jnp.sum(a), model.a.data, model.b.data
    )


def through_fori_loop(model):
    def body(i, carry):
        return carry[0] + jnp.sum(model.a.data), carry[1] + model.b.data

    return jax.lax.fori_loop(0, 3, body, (0.0, model.b.data))[0]


@jax.custom_jvp
def first_of(a, b):
    return jnp.sum(a)


@first_of.defjvp
def _(primals, tangents):
    return first_of(*primals), jnp.sum(tangents[0])


@pytest.mark.parametrize(
    "loss_fn",
    [
        pytest.param(lambda model: jnp.sum(model.a.data), id="unused"),
        pytest.param(lambda model: jnp.sum(model.a.data * jax.lax.stop_gradient(model.b.data)), id="stop_gradient"),
        pytest.param(through_scan, id="scan"),
        pytest.param(lambda model: jax.lax.stop_gradient(product(model)) + through_scan(model), id="value_alone"),
        pytest.param(through_cond, id="cond"),
        pytest.param(through_fori_loop, id="fori_loop"),
        pytest.param(
            lambda model: jax.jit(lambda a, b: (jnp.sum(a), jnp.sum(b)))(model.a.data, model.b.data)[0], id="jit"
        ),
        pytest.param(
            lambda model: jax.checkpoint(lambda a, b: jnp.sum(jnp.sin(a)))(model.a.data, model.b.data), id="checkpoint"
        ),
        pytest.param(
            lambda model: jnp.sum(jax.vmap(lambda a, b: (a * a, b))(model.a.data, model.b.data)[0]), id="vmap"
        ),
        pytest.param(lambda model: first_of(model.a.data, model.b.data), id="custom_jvp"),
        pytest.param(lambda model: jnp.max(model.a.data[jnp.argmax(model.b.data)]), id="index"),
        pytest.param(lambda model: jnp.sum(jnp.where(model.b.data > 0, model.a.data, 0)), id="condition"),
    ],
)
def test_what_the_loss_does_not_depend_on_has_no_gradient(loss_fn):
    model = Pair()
    jr.backward(loss_fn, model)
    assert model.b.grad is None
    assert jnp.any(model.a.grad != 0)


@pytest.mark.parametrize(
    "loss_fn",
    [
        pytest.param(lambda model, x: jnp.sum(model.a.data) + x * jnp.sum(model.b.data), id="times_zero"),
        pytest.param(
            lambda model, x: jax.lax.cond(
                x == 0, lambda a, b: jnp.sum(a), lambda a, b: jnp.sum(a * b), model.a.data, model.b.data
            ),
            id="branch_not_taken",
        ),
        pytest.param(lambda model, x: jnp.sum(jnp.where(x == 0, model.a.data, model.b.data)), id="not_selected"),
    ],
)
def test_a_zero_gradient_is_a_gradient(loss_fn):
    model = Pair()
    jr.backward(loss_fn, model, jnp.float32(0))
    np.testing.assert_array_equal(model.b.grad, jnp.zeros(3))


def test_parameters_that_are_not_real_numbers_have_no_gradient():
    model = Pair(b=(1, 2, 3))
    assert model.b.data.dtype == jnp.int32
    jr.backward(product, model)
    assert model.b.grad is None
    np.testing.assert_array_equal(model.a.grad, jnp.array([1.0, 2.0, 3.0]))


def test_gradients_have_the_dtype_of_their_parameters():
    model = Pair()
    model.a.data = model.a.data.astype(jnp.bfloat16)
    for _ in range(2):
        jr.backward(product, model)
        assert jnp.asarray(model.a.grad).dtype == jnp.bfloat16
        assert jnp.asarray(model.b.grad).dtype == jnp.float32


def test_aux_is_returned_beside_the_loss():
    def loss_fn(model, x):
        y = model.a.data * x
        return jnp.sum(y), {"y": y, "nothing": None, "size": y.size}

    model = Pair()
    loss, aux = jr.backward(loss_fn, model, 2.0, has_aux=True)
    assert loss == 12
    np.testing.assert_array_equal(aux["y"], 2 * model.a.data)
    assert aux["nothing"] is None
    assert aux["size"] == 3
    assert model.b.grad is None


def test_aux_has_no_part_in_the_gradient():
    model = Pair()
    jr.backward(lambda model: (jnp.sum(model.a.data), 5 * model.b.data + model.a.data), model, has_aux=True)
    assert model.b.grad is None
    np.testing.assert_array_equal(model.a.grad, jnp.ones(3))


def test_arguments_are_any_trees_none_and_keys_among_them():
    def loss_fn(model, batch, key, state):
        assert state is None
        assert batch["mask"] is None
        noise = jax.random.normal(key, (3,))
        return jnp.sum(model.a.data * batch["x"][0]) + jnp.sum(noise), jax.random.split(key)[0]

    model, key = Pair(), jax.random.key(0)
    batch = {"x": (np.ones(3, np.float32), [jnp.arange(2)]), "mask": None}
    loss, new = jr.backward(loss_fn, model, batch, key, None, has_aux=True)
    assert float(loss) == pytest.approx(6 + float(jnp.sum(jax.random.normal(key, (3,)))), rel=1e-6)
    assert new == jax.random.split(key)[0]


def test_a_parameter_listed_twice_has_one_gradient_the_sum_over_its_uses():
    class Tied(Pair):
        def params(self):
            return {"a": self.a, "again": self.a, "b": self.b}

    model = Tied()
    jr.backward(lambda model: jnp.sum(model.params()["a"].data * 2 + model.params()["again"].data), model)
    np.testing.assert_array_equal(model.a.grad, jnp.full(3, 3.0))
    jr.backward(lambda model: jnp.sum(model.a.data), model)
    np.testing.assert_array_equal(model.a.grad, jnp.full(3, 4.0))


def test_two_models_that_share_a_parameter():
    first, second = Pair(), Pair(b=(0.0, 0.0, 1.0))
    second.a = first.a
    jr.backward(product, first)
    jr.backward(product, second)
    np.testing.assert_array_equal(first.a.grad, first.b.data + second.b.data)


def test_the_model_that_the_loss_receives_is_this_one_and_is_as_before_afterwards():
    model = Pair()
    data, grad = model.a.data, jnp.ones(3)
    model.a.grad = grad
    received = []

    def loss_fn(given):
        received.append(given)
        assert isinstance(given.a.data, Tracer)
        given.memory = given.a.data * 2
        given.another = given.memory
        given.a.data = given.memory
        given.b.grad = given.memory
        return jnp.sum(given.memory)

    jr.backward(loss_fn, model)
    assert received == [model]
    assert model.memory is None
    assert not hasattr(model, "another")
    assert model.a.data is data
    assert model.b.grad is None
    np.testing.assert_array_equal(model.a.grad, grad + 2)


def test_an_error_inside_the_loss_leaves_everything_as_it_was():
    model = Pair()
    jr.backward(product, model)
    before = [(p.data, p.grad) for p in (model.a, model.b)]

    def broken(model, x):
        model.memory = model.a.data
        model.a.data = model.a.data * 2
        model.b = None
        raise RuntimeError("inside the loss")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="inside the loss"):
            jr.backward(broken, model, 1.0)
        assert model.memory is None
        assert all(p.data is d and p.grad is g for p, (d, g) in zip((model.a, model.b), before, strict=True))
    with pytest.raises(TypeError, match="incompatible shapes"):
        jr.backward(product, model, jnp.ones(4))
    assert all(p.data is d and p.grad is g for p, (d, g) in zip((model.a, model.b), before, strict=True))
    jr.backward(product, model)
    np.testing.assert_array_equal(model.a.grad, 2 * model.b.data)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda model: model.a.data, r"float32 of shape \(3,\)"),
        (lambda model: model.a.data[:1], r"float32 of shape \(1,\)"),
        (lambda model: jnp.argmax(model.a.data), "int32"),
        (lambda model: jnp.sum(model.a.data) * 1j, "complex64"),
    ],
)
def test_a_loss_that_is_no_real_scalar_is_refused(loss_fn, message):
    model = Pair()
    with pytest.raises(TypeError, match=message):
        jr.backward(loss_fn, model)
    assert model.a.grad is None
    assert isinstance(model.a.data, jax.Array)
    assert not isinstance(model.a.data, Tracer)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"dict has no params\(\)"):
        jr.backward(lambda model: 0.0, {})  # pyright: ignore[reportArgumentType]

    class Bare:
        def params(self):
            return {"w": jnp.ones(3)}

    with pytest.raises(TypeError, match="'w' is a"):
        jr.backward(lambda model: 0.0, Bare())  # pyright: ignore[reportArgumentType]


def test_a_model_is_not_kept_alive():
    model = Pair()
    jr.backward(product, model)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_a_model_is_not_kept_alive_by_a_closure_or_a_method():
    class Own(Pair):
        def loss(self, model, x):
            return product(model, x)

    def references():
        closed, owner = Own(), Own()
        jr.backward(lambda model, x: product(closed, x), closed, jnp.ones(3))
        jr.backward(owner.loss, owner, jnp.ones(3))
        return weakref.ref(closed), weakref.ref(owner)

    gone = references()
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_methods_of_objects_that_come_and_go():
    """The id of one that is gone may be that of the next."""

    class Loss:
        def __init__(self, target):
            self.target = target

        def mean(self, model):
            return jnp.sum((model.a.data - self.target) * model.b.data)

    model = Pair()
    values = []
    for target in (1.0, 2.0, 3.0):
        values.append(float(jr.backward(Loss(target).mean, model)))
    np.testing.assert_allclose(values, [32 - 15, 32 - 30, 32 - 45])


def test_a_complex_loss_goes_down():
    model = Pair(a=(3 + 4j,), b=(1.0,))
    for _ in range(5):
        jr.cleargrads(model)
        jr.backward(lambda model: jnp.sum(jnp.abs(model.a.data) ** 2), model)
        jr.SGD(0.1).update(model)
    np.testing.assert_allclose(model.a.data, (3 + 4j) * 0.8**5, rtol=1e-5)


def test_a_method_is_traced_once():
    class Counting(Pair):
        traces = 0

        def loss(self, model, x):
            type(self).traces += 1
            return product(model, x)

    model = Counting()
    for _ in range(3):
        jr.backward(model.loss, model, jnp.ones(3))
    assert Counting.traces == 1


def test_inside_jit_it_says_what_to_use():
    model = Pair()

    @jax.jit
    def step(x):
        return jr.backward(product, model, x)

    with pytest.raises(TypeError, match=r"inside a compiled function, use jax\.grad"):
        step(jnp.ones(3))
    assert model.a.grad is None


@pytest.mark.parametrize(
    ("loss_fn", "has_aux", "message"),
    [
        (lambda model: None, False, "must be a real scalar, not a NoneType"),
        (lambda model: (product(model), 1), False, "not a tuple; with an auxiliary result, pass has_aux=True"),
        (product, True, r"with has_aux=True, the loss function returns \(loss, aux\), not a"),
    ],
)
def test_results_of_another_form_are_refused(loss_fn, has_aux, message):
    with pytest.raises(TypeError, match=message):
        jr.backward(loss_fn, Pair(), has_aux=has_aux)


def test_a_model_that_cannot_be_referred_to_weakly():
    class Slots:
        __slots__ = ("p",)

        def params(self):
            return {"p": self.p}

    model = Slots()
    model.p = jr.Parameter(1.0)
    with pytest.raises(TypeError, match="add '__weakref__' to its __slots__"):
        jr.backward(lambda model: model.p.data, model)
