"""README's tables "Coming from Optax or PyTorch", as they are written: both cells of each row are evaluated and run.

Each side has the names of its library, and what stands for a number is bound to one. What a cell is, is seen by what it
evaluates to: a rule is run on gradients of many magnitudes, a schedule at every count, and all else is compared as it
is. In 64-bit mode; needs the dependency group `oracles`.
"""

import inspect
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_rules as jr
from jaxopt_rules.conformance.matrices import inside, torch_float64
from jaxopt_rules.conformance.pairs import Pair, Problem, by_gradients, optax_transform, run, torch_optimizer
from jaxopt_rules.rule import definition_of

pytestmark = [pytest.mark.oracle, pytest.mark.x64]

README = (Path(__file__).parent.parent / "README.md").read_text()
SECTION = README.partition("\n## Coming from Optax or PyTorch\n")[2].partition("\n## ")[0]
FROM_OPTAX, FROM_PYTORCH = (
    SECTION.partition(f"\n### {name}\n")[2].partition("\n### ")[0] for name in ("Optax", "PyTorch")
)

BOUND = 1e-11
# What the other side does not compute in float64: t^(−c) of Optax's Adafactor, the mean of its `MultiSteps`, the
# warm-up of its schedule-free rules, the product of PyTorch's NAdam. And Optax has no 1e-6 beside a norm that it clips.
LOOSE = r"adafactor|factored_rms|MultiSteps|schedule_free|NAdam|clip_by_global_norm"
LOOSE_BOUND = 1e-6
SHAPES = {"kernel": (6, 4), "bias": (4,), "scale": ()}
PROBLEM = Problem(SHAPES, steps=20)
T = 30  # updates of a schedule that are compared
LOSS = 900.0


def _paragraph(section: str, opening: str) -> str:
    (found,) = re.findall(rf"^\*\*{opening}\*\*.*?(?=\n\n|\Z)", section, re.MULTILINE | re.DOTALL)
    return found


def _spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def _rows(section: str) -> list[tuple[str, str]]:
    return re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|.*\|$", section, re.MULTILINE)


OPTAX_ROWS = _rows(FROM_OPTAX) + [(cell, cell) for cell in _spans(_paragraph(FROM_OPTAX, "The same"))]
PYTORCH_ROWS = _rows(FROM_PYTORCH)

NUMBERS = {
    **{"α": 0.05, "b1": 0.8, "b2": 0.99, "b3": 0.95, "ε": 1e-6, "λ": 0.1, "μ": 0.85, "ρ": 0.7, "γ": 0.9, "c": 0.3},
    **{"k": 3, "w": 5, "n": 12, "T": T},
    "f": lambda count: 0.5 / (1 + count),
    "jax": jax,
}


def _kernels(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim == 2, params)


def _labels(params: Any) -> Any:
    return jax.tree.map(lambda p: "matrix" if p.ndim == 2 else "rest", params)


TREES = {name: {"w": jnp.arange(3.0) + i} for i, name in enumerate(("new", "old"))}


def here(cell: str) -> Any:
    return eval(cell, vars(jr) | NUMBERS | TREES)


def in_optax(cell: str) -> Any:
    optax = pytest.importorskip("optax")
    contrib = pytest.importorskip("optax.contrib")
    parameters = {"mask": _kernels, "labels": _labels, "θ": PROBLEM.start()}
    return eval(cell, vars(optax) | NUMBERS | TREES | parameters | {"contrib": contrib})


def in_pytorch(cell: str, parameters: list[Any]) -> Any:
    """The value of a cell, which may change the gradients of the parameters in place."""
    torch = pytest.importorskip("torch")
    names = vars(torch.optim) | vars(torch.optim.lr_scheduler) | vars(torch.nn.utils)
    groups = dict(zip(SHAPES, parameters, strict=True))
    others = [p for p in parameters if p.ndim != 2]
    opt = torch.optim.SGD(parameters, NUMBERS["α"])
    return eval(cell, names | NUMBERS | groups | {"θ": parameters, "others": others, "opt": opt})


