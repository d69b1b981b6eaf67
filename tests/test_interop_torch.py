"""A run that moves between PyTorch and here: 50 steps on one side and 50 on the other are 100 steps in PyTorch.

Needs the dependency group `oracles`; a test whose package is absent is skipped.
"""

import copy
import io
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import quick_jit, stepped
from jax import lax

import jaxopt_rules as jr
from jaxopt_rules.interop.torch import (
    EQUINOX,
    FLAX,
    SAME,
    Axes,
    Layout,
    load_model_state,
    load_optimizer_state,
    model_state_dict,
    optimizer_state_dict,
)
from jaxopt_rules.rules.adam import AdamState

pytestmark = [pytest.mark.oracle, pytest.mark.x64]


@pytest.fixture(autouse=True)
def torch():
    """PyTorch on one thread: its threads would wait for each other, and for those of JAX."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------------
# One model, in PyTorch and here
# ---------------------------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 7, size=(4, 6, 5, 3))  # 4 batches of 6 pictures, 5 by 3
TARGETS = RNG.normal(size=(4, 6, 2))


def torch_model(dtype: str = "float64") -> Any:
    torch = import_module("torch")
    nn = torch.nn
    torch.manual_seed(0)
    # The square layer looks the same transposed. There is no bias in front of the batch norm, which takes it out.
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(7, 4),
            "features": nn.Sequential(nn.Conv2d(4, 6, (3, 2), bias=False), nn.BatchNorm2d(6)),
            "norm": nn.LayerNorm(6),
            "hidden": nn.Linear(6, 6),
            "head": nn.Linear(6, 2),
        }
    )
    return model.to(getattr(torch, dtype))


def torch_loss(model: Any, i: int) -> Any:
    torch = import_module("torch")
    x = model["embed"](torch.tensor(TOKENS[i % 4])).permute(0, 3, 1, 2)
    x = torch.tanh(model["features"](x)).mean((2, 3))
    x = torch.tanh(model["hidden"](model["norm"](x)))
    return ((model["head"](x) - torch.tensor(TARGETS[i % 4], dtype=x.dtype)) ** 2).mean()


def like_flax(dtype: Any = jnp.float64) -> Any:
    """A tree as Flax would have it."""
    shapes = {
        "embed": {"embedding": (7, 4)},
        "conv": {"kernel": (3, 2, 4, 6)},
        "batch_norm": {"scale": (6,), "bias": (6,)},
        "layer_norm": {"scale": (6,), "bias": (6,)},
        "hidden": {"kernel": (6, 6), "bias": (6,)},
        "head": {"kernel": (6, 2), "bias": (2,)},
    }
    return jax.tree.map(lambda shape: jnp.zeros(shape, dtype), shapes, is_leaf=lambda x: isinstance(x, tuple))


def like_equinox(dtype: Any = jnp.float64) -> Any:
    """The same tree as Equinox would have it."""
    tree = like_flax(dtype)
    tree["embed"] = {"weight": tree["embed"]["embedding"]}
    tree["conv"] = {"weight": tree["conv"]["kernel"].transpose(3, 2, 0, 1)}
    for name in ("hidden", "head"):
        tree[name] = {"weight": tree[name]["kernel"].T, "bias": tree[name]["bias"]}
    for name in ("batch_norm", "layer_norm"):
        tree[name] = {"weight": tree[name]["scale"], "bias": tree[name]["bias"]}
    return tree


def flax_loss(p: Any, tokens: Any, targets: Any) -> Any:
    def normal(x, axes, at):
        mean = x.mean(axes, keepdims=True)
        return (x - mean) / jnp.sqrt(((x - mean) ** 2).mean(axes, keepdims=True) + 1e-5) * at["scale"] + at["bias"]

    x = p["embed"]["embedding"][tokens]
    x = lax.conv_general_dilated(x, p["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    x = jnp.tanh(normal(x, (0, 1, 2), p["batch_norm"])).mean((1, 2))
    x = normal(x, -1, p["layer_norm"])
    x = jnp.tanh(x @ p["hidden"]["kernel"] + p["hidden"]["bias"])
    return ((x @ p["head"]["kernel"] + p["head"]["bias"] - targets.astype(x.dtype)) ** 2).mean()


def equinox_loss(p: Any, tokens: Any, targets: Any) -> Any:
    moved: Any = {name: {"bias": p[name]["bias"], "kernel": p[name]["weight"].T} for name in ("hidden", "head")}
    moved |= {name: {"bias": p[name]["bias"], "scale": p[name]["weight"]} for name in ("batch_norm", "layer_norm")}
    moved |= {"embed": {"embedding": p["embed"]["weight"]}}
    moved |= {"conv": {"kernel": p["conv"]["weight"].transpose(2, 3, 1, 0)}}
    return flax_loss(moved, tokens, targets)


class Side(NamedTuple):
    """The model here."""

    layout: Layout
    tree: Callable[..., Any]
    loss: Callable[..., Any]
    matrices: jr.MatrixView
    factored: Any  # PyTorch factors the last two axes of its layout, which of a convolution are those of the filter


NAMES = {"conv": "features.0", "batch_norm": "features.1", "layer_norm": "norm"}
FLAX_SIDE = Side(
    FLAX.also(names=NAMES),
    like_flax,
    flax_loss,
    jr.MatrixView(),
    ((jr.matrices, jr.MatrixView()), ("conv/kernel", jr.MatrixView(rows=-4, columns=-3))),
)
EQUINOX_SIDE = Side(SAME.also(names=NAMES), like_equinox, equinox_loss, jr.MatrixView(rows=-1, columns=-2), "last")
LAYOUT = FLAX_SIDE.layout


@cache
def gradient(loss: Callable[..., Any]) -> Callable[..., Any]:
    return quick_jit(jax.grad(loss))


def train_here(side: Side, rule: jr.Rule, params: Any, state: Any, start: int, stop: int) -> Any:
    for i in range(start, stop):
        grads = gradient(side.loss)(params, TOKENS[i % 4], TARGETS[i % 4])
        params, state = stepped(rule, params, state, grads)
    return params, state


def train_there(model: Any, optimizers: list[Any], start: int, stop: int, step_inside: Any = nullcontext) -> None:
    for i in range(start, stop):
        model.zero_grad()
        torch_loss(model, i).backward()
        for optimizer in optimizers:
            with step_inside():
                optimizer.step()


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers, in PyTorch and here
# ---------------------------------------------------------------------------------------------------------------------


def float64_muon() -> Any:
    """PyTorch's Muon with the rounding to bfloat16 taken out, which tells nothing of what is converted."""
    stack, tensor = ExitStack(), import_module("torch").Tensor
    patch = pytest.MonkeyPatch()
    patch.setattr(tensor, "bfloat16", tensor.clone)
    stack.callback(patch.undo)
    return stack


