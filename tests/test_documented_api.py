"""The documented mutating API gives the numbers that the documented package gave: trajectories and scenarios."""

import jax.numpy as jnp
import numpy as np
import pytest
from golden import Bag, array, count, hooks, load, optimizer, slots

import jaxopt_rules as jr

TRAJECTORIES = [
    (rule, case["name"])
    for rule in ("sgd", "momentum", "adam", "adamw")
    for case in load(f"trajectory_{rule}")["cases"]
]
SCENARIOS = [scenario["name"] for scenario in load("scenarios")["scenarios"]]

# Values that are rejected when they are given, and a gradient of another shape than its parameter.
REJECTED = {
    "clip/max=-1": "max_norm must be at least 0",
    "clip/max=NaN": "max_norm must be at least 0",
    "clip/upstream_ExampleClipGrad": r"'p' has shape \(4,\)",
    "clip/upstream_ExampleClipGrad_noclip": r"'p' has shape \(4,\)",
    "hyper/Adam{b1:1}": r"b1 must lie in \[0, 1\)",
    "hyper/Adam{b2:1}": r"b2 must lie in \[0, 1\)",
    "hyper/SGD{lr:-0.1}": "learning_rate must be at least 0",
}


def both_precisions(function):
    """float32, and float64 in the process for 64-bit tests, each with its tolerance."""
    return pytest.mark.parametrize(
        ("dtype", "tolerance"),
        [
            pytest.param(jnp.float32, 2e-6, id="f32"),
            pytest.param(jnp.float64, 1e-12, id="f64", marks=pytest.mark.x64),
        ],
    )(function)


def close(actual, expected, tolerance):
    np.testing.assert_allclose(np.asarray(actual).ravel(), np.ravel(expected), rtol=tolerance, atol=tolerance)


def marks(name: str) -> list[pytest.MarkDecorator]:
    """A sparse trajectory compiles a program for each pattern of missing gradients: one of a rule is enough often."""
    return [pytest.mark.thorough] if name.endswith("sparse") and "wd_clip" not in name else []


@pytest.mark.parametrize(
    ("rule", "name"), [pytest.param(rule, name, id=name, marks=marks(name)) for rule, name in TRAJECTORIES]
)
@both_precisions
def test_trajectory(rule, name, dtype, tolerance):
    case = next(case for case in load(f"trajectory_{rule}")["cases"] if case["name"] == name)
    data = load("sequences")
    grads = next(s["grads"] for s in data["sequences"] if s["name"] == case["sequence"])
    shapes = {key: value["shape"] for key, value in data["init"].items()}
    parameters = {key: jr.Parameter(array(value).astype(dtype)) for key, value in data["init"].items()}
    model = Bag(parameters)
    opt = optimizer(case["optimizer"], hooks(case["hooks"]))
    hooked_grads = case["hooked_grads"] or grads
    for i, (step, expected, hooked) in enumerate(zip(grads, case["params"], hooked_grads, strict=True), 1):
        for key, parameter in parameters.items():
            g = step[key]
            parameter.grad = None if g is None else jnp.array(np.reshape(g, shapes[key]), dtype)
        assert opt.update(model) is model
        for key, parameter in parameters.items():
            assert parameter.data.dtype == dtype
            assert parameter.data.shape == tuple(shapes[key])
            close(parameter.data, expected[key], tolerance)
            if hooked[key] is None:
                assert parameter.grad is None
            else:
                close(parameter.grad, hooked[key], tolerance)
        for key, state in case["state_after_step"].get(str(i), {}).items():
            check_state(opt, model, key, state, tolerance)


def check_state(opt, model, key, expected, tolerance):
    mine = slots(opt, model, key)
    if expected is None:
        assert mine == {}
        return
    assert set(mine) == {slot for slot in ("m", "v") if expected[slot] is not None}
    for slot, value in mine.items():
        close(value, [float(x) for x in expected[slot]], tolerance)
    if expected["iter"] >= 0:
        assert count(opt, model) == expected["iter"]


def replay(scenario, dtype, tolerance):
    parameters = {key: jr.Parameter(jnp.array(array(value), dtype)) for key, value in scenario["params"].items()}
    models = {
        key: Bag({name: parameters[target] for name, target in members.items()})
        for key, members in scenario["models"].items()
    }
    make = {key: lambda o=o: optimizer(o["conf"], hooks(o["hooks"])) for key, o in scenario["optimizers"].items()}
    opts = {key: new() for key, new in make.items()}
    for op in scenario["ops"]:
        parameter = parameters.get(op.get("param"))
        match op["op"]:
            case "set_grad":
                parameter.grad = jnp.array(array(op["value"]), dtype)
            case "clear_grad":
                parameter.grad = None
            case "backward_sum_of_squares":
                jr.backward(lambda model: jnp.sum(model.parameters["p"].data ** 2), Bag({"p": parameter}))
            case "new_instance":
                opts[op["opt"]] = make[op["opt"]]()
            case "update":
                opts[op["opt"]].update(models[op["model"]])
            case other:
                raise ValueError(other)
        for key, after in op.get("after", {}).items():
            close(parameters[key].data, array(after["data"]), tolerance)
            if after["grad"] is None:
                assert parameters[key].grad is None
            else:
                close(parameters[key].grad, array(after["grad"]), tolerance)
        for opt, states in op.get("state", {}).items():
            for key, state in states.items():
                check_state(opts[opt], Bag(parameters), key, state, tolerance)


@pytest.mark.parametrize("name", SCENARIOS)
@both_precisions
def test_scenario(name, dtype, tolerance):
    scenario = next(s for s in load("scenarios")["scenarios"] if s["name"] == name)
    if name in REJECTED:
        with pytest.raises(ValueError, match=REJECTED[name]):
            replay(scenario, dtype, tolerance)
    else:
        replay(scenario, dtype, tolerance)


@both_precisions
def test_a_hook_that_changes_the_rate_acts_on_the_next_update(dtype, tolerance):
    expected = load("scenarios")["hook_alpha"]["p_after_each_update"]
    parameter = jr.Parameter(jnp.ones(1, dtype), jnp.ones(1, dtype))

    def halve(parameters):
        opt.alpha *= 0.5

    opt = jr.Adam(0.1, hook=[halve])
    for value in expected:
        opt.update(Bag({"p": parameter}))
        close(parameter.data, [value], tolerance)