def same_steps(ours: str, theirs: str, oracle: str, stepper: Any) -> None:
    bound = LOOSE_BOUND if re.search(LOOSE, theirs) else BOUND
    outcome = run(Pair(ours, lambda: here(ours), oracle, stepper, theirs, bound, PROBLEM, _with_loss))
    assert outcome.passed, f"{outcome.difference:.1e} exceeds {bound:.1e}"


def _with_loss(rule: jr.Rule) -> Any:
    return by_gradients(rule, value=LOSS)


def same_schedule(ours: str, theirs: Any) -> None:
    schedule = here(ours)
    np.testing.assert_allclose([schedule(count) for count in range(T)], theirs, rtol=1e-6, atol=1e-12)


def _to_an_end(cell: str, rule: Any) -> str:
    """The cell of a rule that gives updates: what gives gradients or directions stands in front of `sgd`."""
    return cell if definition_of(rule).gives_updates else f"chain({cell}, sgd(α))"


@pytest.mark.parametrize(("theirs", "ours"), OPTAX_ROWS)
def test_row_of_optax(theirs: str, ours: str):
    value, our_value = in_optax(theirs), here(ours)
    if hasattr(value, "init"):
        cell = _to_an_end(theirs, our_value)
        stepper = optax_transform(lambda optax: optax.with_extra_args_support(in_optax(cell)), value=LOSS)
        same_steps(_to_an_end(ours, our_value), theirs, "optax", stepper)
    elif callable(value):
        same_schedule(ours, [value(count) for count in jnp.arange(T)])
    else:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), our_value, value)


def _fresh(torch: Any) -> list[Any]:
    return [torch.nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in SHAPES.values()]


def _rates(torch: Any, scheduler: Any) -> list[float]:
    """The learning rates of the first updates."""
    optimizer, used = scheduler.optimizer, []
    for _ in range(T):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


def _rates_by_loss(torch: Any, scheduler: Any) -> list[float]:
    """The learning rates behind each call, with a loss that falls no more."""
    used = []
    for _ in range(T):
        scheduler.step(LOSS)
        used.append(scheduler.optimizer.param_groups[0]["lr"])
    return used


def _multiples(rule: jr.Rule) -> list[float]:
    """How large its updates are where gradients are 1."""
    state, used = rule.init(jnp.ones(())), []
    for _ in range(T):
        update, state = rule.update(jnp.ones(()), state, jnp.ones(()), value=LOSS)
        used.append(-float(update))
    return used


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step\\(\\)` before:UserWarning")
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step\\(\\)`:UserWarning")
@pytest.mark.parametrize(("theirs", "ours"), PYTORCH_ROWS)
def test_row_of_pytorch(theirs: str, ours: str):
    torch = pytest.importorskip("torch")
    parameters = _fresh(torch)
    for p in parameters:
        p.grad = torch.ones_like(p)
    value = in_pytorch(theirs, parameters)
    if isinstance(value, torch.optim.lr_scheduler.ReduceLROnPlateau):
        np.testing.assert_allclose(_multiples(here(f"chain(sgd(α), {ours})")), _rates_by_loss(torch, value))
    elif isinstance(value, torch.optim.lr_scheduler.LRScheduler):
        same_schedule(ours, _rates(torch, value))
    elif isinstance(value, torch.optim.Optimizer):
        stepper = torch_optimizer(lambda torch, parameters: in_pytorch(theirs, parameters))
        same_steps(ours, theirs, "torch", inside(torch_float64, stepper))  # Muon alone has another type inside
    else:
        stepper = torch_optimizer(
            lambda torch, parameters: torch.optim.SGD(parameters, NUMBERS["α"]),
            before=lambda torch, parameters: in_pytorch(theirs, parameters),
        )
        same_steps(f"chain({ours}, sgd(α))", theirs, "torch", stepper)


def test_there_are_rows():
    assert len(OPTAX_ROWS) > 90
    assert len(PYTORCH_ROWS) > 35


# Those that README has a row or a sentence for.
OTHER_DEFAULTS = {
    ("adamw", "weight_decay"),
    ("lion", "weight_decay"),
    ("rmsprop", "decay"),
    ("adadelta", "learning_rate"),
}