class Case(NamedTuple):
    name: str
    there: Callable[[Any, Any], list[Any]]  # of torch and the model: its optimizers
    here: Callable[[Side], jr.Rule]
    count: int | None = None  # where the optimizer does not save it
    inside: Any = nullcontext


def named(make: Callable[..., Any]) -> Callable[[Any, Any], list[Any]]:
    return lambda torch, model: [make(torch, model.named_parameters())]


def muon_and_adamw(torch: Any, model: Any) -> list[Any]:
    parameters = dict(model.named_parameters())
    matrices = {"hidden.weight", "head.weight"}
    return [
        torch.optim.Muon([(n, p) for n, p in parameters.items() if n in matrices], 0.02, momentum=0.9),
        torch.optim.AdamW([(n, p) for n, p in parameters.items() if n not in matrices], 0.005),
    ]


def muon_here(side: Side) -> jr.Rule:
    by = {"matrix": lambda path, p: p.ndim == 2 and "embed" not in path}
    muon = jr.muon_pytorch(0.3, views=side.matrices)
    return jr.chain(jr.clip_by_global_norm(1e9), jr.partition({"matrix": muon, "rest": jr.adamw(0.3)}, by))


# The rules are made with other numbers than PyTorch's, which come with the state.
CASES = [
    Case("sgd", named(lambda torch, p: torch.optim.SGD(p, 0.1)), lambda side: jr.sgd(0.3), 50),
    Case(
        "momentum",
        named(lambda torch, p: torch.optim.SGD(p, 0.02, 0.9, weight_decay=0.01)),
        lambda side: jr.sgd(0.3, 0.3, weight_decay=0.3, decay="l2"),
        50,
    ),
    Case(
        "momentum in tensorflow's form",
        named(lambda torch, p: torch.optim.SGD(p, 0.02, 0.9)),
        lambda side: jr.sgd(0.3, 0.3, form="tensorflow"),
        50,
    ),
    Case(
        "nesterov",
        named(lambda torch, p: torch.optim.SGD(p, 0.02, 0.9, nesterov=True)),
        lambda side: jr.sgd(0.3, 0.3, nesterov=True),
        50,
    ),
    Case(
        "dampening",
        named(lambda torch, p: torch.optim.SGD(p, 0.05, 0.8, dampening=0.5)),
        lambda side: jr.sgd(0.3, 0.3, dampening=0.3),
        50,
    ),
    Case("adam", named(lambda torch, p: torch.optim.Adam(p, 0.01)), lambda side: jr.adam(0.3)),
    Case(
        "adam with decay",
        named(lambda torch, p: torch.optim.Adam(p, 0.01, (0.8, 0.99), 1e-7, weight_decay=0.1)),
        lambda side: jr.adamw(0.3, weight_decay=0.3, decay="l2"),
    ),
    Case(
        "clip and adamw",
        named(lambda torch, p: torch.optim.AdamW(p, 0.01, weight_decay=0.1)),
        lambda side: jr.chain(jr.clip_grad(1e9), jr.adamw(0.3)),
    ),
    Case(
        "amsgrad",
        named(lambda torch, p: torch.optim.AdamW(p, 0.01, amsgrad=True)),
        lambda side: jr.amsgrad(0.3, maximum_of="uncorrected", weight_decay=0.3),
    ),
    Case(
        "adafactor",
        named(lambda torch, p: torch.optim.Adafactor(p, 0.03, weight_decay=0.1)),
        lambda side: jr.adafactor_pytorch(0.3, views=side.factored, weight_decay=0.3),
    ),
    Case(
        "adafactor of transformers",
        named(
            lambda torch, p: import_module("transformers.optimization").Adafactor(
                p, 0.01, beta1=0.9, relative_step=False, scale_parameter=False, weight_decay=0.1
            )
        ),
        lambda side: jr.adafactor(
            0.3,
            1,
            momentum=0.3,
            multiply_by_parameter_scale=False,
            views=side.factored,
            relative_step=False,
            weight_decay=0.3,
            decay="scaled",
        ),
    ),
    Case(
        "lion",
        named(lambda torch, p: import_module("lion_pytorch").Lion(p, 1e-3, weight_decay=0.1)),
        lambda side: jr.lion(0.3, weight_decay=0.3),
        50,
    ),
    Case("muon and adamw", muon_and_adamw, muon_here, inside=float64_muon),
]
BY_NAME = {case.name: case for case in CASES}
ADAMW, MOMENTUM, MUON = (BY_NAME[name] for name in ("clip and adamw", "momentum", "muon and adamw"))


class Snapshot(NamedTuple):
    model: dict[str, Any]
    optimizers: list[Any]


@cache
def run_there(case: Case, dtype: str = "float64") -> dict[int, Snapshot]:
    """What is there before, in the middle and at the end of 100 steps."""
    torch = import_module("torch")
    model = torch_model(dtype)
    optimizers = case.there(torch, model)
    snapshots = {}
    for stop in (0, 50, 100):
        train_there(model, optimizers, max(stop - 50, 0), stop, case.inside)
        states = [optimizer.state_dict() for optimizer in optimizers]
        snapshots[stop] = copy.deepcopy(Snapshot(model.state_dict(), states))
    return snapshots


def weights(snapshot: Snapshot, side: Side, dtype: Any = jnp.float64) -> Any:
    return load_model_state(snapshot.model, side.tree(dtype), side.layout, strict=False)


def distance(x: Any, y: Any) -> float:
    """The largest difference of two trees, relative to the size of each array."""
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    return max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)


def both_sides(case: Case) -> list[Any]:
    sides = {"flax": FLAX_SIDE} | ({"equinox": EQUINOX_SIDE} if "ada" in case.name else {})
    return [pytest.param(case, side, id=f"{case.name} - {name}") for name, side in sides.items()]


# ---------------------------------------------------------------------------------------------------------------------
# A run that moves
# ---------------------------------------------------------------------------------------------------------------------

BOUND = 1e-9  # asked for is 1e-5


@pytest.mark.parametrize(("case", "side"), [p for case in CASES for p in both_sides(case)])
def test_from_there_to_here(case, side):
    there = run_there(case)
    rule, params = case.here(side), weights(there[50], side)
    state = load_optimizer_state(there[50].optimizers, params, rule, side.layout, count=case.count)
    params, state = train_here(side, rule, params, state, 50, 100)
    expected = weights(there[100], side)
    assert distance(params, expected) < BOUND
    counts = [x for name, x in jr.state_dict(state).items() if name.endswith("count")]
    assert set(map(int, counts)) == {100}


