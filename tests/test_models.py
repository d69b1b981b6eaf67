"""The models of the documented examples train as they did in the documented package, number for number."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden import array, count, hooks, load, optimizer, slots

import jaxopt_rules as jr
from jaxopt_rules.models import LSTM, MLP, mean_squared_error, sigmoid, softmax_cross_entropy

ACTIVATIONS = {"relu": jax.nn.relu, "sigmoid": sigmoid, "tanh": jnp.tanh}

# In float32 all numbers of all runs agree to 2e-6, but for the final weights of the spirals, where training magnifies
# rounding (in float64, too: there they agree to 3e-14 only, the others to 2e-15).
# - spiral/sgd: from step 78 on, learning rate times largest curvature is over 2, at the end 2.8. Along that direction
#   an error grows 1.0- to 1.8-fold per step, about a thousandfold in all. Measured: 4.4e-5.
# - spiral/adam, spiral/adamw: the first gradients of some biases are about 1e-6, ten ulps of the terms that they are
#   sums of; Adam's first steps have the size of the rate whatever the gradient's. Measured: 5.2e-6 and 1.3e-5, and
#   2.6e-5 in float64 with every gradient disturbed by 6e-8.
FINAL_WEIGHTS_F32 = {"spiral/sgd": 2e-4, "spiral/adam": 5e-5, "spiral/adamw": 5e-5}


def in_float32(name: str) -> list[pytest.MarkDecorator]:
    """To compile the LSTM takes long, and each case is run in float64: in float32, one of them is enough often."""
    return [pytest.mark.thorough] if name.startswith("lstm") and not name.endswith("/adam") else []


def cases(file):
    """Every case of a file in float32, and in float64 in the process for 64-bit tests."""
    return pytest.mark.parametrize(
        ("case", "dtype", "tolerance", "final_tolerance"),
        [
            pytest.param(case, *precision, final, id=f"{precision[0].__name__}-{case['name']}", marks=marks)
            for case in load(file)["cases"]
            for precision, final, marks in (
                ((jnp.float32, 2e-6), FINAL_WEIGHTS_F32.get(case["name"], 2e-6), in_float32(case["name"])),
                ((jnp.float64, 1e-10), 1e-10, pytest.mark.x64),
            )
        ],
    )


def close(actual, expected, tolerance):
    np.testing.assert_allclose(np.asarray(actual).ravel(), np.ravel(expected), rtol=tolerance, atol=tolerance)


def begin(model, case, dtype):
    assert model.params().keys() == case["init"].keys()
    for name, parameter in model.params().items():
        value = array(case["init"][name])
        assert parameter.data.shape == value.shape
        parameter.data = jnp.array(value, dtype)
    return optimizer(case["optimizer"], hooks(case["hooks"]))


def update(opt, model, case, k, tolerance):
    """Update number k, from 0, checked against what is recorded of it."""
    grads = {name: parameter.grad for name, parameter in model.params().items()}
    opt.update(model)
    close(jr.global_norm(grads), case["grad_norms"][k], tolerance)
    if case["clip_rates"] is not None:
        # Recorded before it is limited to 1.
        rate = case["hooks"][-1]["value"] / (opt.metrics["grad_norm"] + 1e-6)
        close(rate, case["clip_rates"][k], tolerance)
    if k == 0:
        for name, parameter in model.params().items():
            close(grads[name], array(case["first_grads"][name]), tolerance)
            close(parameter.data, array(case["weights_after_first_update"][name]), tolerance)


def check_end(opt, model, case, tolerance, final_tolerance):
    for name, parameter in model.params().items():
        close(parameter.data, array(case["final"][name]), final_tolerance)
        expected: dict[str, Any] = case["final_state"][name] or {"m": None, "v": None, "iter": -1}
        mine = slots(opt, model, name)
        assert mine.keys() == {slot for slot in ("m", "v") if expected[slot] is not None}
        for slot, value in mine.items():
            close(value, expected[slot], tolerance)
        if expected["iter"] >= 0:
            assert count(opt, model) == expected["iter"]


@cases("train_mlp")
def test_mlp(case, dtype, tolerance, final_tolerance):
    conf = case["model"]
    classes = conf["loss"].startswith("SoftmaxCrossEntropy")
    loss_of = softmax_cross_entropy if classes else mean_squared_error
    x, t = jnp.array(array(case["x"]), dtype), jnp.array(array(case["t"]), int if classes else dtype)
    model = MLP((x.shape[1], *conf["sizes"]), ACTIVATIONS[conf["activation"]])
    opt = begin(model, case, dtype)

    def loss_fn(model, x, t):
        return loss_of(model.forward(x), t)

    for k in range(conf["steps"]):
        model.cleargrads()
        loss = jr.backward(loss_fn, model, x, t)
        close(loss, case["losses"][k], tolerance)
        update(opt, model, case, k, tolerance)
    assert len(case["losses"]) == conf["steps"]
    check_end(opt, model, case, tolerance, final_tolerance)


@cases("train_lstm")
def test_lstm(case, dtype, tolerance, final_tolerance):
    conf = case["model"]
    batch, bptt = conf["batch"], conf["bptt"]
    y = jnp.array(case["data"]["y"], dtype)[:, None]
    batches = (conf["N"] - 1) // batch
    xs = [y[i * batch : (i + 1) * batch] for i in range(batches)]
    ts = [y[i * batch + 1 : (i + 1) * batch + 1] for i in range(batches)]
    model = LSTM(1, conf["hidden"], conf["out"])
    opt = begin(model, case, dtype)

    def loss_fn(model, state, loss, xs, ts):
        model.state = state
        for x, t in zip(xs, ts, strict=True):
            loss += mean_squared_error(model.forward(x), t)
        return loss, model.state

    k = 0
    for epoch_loss in case["epoch_loss"]:
        model.reset_state()
        loss = jnp.zeros((), dtype)
        # Batches that fill no chunk are part of the epoch's loss alone.
        for i in range(0, batches, bptt):
            chunk = xs[i : i + bptt], ts[i : i + bptt]
            if i + bptt > batches:
                loss, _ = loss_fn(model, model.state, loss, *chunk)
                continue
            model.cleargrads()
            loss, model.state = jr.backward(loss_fn, model, model.state, loss, *chunk, has_aux=True)
            assert [name for name, p in model.params().items() if p.grad is None] == case["nil_grads"][k]
            close(loss, case["losses"][k], tolerance)
            update(opt, model, case, k, tolerance)
            k += 1
        close(loss / batches, epoch_loss, tolerance)
    assert k == len(case["losses"])
    check_end(opt, model, case, tolerance, final_tolerance)

    model.reset_state()
    curve = np.cos(np.linspace(0, 4 * np.pi, len(case["predict"])))
    predicted = [model.forward(jnp.full((1, 1), x, dtype)) for x in curve]
    close(jnp.stack(predicted), case["predict"], tolerance)


def regression():
    """100 rows of y = sin(2πx) + noise."""
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(100, 1))
    return jnp.asarray(x), jnp.asarray(np.sin(2 * np.pi * x) + rng.uniform(size=(100, 1)))


def classification():
    """90 points around three centres."""
    rng = np.random.default_rng(0)
    t = np.arange(90) % 3
    return jnp.asarray(np.eye(3)[t, :2] * 3 + rng.normal(size=(90, 2))), jnp.asarray(t)


def loss_mse(model, x, t):
    y = model.forward(x)
    return mean_squared_error(y, t)


def loss_ce(model, x, t):
    y = model.forward(x)
    return softmax_cross_entropy(y, t)


REGRESSION, CLASSIFICATION = (regression, (1, 10, 1), loss_mse), (classification, (2, 10, 3), loss_ce)


@pytest.mark.parametrize(
    ("make", "data", "sizes", "loss_fn"),
    [
        pytest.param(lambda: jr.SGD(learning_rate=0.01), *REGRESSION, id="SGD"),
        pytest.param(lambda: jr.Momentum(learning_rate=0.01, momentum=0.9), *REGRESSION, id="Momentum"),
        pytest.param(lambda: jr.Adam(alpha=0.001, beta1=0.9, beta2=0.999), *CLASSIFICATION, id="Adam"),
        pytest.param(
            lambda: jr.AdamW(jr.Adam(alpha=0.001, beta1=0.9, beta2=0.999), weight_decay=0.01),
            *CLASSIFICATION,
            id="AdamW",
        ),
        pytest.param(
            lambda: jr.Adam(
                alpha=0.001, beta1=0.9, beta2=0.999, hook=[jr.hooks.weight_decay(1e-4), jr.hooks.clip_grad(1.0)]
            ),
            *CLASSIFICATION,
            id="hooks",
        ),
    ],
)
def test_documented_example(make, data, sizes, loss_fn):
    x, t = data()
    model = MLP(sizes)
    opt = make()
    losses = []
    for _ in range(1000):
        model.cleargrads()
        loss = jr.backward(loss_fn, model, x, t)
        opt.update(model)
        losses.append(loss)
    assert float(losses[-1]) < 0.7 * float(losses[0])
    # As slow as the documented rates are, none of them overshoots.
    assert float(losses[-1]) == pytest.approx(float(min(losses)), rel=1e-3)


def test_lstm_parameters_that_the_first_step_does_not_reach_have_no_gradient_and_stay():
    model = LSTM(1, 4, 1)
    opt = jr.AdamW(alpha=0.01, weight_decay=0.1, hook=[jr.weight_decay(0.1)])
    before = {name: parameter.data for name, parameter in model.params().items()}
    x, t = jnp.ones((2, 1)), jnp.zeros((2, 1))

    def loss_fn(model, state, x, t):
        model.state = state
        return mean_squared_error(model.forward(x), t), model.state

    _, model.state = jr.backward(loss_fn, model, model.state, x, t, has_aux=True)
    opt.update(model)
    untouched = {"lstm.h2f.w", "lstm.h2i.w", "lstm.h2o.w", "lstm.h2u.w", "lstm.x2f.w", "lstm.x2f.b"}
    for name, parameter in model.params().items():
        assert (parameter.grad is None) == (name in untouched)
        assert (parameter.data is before[name]) == (name in untouched)

    model.cleargrads()
    jr.backward(loss_fn, model, model.state, x, t, has_aux=True)
    assert all(parameter.grad is not None for parameter in model.params().values())


def test_lstm_state_can_be_read_set_and_reset():
    model = LSTM(1, 4, 1)
    assert model.state == (None, None)
    x = jnp.ones((2, 1))
    first = model.forward(x)
    h, c = model.state
    assert isinstance(h, jax.Array)
    assert isinstance(c, jax.Array)
    assert h.shape == c.shape == (2, 4)
    assert h is model.h
    assert c is model.c
    second = model.forward(x)
    assert not jnp.array_equal(first, second)
    model.state = h, c
    assert jnp.array_equal(model.forward(x), second)
    model.reset_state()
    assert model.state == (None, None)
    assert jnp.array_equal(model.forward(x), first)


def test_a_hidden_state_without_a_cell_state():
    model = LSTM(1, 4, 1)
    x, h = jnp.ones((2, 1)), jnp.full((2, 4), 0.5)

    def loss_fn(model, h, x):
        model.h = h
        return jnp.sum(model.forward(x))

    jr.backward(loss_fn, model, h, x)
    missing = {name for name, parameter in model.params().items() if parameter.grad is None}
    assert missing == {"lstm.x2f.w", "lstm.x2f.b", "lstm.h2f.w"}


@pytest.mark.parametrize(
    "make", [lambda seed: MLP((200, 100, 3), seed=seed), lambda seed: LSTM(200, 100, 3, seed=seed)]
)
def test_initial_weights(make):
    parameters = make(1).params()
    for name, parameter in parameters.items():
        assert parameter.data.dtype == jnp.result_type(float)
        if name.endswith(".b"):
            assert not parameter.data.any()
            assert parameter.data.shape[0] == 1
        else:
            assert float(jnp.std(parameter.data)) == pytest.approx(parameter.data.shape[0] ** -0.5, rel=0.15)
    of_one_shape = [p.data for name, p in parameters.items() if name.endswith(".w") and p.data.shape == (100, 100)]
    assert all(not jnp.array_equal(a, b) for i, a in enumerate(of_one_shape) for b in of_one_shape[:i])
    again, other = make(1).params(), make(2).params()
    assert all(jnp.array_equal(p.data, again[name].data) for name, p in parameters.items())
    assert all(not jnp.array_equal(p.data, other[name].data) for name, p in parameters.items() if name.endswith(".w"))


def test_sigmoid():
    x = jnp.array([-1000.0, -2.0, 0.0, 2.0, 1000.0])
    close(sigmoid(x), [0, 0.11920292, 0.5, 0.88079708, 1], 1e-6)
    assert jax.grad(sigmoid)(0.0) == 0.25


def test_losses():
    y, t = jnp.array([[1.0, 2.0], [3.0, 5.0]]), jnp.array([[1.0, 1.0], [1.0, 1.0]])
    assert mean_squared_error(y, t) == (0 + 1 + 4 + 16) / 2
    expected = [np.log(1 + np.exp(1)), np.log(1 + np.exp(-2))]
    close(softmax_cross_entropy(y, jnp.array([0, 1])), np.mean(expected), 1e-6)
    assert float(softmax_cross_entropy(jnp.array([[1000.0, 0.0]]), jnp.array([1]))) == 1000


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MLP((3,)), ValueError, "begin with the input's"),
        (lambda: MLP((3, 0, 1)), ValueError, "positive"),
        (lambda: MLP((3, 2.5)), ValueError, "positive integers"),  # pyright: ignore[reportArgumentType]
        (lambda: LSTM(1, 0, 1), ValueError, "positive"),
        (lambda: MLP((3, 1)).forward(jnp.ones((5, 2))), ValueError, r"takes x of shape \(rows, 3\), not \(5, 2\)"),
        (lambda: MLP((3, 1)).forward(jnp.ones(3)), ValueError, r"takes x of shape \(rows, 3\), not \(3,\)"),
        (lambda: LSTM(1, 4, 1).forward(jnp.ones((5, 2))), ValueError, r"takes x of shape \(rows, 1\), not \(5, 2\)"),
        (lambda: mean_squared_error(jnp.ones((5, 1)), jnp.ones(5)), ValueError, r"\(5, 1\) and \(5,\)"),
        (lambda: mean_squared_error(jnp.ones(()), jnp.ones(())), ValueError, r"\(\) and \(\)"),
        (lambda: softmax_cross_entropy(jnp.ones((5, 3)), jnp.ones((5, 1), int)), ValueError, r"\(5, 3\) and \(5, 1\)"),
        (lambda: softmax_cross_entropy(jnp.ones((5, 3)), jnp.ones(5)), TypeError, "class numbers"),
    ],
)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_state_of_other_sequences_is_refused():
    model = LSTM(1, 4, 1)
    model.forward(jnp.ones((3, 1)))
    with pytest.raises(ValueError, match=r"x has 1 rows, h has 3; reset_state\(\)"):
        model.forward(jnp.ones((1, 1)))