@pytest.mark.parametrize(
    "name", sorted({cell.partition("(")[0] for cell in _spans(_paragraph(FROM_OPTAX, "The same"))})
)
def test_the_same_defaults(name: str):
    optax = pytest.importorskip("optax")
    theirs, ours = (inspect.signature(getattr(library, name)).parameters for library in (optax, jr))
    shared = {
        keyword: (parameter.default, ours[keyword].default)
        for keyword, parameter in theirs.items()
        if keyword in ours and (name, keyword) not in OTHER_DEFAULTS and parameter.default is not parameter.empty
    }
    # No decay is `None` or 0.
    assert {keyword: default for keyword, (default, other) in shared.items() if (default or 0) != (other or 0)} == {}


# Every name

NO_RULE = (
    r"State$|Fn$|^Wrapped|^Lookahead|^ShouldSkip|^InjectS|DimensionNumbers$|^ApplyEvery$|^ConditionFn$"
    r"|^GradientTransformation|^MaskedNode$|^StatefulSchedule$|_init_|^safe_|^update_|^Zoom|^init_|^with_"
)


def names_of(*modules: Any, within: str) -> set[str]:
    """The functions and classes that `modules` export, of those made in modules whose names match `within`."""
    found = {
        name
        for module in modules
        for name, value in vars(module).items()
        if (inspect.isfunction(value) or inspect.isclass(value))
        and not name.startswith("_")
        and re.search(within, value.__module__)
    }
    return {name for name in found if not re.search(NO_RULE, name)}


def assert_all_named(names: set[str], section: str) -> None:
    assert len(names) > 30
    missing = sorted(name for name in names if not re.search(rf"\b{name}\b", section))
    assert not missing, f"README says nothing of {', '.join(missing)}"


def test_every_rule_of_optax_is_named():
    optax = pytest.importorskip("optax")
    contrib = pytest.importorskip("optax.contrib")
    rules = r"^optax\._src\.(alias|transform|lookahead|linesearch|update)$|^optax\.(transforms|schedules|contrib)\b"
    assert_all_named(names_of(optax, optax.schedules, contrib, within=rules), FROM_OPTAX)


def test_every_optimizer_and_scheduler_of_pytorch_is_named():
    torch = pytest.importorskip("torch")
    modules = (torch.optim, torch.optim.lr_scheduler, torch.optim.swa_utils)
    names = names_of(*modules, within=r"^torch\.optim\b") - {"Optimizer", "LRScheduler"}
    assert_all_named(names, FROM_PYTORCH)


@pytest.mark.parametrize(("section", "library"), [(FROM_OPTAX, "optax"), (FROM_PYTORCH, "torch.optim")])
def test_what_is_not_there(section: str, library: str):
    module = pytest.importorskip(library)
    contrib = pytest.importorskip("optax.contrib")
    known = dir(module) + dir(contrib) + dir(getattr(module, "swa_utils", None))
    names = _spans(_paragraph(section, "Not there"))
    assert names
    assert set(names) <= set(known)
    assert not set(names) & set(vars(jr))


# Both loops

PYTORCH_LOOP, OUR_LOOP = (
    re.findall(rf"^```{language}\n(.*?)^```", FROM_PYTORCH, re.MULTILINE | re.DOTALL)[0]
    for language in ("py", "python")
)


def test_the_loops_are_the_same():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3)), rng.normal(size=(8, 1))
    model = torch.nn.Linear(3, 1, dtype=torch.float64)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    theirs = {"torch": torch, "model": model, "batches": [(torch.tensor(x), torch.tensor(y))] * 10}
    exec(PYTORCH_LOOP, theirs)
    ours = {"jr": jr, "jax": jax, "jnp": jnp, "x": x, "y": y, "loss_fn": _loss_fn}
    exec(OUR_LOOP, ours)
    np.testing.assert_allclose(ours["params"]["w"].T, model.weight.detach(), rtol=1e-6)
    np.testing.assert_allclose(ours["params"]["b"], model.bias.detach(), rtol=1e-6)
    np.testing.assert_allclose(ours["loss"], theirs["loss"].detach(), rtol=1e-6)


def _loss_fn(params: Any, x: Any, y: Any) -> Any:
    return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)