@pytest.mark.parametrize("case", CASES[1:], ids=lambda case: case.name)
def test_without_the_state_it_is_another_run(case):
    """The same hyperparameters and weights, and slots that begin anew."""
    side, there = FLAX_SIDE, run_there(case)
    rule, params = case.here(side), weights(there[50], side)
    state = load_optimizer_state(there[50].optimizers, params, rule, side.layout, count=case.count)
    anew = jr.reset(rule, state, params)
    params, _ = train_here(side, rule, params, anew, 50, 100)
    assert distance(params, weights(there[100], side)) > 1e-3


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_from_here_to_there(torch, case):
    side, there = FLAX_SIDE, run_there(case)
    rule, params = case.here(side), weights(there[0], side)
    born = load_optimizer_state(there[0].optimizers, params, rule, side.layout, count=0)
    params, state = train_here(side, rule, params, born, 0, 50)
    model = torch_model()
    model.load_state_dict(model_state_dict(params, side.layout, like=model.state_dict()))
    optimizers = case.there(torch, model)
    for optimizer, saved in zip(
        optimizers, optimizer_state_dict(state, params, rule, side.layout, like=optimizers), strict=True
    ):
        optimizer.load_state_dict(saved)
    train_there(model, optimizers, 50, 100, case.inside)
    moved = load_model_state(model.state_dict(), params, side.layout, strict=False)
    assert distance(moved, weights(there[100], side)) < BOUND


def saved_of(case: Case, stop: int = 50) -> Any:
    """A state_dict that may be changed."""
    (saved,) = copy.deepcopy(run_there(case)[stop].optimizers)
    return saved


def test_a_saved_file(torch):
    file = io.BytesIO()
    torch.save(run_there(ADAMW)[50].optimizers[0], file)
    file.seek(0)
    params, rule = like_flax(), jr.adamw()
    state = load_optimizer_state(torch.load(file), params, rule, LAYOUT)
    np.testing.assert_array_equal(
        jr.state_dict(state)["adam.m.hidden/kernel"], saved_of(ADAMW)["state"][6]["exp_avg"].numpy().T
    )


def test_reading_needs_no_pytorch(monkeypatch):
    saved = jax.tree.map(lambda x: x.numpy() if hasattr(x, "numpy") else x, saved_of(ADAMW))
    expected = load_optimizer_state(saved_of(ADAMW), like_flax(), jr.adamw(), LAYOUT)
    monkeypatch.setitem(sys.modules, "torch", None)
    state = load_optimizer_state(saved, like_flax(), jr.adamw(), LAYOUT)
    assert distance(state[0].v, expected[0].v) == 0
    with pytest.raises(ImportError, match=re.escape('pip install "jaxopt_rules[torch]"')):
        optimizer_state_dict(state, like_flax(), jr.adamw(), LAYOUT, like=saved)


def test_there_and_back_is_the_same(torch):
    """Every number of the state_dict, and every entry of the param_groups."""
    for case in CASES:
        there, rule = run_there(case)[50], case.here(FLAX_SIDE)
        params = weights(there, FLAX_SIDE)
        state = load_optimizer_state(there.optimizers, params, rule, LAYOUT, count=case.count)
        back = optimizer_state_dict(state, params, rule, LAYOUT, like=run_there(case)[0].optimizers)
        for new, old in zip(back, there.optimizers, strict=True):
            assert new["param_groups"] == old["param_groups"]
            assert new["state"].keys() == old["state"].keys()
            for id_, memory in old["state"].items():
                assert new["state"][id_].keys() == memory.keys()
                for key in memory.keys() - {"RMS"}:
                    x, y = new["state"][id_][key], memory[key]
                    assert type(x) is type(y)
                    assert getattr(x, "dtype", None) == getattr(y, "dtype", None)
                    np.testing.assert_allclose(x, y, rtol=1e-14)
        model = model_state_dict(params, LAYOUT, like=there.model)
        assert all(torch.equal(model[name], x) for name, x in there.model.items())


@pytest.mark.parametrize("case", [ADAMW, MOMENTUM], ids=lambda case: case.name)
def test_float32(case):
    there = run_there(case, "float32")
    rule, params = case.here(FLAX_SIDE), weights(there[50], FLAX_SIDE, jnp.float32)
    state = load_optimizer_state(there[50].optimizers, params, rule, LAYOUT, count=case.count)
    params, _ = train_here(FLAX_SIDE, rule, params, state, 50, 100)
    # Moving is no more than what rounding to float32 makes of the run in PyTorch, and here.
    narrow, wide = weights(there[100], FLAX_SIDE), weights(run_there(case)[100], FLAX_SIDE)
    assert distance(params, narrow) < 2 * distance(narrow, wide) < 1e-3


def test_bfloat16_parameters(torch):
    """Slots of PyTorch are bfloat16 then, ours float32; they come back as they were."""
    there = run_there(ADAMW, "bfloat16")
    params = weights(there[50], FLAX_SIDE, jnp.bfloat16)
    state = load_optimizer_state(there[50].optimizers, params, jr.adamw(), LAYOUT)
    assert state[0].m["conv"]["kernel"].dtype == jnp.float32
    saved = there[50].optimizers[0]
    back = optimizer_state_dict(state, params, jr.adamw(), LAYOUT, like=saved)
    model = model_state_dict(params, LAYOUT)
    assert model["features.0.weight"].dtype == torch.bfloat16
    assert all(torch.equal(x, there[50].model[name]) for name, x in model.items())
    assert all(torch.equal(back["state"][k]["exp_avg"], x["exp_avg"]) for k, x in saved["state"].items())


# ---------------------------------------------------------------------------------------------------------------------
# Param_groups, schedules, wrappers
# ---------------------------------------------------------------------------------------------------------------------


def two_groups(first: dict[str, Any], second: dict[str, Any]) -> Case:
    """Arrays with two axes and more in one group, vectors in the other; names are not saved."""

    def make(torch: Any, model: Any) -> list[Any]:
        parameters = list(model.parameters())
        groups = [[p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim < 2]]
        return [torch.optim.AdamW([{"params": groups[0], **first}, {"params": groups[1], **second}])]

    return Case("groups", make, lambda side: jr.adamw())


def names_of_two_groups() -> list[str]:
    named = list(torch_model().named_parameters())
    return [name for name, p in named if p.ndim > 1] + [name for name, p in named if p.ndim < 2]


RATES = two_groups({"lr": 0.01, "betas": (0.8, 0.99)}, {"lr": 0.001})
DECAYS = two_groups({"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.01, "weight_decay": 0.0})
BY_NDIM = {"matrix": jr.by_ndim(least=2)}


@pytest.mark.parametrize(
    ("case", "rule"),
    [
        pytest.param(RATES, jr.partition({"matrix": jr.adamw(), "rest": jr.adamw()}, BY_NDIM), id="partition"),
        pytest.param(DECAYS, jr.chain(jr.clip_grad(1e9), jr.adamw(where=jr.by_ndim(least=2))), id="where"),
        pytest.param(
            RATES, jr.accumulate(jr.partition({"matrix": jr.adamw(), "rest": jr.adamw()}, BY_NDIM), 1), id="in a gate"
        ),
        pytest.param(DECAYS, jr.average(jr.adamw(where=jr.by_ndim(least=2)), 0.99), id="in an average"),
    ],
)
def test_param_groups(case, rule):
    there, names = run_there(case), names_of_two_groups()
    params = weights(there[50], FLAX_SIDE)
    state = load_optimizer_state(there[50].optimizers[0], params, rule, LAYOUT, names=names)
    back = optimizer_state_dict(state, params, rule, LAYOUT, like=there[50].optimizers[0], names=names)
    assert back["param_groups"] == there[50].optimizers[0]["param_groups"]
    params, _ = train_here(FLAX_SIDE, rule, params, state, 50, 100)
    assert distance(params, weights(there[100], FLAX_SIDE)) < BOUND


def test_a_schedule_goes_on(torch):
    model, decline = torch_model(), jr.Linear(0.02, 100, 0.0)
    optimizer = torch.optim.AdamW(model.named_parameters(), 0.02)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / 100)
    for i in range(100):
        if i == 50:
            params = load_model_state(model.state_dict(), like_flax(), LAYOUT, strict=False)
            rule = jr.adamw(decline)
            state = load_optimizer_state(optimizer.state_dict(), params, rule, LAYOUT)
            back = optimizer_state_dict(state, params, rule, LAYOUT, like=optimizer)
            assert back["param_groups"][0]["lr"] == pytest.approx(0.01, rel=1e-12)
            assert float(jr.hyperparams(state)["learning_rate"]) == pytest.approx(0.0102, rel=1e-12)
        train_there(model, [optimizer], i, i + 1)
        scheduler.step()
    params, _ = train_here(FLAX_SIDE, rule, params, state, 50, 100)
    there = load_model_state(model.state_dict(), params, LAYOUT, strict=False)
    assert distance(params, there) < BOUND


def test_hyperparameters_of_the_rule():
    rule = jr.adamw(0.3, 0.5, weight_decay=0.7)
    kept = load_optimizer_state(saved_of(ADAMW), like_flax(), rule, LAYOUT, hyperparams="new")
    assert float(jr.hyperparams(kept)["b1"]) == 0.5
    taken = load_optimizer_state(saved_of(ADAMW), like_flax(), rule, LAYOUT)
    shown = {name: float(x) for name, x in jr.hyperparams(taken).items()}
    assert shown == pytest.approx({"learning_rate": 0.01, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.1})
    back = optimizer_state_dict(kept, like_flax(), rule, LAYOUT, like=saved_of(ADAMW), hyperparams="new")
    assert back["param_groups"] == saved_of(ADAMW)["param_groups"]
    there = optimizer_state_dict(kept, like_flax(), rule, LAYOUT, like=saved_of(ADAMW))["param_groups"][0]
    assert (there["lr"], there["betas"], there["weight_decay"]) == (0.3, (0.5, 0.999), 0.7)


@pytest.mark.parametrize("start", [20, 50], ids=["before it moves", "when it moves"])
@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_a_group_that_began_later(torch, start, kind):
    """Each group has its own count, and the schedule that of the run; of Adafactor the rate is fixed."""
    make, group, decline = {
        "adamw": (torch.optim.AdamW, jr.adamw(jr.Linear(0.02, 100, 0.0)), 0.01),
        "adafactor": (
            torch.optim.Adafactor,
            jr.adafactor_pytorch(0.3, views=FLAX_SIDE.factored, weight_decay=0.3),
            0.0,
        ),
    }[kind]
    model = torch_model()
    optimizer = make(model.named_parameters(), 0.02)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - decline * i)

    def train(start: int, stop: int) -> None:
        for i in range(start, stop):
            train_there(model, [optimizer], i, i + 1)
            scheduler.step()

    model["head"].requires_grad_(False)
    train(0, start)
    model["head"].requires_grad_(True)
    train(start, 50)
    params = load_model_state(model.state_dict(), like_flax(), LAYOUT, strict=False)
    rule = jr.chain(jr.clip_grad(1e9), jr.partition({"head": group, "rest": group}, {"head": "head/*"}))
    state = load_optimizer_state(optimizer.state_dict(), params, rule, LAYOUT)
    back = optimizer_state_dict(state, params, rule, LAYOUT, like=optimizer)
    steps = {id_: float(memory["step"]) for id_, memory in optimizer.state_dict()["state"].items()}
    assert {id_: float(memory["step"]) for id_, memory in back["state"].items()} == steps
    assert len(set(steps.values())) == (2 if start < 50 else 1)
    params, _ = train_here(FLAX_SIDE, rule, params, state, 50, 100)
    train(50, 100)
    there = load_model_state(model.state_dict(), params, LAYOUT, strict=False)
    assert distance(params, there) < BOUND


def test_optimizers_that_did_not_begin_together(torch):
    """SGD does not save its count: that is the run's, and not smaller than what AdamW says."""
    model = torch_model()
    matrices = [(name, p) for name, p in model.named_parameters() if p.ndim > 1]
    vectors = [(name, p) for name, p in model.named_parameters() if p.ndim < 2]
    optimizers = [torch.optim.SGD(matrices, 0.01, 0.9), torch.optim.AdamW(vectors, 0.01)]
    train_there(model, optimizers[:1], 0, 3)
    train_there(model, optimizers, 3, 5)
    saved = [optimizer.state_dict() for optimizer in optimizers]
    rule = jr.partition({"matrix": jr.sgd(0.1, 0.9), "rest": jr.adamw(0.1)}, BY_NDIM)
    state = jr.state_dict(load_optimizer_state(saved, like_flax(), rule, LAYOUT, count=5))
    assert {name: int(x) for name, x in state.items() if name in ("matrix.velocity.count", "rest.adam.count")} == {
        "matrix.velocity.count": 5,
        "rest.adam.count": 2,
    }
    with pytest.raises(ValueError, match="count is 1, and the state_dict has finished 2 updates"):
        load_optimizer_state(saved, like_flax(), rule, LAYOUT, count=1)


def test_a_parameter_that_never_had_a_gradient(torch):
    model = torch_model()
    model["embed"].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.named_parameters(), 0.01)
    train_there(model, [optimizer], 0, 3)
    params = load_model_state(model.state_dict(), like_flax(), LAYOUT, strict=False)
    state = load_optimizer_state(optimizer.state_dict(), params, jr.adamw(), LAYOUT)
    assert not jnp.any(state[0].m["embed"]["embedding"])
    assert jnp.any(state[0].m["head"]["bias"])
    # Given to no optimizer, it is frozen here.
    others = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(others, 0.01)
    for frozen in (jr.freeze(jr.adamw(), "embed/**"), jr.chain(jr.clip_grad(1.0), jr.freeze(jr.adamw(), "embed/**"))):
        state = load_optimizer_state(optimizer.state_dict(), params, frozen, LAYOUT)
        assert jr.find(state, AdamState).m["embed"]["embedding"] is None


# ---------------------------------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------------------------------


def tensors(params: Any) -> dict[str, Any]:
    return {name: x.numpy() for name, x in params.items()}


def test_layers_of_nnx(torch):
    """They give the same numbers, transposed convolutions and heads of attention too."""
    nnx = pytest.importorskip("flax.nnx")
    nn, rngs = torch.nn, nnx.Rngs(0)
    torch.manual_seed(0)
    there = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 4),
            "conv1": nn.Conv1d(4, 3, 2),
            "conv3": nn.Conv3d(4, 3, (1, 2, 3)),
            "up": nn.ConvTranspose2d(4, 3, (2, 3), stride=2),
            "turned": nn.ConvTranspose2d(4, 3, (2, 3), stride=2),
            "heads": nn.Linear(4, 6),
            "out": nn.Linear(6, 4),
            "flat": nn.Linear(2 * 3 * 4, 4),
        }
    ).double()
    double = {"param_dtype": jnp.float64, "dtype": jnp.float64, "rngs": rngs}
    up = partial(nnx.ConvTranspose, 4, 3, (2, 3), strides=2, padding="VALID", **double)
    here = nnx.Dict(
        linear=nnx.Linear(4, 4, **double),
        conv1=nnx.Conv(4, 3, (2,), padding="VALID", **double),
        conv3=nnx.Conv(4, 3, (1, 2, 3), padding="VALID", **double),
        up=up(transpose_kernel=True),
        turned=up(),
        heads=nnx.LinearGeneral(4, (3, 2), **double),
        out=nnx.LinearGeneral((3, 2), 4, axis=(-2, -1), **double),
        flat=nnx.Linear(2 * 3 * 4, 4, **double),
    )
    layout = FLAX.also(
        axes={
            "turned/kernel": Axes((2, 3, 0, 1), flip=(0, 1)),
            "heads/kernel": Axes((2, 0, 1), split={0: (3, 2)}),
            "heads/bias": Axes((0, 1), split={0: (3, 2)}),
            "out/kernel": Axes((1, 2, 0), split={1: (3, 2)}),
            "flat/kernel": Axes((2, 3, 1, 0), split={1: (4, 2, 3)}),
        }
    )
    state = nnx.state(here, nnx.Param)
    nnx.update(here, load_model_state(there.state_dict(), state, layout))
    inputs = {
        "linear": (2, 4),
        "conv1": (2, 5, 4),
        "conv3": (2, 3, 4, 5, 4),
        "up": (2, 3, 4, 4),
        "turned": (2, 3, 4, 4),
    }
    for name, shape in inputs.items():
        x = np.random.default_rng(0).normal(size=shape)
        theirs = there[name](torch.tensor(np.moveaxis(x, -1, 1) if len(shape) > 2 else x)).detach().numpy()
        ours = here[name](jnp.asarray(x))
        np.testing.assert_allclose(ours, np.moveaxis(theirs, 1, -1) if len(shape) > 2 else theirs, atol=1e-12)
    x = np.random.default_rng(0).normal(size=(5, 4))
    heads = there["heads"](torch.tensor(x))
    np.testing.assert_allclose(here["heads"](x), heads.detach().numpy().reshape(5, 3, 2), atol=1e-12)
    np.testing.assert_allclose(here["out"](here["heads"](x)), there["out"](heads).detach().numpy(), atol=1e-12)
    picture = np.random.default_rng(0).normal(size=(5, 4, 2, 3))
    flat = there["flat"](torch.tensor(picture).flatten(1)).detach().numpy()
    np.testing.assert_allclose(here["flat"](np.moveaxis(picture, 1, -1).reshape(5, -1)), flat, atol=1e-12)
    back = model_state_dict(nnx.state(here, nnx.Param), layout, like=there.state_dict())
    assert all(torch.equal(back[name], x) for name, x in there.state_dict().items())


class Equinox(NamedTuple):
    """Layers as they are made by default, in PyTorch and in Equinox."""

    there: Any
    here: Any
    layout: Layout


@pytest.fixture
def equinox(torch) -> Equinox:
    eqx, nn = pytest.importorskip("equinox").nn, torch.nn
    torch.manual_seed(0)
    there = nn.ModuleDict(
        {
            "conv1": nn.Conv1d(3, 4, 2),
            "conv2": nn.Conv2d(3, 4, 2),
            "conv3": nn.Conv3d(3, 1, 2),
            "up": nn.ConvTranspose2d(3, 4, (2, 3), stride=2),
            "linear": nn.Linear(3, 4),
            "norm": nn.LayerNorm((3, 2)),
            "group": nn.GroupNorm(3, 3),
        }
    ).double()
    make = {"dtype": jnp.float64, "key": jax.random.key(0)}
    here = {
        "conv1": eqx.Conv1d(3, 4, 2, **make),
        "conv2": eqx.Conv2d(3, 4, 2, **make),
        "conv3": eqx.Conv3d(3, 1, 2, **make),
        "up": eqx.ConvTranspose2d(3, 4, (2, 3), stride=2, **make),
        "linear": eqx.Linear(3, 4, **make),
        "norm": eqx.LayerNorm((3, 2), dtype=jnp.float64),
        "group": eqx.GroupNorm(3, 3, dtype=jnp.float64),
    }
    return Equinox(there, here, EQUINOX.also(axes={"up/weight": Axes((1, 0, 2, 3), flip=(2, 3))}))


def test_layers_of_equinox(torch, equinox):
    there, layout = equinox.there, equinox.layout
    here = load_model_state(there.state_dict(), equinox.here, layout)
    shapes = {"conv1": (3, 5), "conv2": (3, 5, 4), "conv3": (3, 2, 3, 4), "up": (3, 2, 3), "linear": (3,)}
    for name, shape in (shapes | {"norm": (3, 2), "group": (3, 4)}).items():
        x = np.random.default_rng(0).normal(size=shape)
        expected = there[name](torch.tensor(x[None])).detach().numpy()[0]
        np.testing.assert_allclose(here[name](jnp.asarray(x)), expected, atol=1e-12)
    back = model_state_dict(here, layout, like=there.state_dict())
    assert all(torch.equal(back[name], x) for name, x in there.state_dict().items())
    alone = model_state_dict(here, layout)
    assert {name: x.shape for name, x in alone.items()} == {name: x.shape for name, x in back.items()}


@pytest.mark.parametrize(
    ("make", "rule", "count"),
    [
        pytest.param(lambda torch, p: torch.optim.AdamW(p, 0.01), jr.adamw(), None, id="adamw"),
        pytest.param(lambda torch, p: torch.optim.SGD(p, 0.02, 0.9), jr.sgd(0.3, 0.3), 3, id="momentum"),
        pytest.param(
            lambda torch, p: torch.optim.Adafactor(p, 0.03),
            jr.adafactor_pytorch(
                0.3,
                views=[
                    (jr.excluding("conv*/bias", "up/*", jr.by_ndim(1)), jr.MatrixView(rows=-1, columns=-2)),
                    ("up/weight", jr.MatrixView(rows=-2, columns=-1)),
                ],
                weight_decay=0.3,
            ),
            None,
            id="adafactor",
        ),
    ],
)
def test_optimizers_of_equinox(torch, equinox, make, rule, count):
    """3 steps there and 3 here, and these 3 there again, where every parameter has the gradient sin θ."""
    there, layout = equinox.there, equinox.layout
    optimizer = make(torch, there.named_parameters())

    def train_there(optimizer):
        for _ in range(3):
            for p in there.parameters():
                p.grad = torch.sin(p.detach())
            optimizer.step()

    train_there(optimizer)
    saved, model = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(there.state_dict())
    params = load_model_state(model, equinox.here, layout)
    state = load_optimizer_state(saved, params, rule, layout, count=count)
    anew = make(torch, there.named_parameters())
    anew.load_state_dict(optimizer_state_dict(state, params, rule, layout, like=anew))
    for _ in range(3):
        grads = jax.tree.map(lambda p: jnp.sin(p) if isinstance(p, jax.Array) else p, params)
        params, state = rule.apply(grads, state, params)
    train_there(optimizer)
    assert distance(params, load_model_state(there.state_dict(), params, layout)) < BOUND
    there.load_state_dict(model)
    train_there(anew)
    assert distance(params, load_model_state(there.state_dict(), params, layout)) < BOUND


def test_a_bias_that_is_factored(torch, equinox):
    optimizer = torch.optim.Adafactor(equinox.there.named_parameters())
    for p in equinox.there.parameters():
        p.grad = torch.sin(p.detach())
    optimizer.step()
    with pytest.raises(ValueError, match=r"'conv1.bias' has variance, not .* views=\[\(excluding\('conv1/bias'\)"):
        load_optimizer_state(optimizer.state_dict(), equinox.here, jr.adafactor_pytorch(), equinox.layout)


@pytest.mark.parametrize(
    ("axes", "theirs", "ours"),
    [
        pytest.param(Axes((0, 1, 2), split={0: (-1, 1, 1)}), (4,), (4, 1, 1), id="bias of a convolution"),
        pytest.param(Axes((0, 1), split={0: (-1, 1)}), (1,), (1, 1), id="of one channel"),
        pytest.param(Axes((0, 1), split={0: (-1, 1)}), (0,), (0, 1), id="of none"),
        pytest.param(Axes((2, 0, 1), split={0: (2, -1)}), (6, 5), (5, 2, 3), id="heads"),
        pytest.param(Axes((2, 3, 1, 0), split={1: (4, 2, 3)}), (5, 24), (24, 5), id="flattened"),
        pytest.param(Axes((0,), split={0: (1,)}), (1,), (), id="a number"),
    ],
)
def test_axes_there_and_back(axes, theirs, ours):
    x = np.arange(np.prod(theirs, dtype=int)).reshape(theirs)
    here = axes.to_ours(x, ours)
    assert here.shape == ours
    np.testing.assert_array_equal(axes.to_theirs(here), x)


def test_axes_that_do_not_fit():
    heads = Axes((2, 0, 1), split={0: (2, 3)})
    with pytest.raises(ValueError, match=r"gives shape \(5, 2, 3\), which does not fit \(5, 3, 2\)"):
        heads.to_ours(np.zeros((6, 5)), (5, 3, 2))
    with pytest.raises(ValueError, match=r"splits axis 0 into \(2, 3\), and its size is 8"):
        heads.to_ours(np.zeros((8, 5)), (5, 2, 3))
    with pytest.raises(ValueError, match=r"fits shape \(5, 3, 2\) in no way"):
        heads.to_theirs(np.zeros((5, 3, 2)))
    with pytest.raises(ValueError, match=r"fits shape \(24, 4\) in more than one way: give all sizes of the split"):
        Axes((2, 3, 1, 0), split={1: (4, 2, -1)}).to_theirs(np.zeros((24, 4)))
    with pytest.raises(ValueError, match=r"'head/kernel' has shape \(6, 2\) here, which the layout does not move"):
        model_state_dict(like_flax(), LAYOUT.also(axes={"head/kernel": (1, 0, 2)}))


def test_names():
    assert FLAX.names_of(["blocks/0/norm/scale", "embed/embedding"]) == ["blocks.0.norm.weight", "embed.weight"]
    layout = FLAX.also(names={"params": "", "params/head": "classifier", "params/x/kernel": "y"})
    paths = ["params/head/kernel", "params/a/bias", "params/x/kernel"]
    assert layout.names_of(paths) == ["classifier.weight", "a.bias", "y"]
    assert layout.names_of([paths[0], paths[2]]) == ["classifier.weight", "y"]
    assert Layout(names=lambda path: path.upper()).names_of(["a/b"]) == ["A/B"]


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "rule", "says"),
    [
        (ADAMW, jr.rmsprop(0.1), "'features.1.bias' has exp_avg, exp_avg_sq, and rmsprop.* no place for exp_avg, exp"),
        (
            ADAMW,
            jr.sgd(0.1, 0.9),
            r"no place for exp_avg, exp_avg_sq; the counterpart .* is adamw\(..., weight_decay=0.1\)",
        ),
        (ADAMW, jr.adam(), "weight_decay=0.1 .* and adam.* has no weight_decay that acts on 'batch_norm/bias'; its"),
        (ADAMW, jr.adamw(decay="l2"), 'weight_decay=0.1 .* is "decoupled" .* and that of adamw.* is "l2"'),
        (ADAMW, jr.adamw(where="**/kernel"), "has no weight_decay that acts on 'batch_norm/bias'"),
        (ADAMW, jr.adamw(bias_correction="step"), 'has bias_correction "moments"'),
        (ADAMW, jr.adamw(eps_placement="inside"), 'eps in the place "outside"'),
        (ADAMW, jr.amsgrad(maximum_of="uncorrected"), "no place for exp_avg"),
        (BY_NAME["adam with decay"], jr.adamw(), 'is "l2" .* decay="l2"'),
        (BY_NAME["amsgrad"], jr.adamw(), "no place for exp_avg, exp_avg_sq, max_exp_avg_sq; .* is amsgrad"),
        (BY_NAME["amsgrad"], jr.amsgrad(weight_decay=0.1), "the largest of the uncorrected"),
        (BY_NAME["nesterov"], jr.sgd(0.1, 0.9), "has nesterov=True .* nesterov=False"),
        (BY_NAME["nesterov"], jr.sgd(0.1), "no place for momentum_buffer"),
        (BY_NAME["dampening"], jr.sgd(0.1, 0.9), "has dampening=0.5"),
        (BY_NAME["dampening"], jr.sgd(0.1, 0.9, form="ema"), 'form="ema"'),
        (BY_NAME["adafactor"], jr.adafactor_pytorch(), "'features.0.weight' has row_var of shape .*MatrixView"),
        (BY_NAME["adafactor"], jr.adafactor(), 'eps in the place "max"'),
        (
            BY_NAME["adam with decay"],
            jr.chain(jr.weight_decay(0.1), jr.adamw(decay="l2")),
            "has weight_decay twice for 'batch_norm/bias'",
        ),
        (BY_NAME["lion"], jr.signum(0.1, 0.9), "no place for exp_avg"),
        (RATES, jr.adamw(), "b1 is 0.9 of 'batch_norm/bias' .* and 0.8 of 'conv/kernel' .* partition"),
    ],
)
def test_another_rule(case, rule, says):
    names = names_of_two_groups() if case is RATES else None
    with pytest.raises(ValueError, match=f"(?s){says}"):
        load_optimizer_state(saved_of(case), like_flax(), rule, LAYOUT, count=case.count, names=names)


def test_a_rule_of_another_library():
    optax = pytest.importorskip("optax")
    with pytest.raises(ValueError, match="no place for exp_avg, exp_avg_sq"):
        load_optimizer_state(saved_of(ADAMW), like_flax(), optax.adamw(0.1), LAYOUT)


def test_slots_of_another_rule():
    rule = jr.sgd(0.1)
    _, state = rule.update(like_flax(), rule.init(like_flax()))
    with pytest.raises(ValueError, match=r"nothing of what torch.optim.Adam or AdamW keeps for 'features.1.bias'"):
        optimizer_state_dict(state, like_flax(), rule, LAYOUT, like=saved_of(ADAMW), hyperparams="new")


def test_a_state_of_another_rule():
    state = jr.sgd(0.1).init(like_flax())
    with pytest.raises(ValueError, match=r"not one of adamw\(\): there is no AdamState in it"):
        optimizer_state_dict(state, like_flax(), jr.adamw(), LAYOUT, like=saved_of(ADAMW))


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (jr.sgd(0.1), "wants b1, b2, eps for 'features.1.bias', which sgd"),
        (jr.adam_direction(), "wants learning_rate for 'features.1.bias', which adam_direction"),
        (jr.adamw(decay="l2"), 'that of adamw.* is "l2"'),
    ],
)
def test_another_rule_on_the_way_back(rule, says):
    _, state = rule.update(like_flax(), rule.init(like_flax()), like_flax())
    with pytest.raises(ValueError, match=says):
        optimizer_state_dict(state, like_flax(), rule, LAYOUT, like=saved_of(ADAMW))


def changed(**entries: Any) -> Any:
    """The state_dict of AdamW with other entries in its param_group."""
    saved = saved_of(ADAMW)
    saved["param_groups"][0] |= entries
    return saved


def nameless() -> Any:
    saved = saved_of(ADAMW)
    del saved["param_groups"][0]["param_names"]
    return saved


def with_another_step() -> Any:
    saved = saved_of(ADAMW)
    saved["state"][1]["step"] = saved["state"][1]["step"] - 7
    return saved


@pytest.mark.parametrize(
    ("saved", "keywords", "says"),
    [
        (lambda: changed(maximize=True), {}, "maximize=True; negate the loss"),
        (lambda: changed(caution=True), {}, "caution=True; the counterpart of timm's"),
        (lambda: changed(amsgrad=True), {}, "no place for exp_avg, exp_avg_sq; .* is amsgrad"),
        (nameless, {}, r"names=\[name for name, _ in model.named_parameters\(\)\]"),
        (nameless, {"names": ["a", "b"]}, "names has 2 names, and the optimizer has 10 parameters"),
        (nameless, {"names": ["head.bias"] * 10}, "two parameters of the optimizers are named 'head.bias'"),
        (lambda: [nameless()] * 2, {"names": ["a"]}, "names are 1 lists, and there are 2 optimizers"),
        (lambda: [saved_of(ADAMW)] * 2, {}, "two parameters of the optimizers are named 'embed.weight'"),
        (lambda: saved_of(ADAMW), {"count": 3}, "count is 3, and the state_dict has finished 50 updates"),
        (lambda: saved_of(ADAMW), {"hyperparams": "old"}, "hyperparams is 'saved' or 'new', not 'old'"),
        (with_another_step, {}, r"'features.0.weight' had 43, the others 50; make them groups.* partition\("),
        (lambda: {"state": {}}, {}, r"optimizer.state_dict\(\)"),
        (
            lambda: {"state": {}, "param_groups": [{"lr": 0.1, "rho": 0.9, "params": []}]},
            {},
            "lr, rho, which is none of",
        ),
    ],
)
def test_a_state_dict_that_does_not_fit(saved, keywords, says):
    with pytest.raises(ValueError, match=says):
        load_optimizer_state(saved(), like_flax(), jr.adamw(), LAYOUT, **keywords)


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda model, like: load_model_state(model, like), "load_model_state takes module.state_dict(), not a Linear"),
        (lambda model, like: load_model_state(None, like), "load_model_state takes module.state_dict(), not None"),
        (
            lambda model, like: model_state_dict(like, like=model),
            "model_state_dict takes like=module.state_dict(), not a Linear",
        ),
        (
            lambda model, like: load_optimizer_state(optimizer_of(model), like, jr.adamw()),
            "load_optimizer_state takes optimizer.state_dict(), not an AdamW",
        ),
        (
            lambda model, like: load_optimizer_state([optimizer_of(model)], like, jr.adamw()),
            "load_optimizer_state takes optimizer.state_dict(), not an AdamW",
        ),
        (
            lambda model, like: optimizer_state_dict(jr.adamw().init(like), like, jr.adamw(), like=None),
            "optimizer_state_dict takes like=optimizer, or its state_dict(), not None",
        ),
    ],
)
def test_what_is_no_state_dict(torch, use, says):
    model = torch.nn.Linear(3, 2)
    with pytest.raises(TypeError, match=f"^{re.escape(says)}$"):
        use(model, {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)})


def optimizer_of(model: Any) -> Any:
    return import_module("torch").optim.AdamW(model.named_parameters())


def test_a_clock_that_is_not_saved():
    with pytest.raises(
        ValueError, match=r"torch.optim.SGD does not save how many updates were finished; say it: count="
    ):
        load_optimizer_state(saved_of(MOMENTUM), like_flax(), jr.sgd(0.1, 0.9), LAYOUT)
    with pytest.raises(ValueError, match="count is a number of finished updates, not -1"):
        load_optimizer_state(saved_of(MOMENTUM), like_flax(), jr.sgd(0.1, 0.9), LAYOUT, count=-1)


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        (
            SAME.also(names=NAMES),
            "'batch_norm/scale' is 'features.1.scale' in PyTorch, which is not in .* and 5 more are not",
        ),
        (
            Layout(names=NAMES, ends=FLAX.ends),
            r"'features.0.weight' has shape \(6, 4, 3, 2\) in PyTorch; of 'conv/kernel'",
        ),
        (
            LAYOUT.also(axes={"head/kernel": (0, 1)}),
            r"\(2, 6\) in PyTorch, moved by Axes\(.*of 'head/kernel' it has shape",
        ),
        (LAYOUT.also(axes={"head/kernel": (1, 0, 2)}), "'head.weight' has shape"),
        (Layout(names=NAMES, ends=FLAX.ends), r"also\(axes={'conv/kernel': \(2, 3, 1, 0\)}\)"),
        (LAYOUT.also(names={"tail": "head"}), "names has 'tail', with which no path begins"),
        (LAYOUT.also(names={"head": "hidden"}), "both 'head/bias' and 'hidden/bias' are named 'hidden.bias'"),
        (LAYOUT.also(axes={"*/weights": (1, 0)}), r"\*/weights' matches none of"),
    ],
)
def test_a_layout_that_does_not_fit(layout, says):
    there = run_there(ADAMW)[50]
    with pytest.raises(ValueError, match=says):
        load_model_state(there.model, like_flax(), layout, strict=False)


def test_a_bias_that_has_more_axes_there_too():
    saved, params = {"norm.bias": np.ones((4, 1))}, {"norm": {"bias": jnp.zeros((4, 1))}}
    with pytest.raises(ValueError, match=r"also\(axes={'norm/bias': \(0, 1\)}\)"):
        load_model_state(saved, params, EQUINOX)
    assert load_model_state(saved, params, EQUINOX.also(axes={"norm/bias": (0, 1)}))["norm"]["bias"].shape == (4, 1)
    with pytest.raises(ValueError, match=r"also\(axes={'bias': Axes\(\(0, 1, 2\), split={0: \(-1, 1, 1\)}\)}\)"):
        load_model_state({"bias": np.ones(4)}, {"bias": jnp.zeros((4, 1, 1))}, SAME)


def test_what_is_left_over():
    with pytest.raises(ValueError, match=r"nothing here takes 'features.1.running_mean', 'features.1.running_var' of"):
        load_model_state(run_there(ADAMW)[50].model, like_flax(), LAYOUT)
    without_head = {name: x for name, x in like_flax().items() if name != "head"}
    with pytest.raises(ValueError, match=r"the optimizer has 'head\.weight', 'head\.bias', and no"):
        load_optimizer_state(saved_of(ADAMW), without_head, jr.adamw(), LAYOUT)
    with pytest.raises(ValueError, match=r"'more', 'more', is in none of PyTorch's param_groups.*freeze"):
        load_optimizer_state(saved_of(ADAMW), like_flax() | {"more": jnp.zeros(2)}, jr.adamw(), LAYOUT)
    model = run_there(ADAMW)[50].model
    with pytest.raises(ValueError, match=r"'head/kernel' has shape \(6, 2\) in PyTorch's layout, and 'head.weight' in"):
        model_state_dict(like_flax(), LAYOUT.also(axes={"head/kernel": (0, 1)}), like=model)


def test_the_way_back_of_groups_that_are_one_there():
    rule = jr.partition({"matrix": jr.adamw(0.1), "rest": jr.adamw(0.2)}, BY_NDIM)
    with pytest.raises(
        ValueError, match=r"learning_rate is 0.2 of 'batch_norm/bias' .* and 0.1 of 'conv/kernel' .* one"
    ):
        optimizer_state_dict(rule.init(like_flax()), like_flax(), rule, LAYOUT, like=saved_of(ADAMW))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Axes((1, 2)), "order names each axis there once"),
        (lambda: Axes((1, 0), flip=(2,)), "flip names axes here, from 0 to 1"),
        (lambda: Axes((1, 0), split={1: (2, 3)}), "makes 2 axes, those of order, of 1 there, and names another"),
        (lambda: Axes((2, 1, 0), split={0: (-1, -1)}), "of which one may be -1"),
        (lambda: Axes((1, 0), split={0: (-2, 3)}), "of which one may be -1"),
        (lambda: Layout(names=3), "names is a dict"),
        (lambda: Layout(axes={3: (1, 0)}), "Layout: axes takes a pattern"),
        (lambda: FLAX.also(names={"a": "b"}).also(names=str.upper), "do not go together"),
    ],
)
def test_what_is_no_layout(make, says):
    with pytest.raises((TypeError, ValueError), match=says):
        make()
