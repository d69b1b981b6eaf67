"""One rule against one independent implementation: both run from the same start on the same gradients."""

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_rules.rule import Rule

Tree = dict[str, np.ndarray]
Trajectory = list[Tree]  # the parameters behind every step
STEPS = 50
SHAPES = {"kernel": (6, 4), "bias": (4,), "scale": (), "filter": (2, 3, 4, 5)}


def _tree(rng: np.random.Generator, shapes: Mapping[str, tuple[int, ...]]) -> Tree:
    return {name: np.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


@dataclass(frozen=True)
class Problem:
    """Where a trajectory begins, and the gradients that it is given.

    The elements of an array keep magnitudes of their own, which lie `low` to `high`; their signs change.
    """

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: SHAPES)
    low: float = 1e-6
    high: float = 1e2
    steps: int = STEPS
    seed: int = 0

    def start(self) -> Tree:
        return _tree(np.random.default_rng(self.seed), self.shapes)

    def grads(self) -> list[Tree]:
        rng = np.random.default_rng(self.seed + 1)
        low, high = np.log10(self.low), np.log10(self.high)
        sizes = {name: 10 ** rng.uniform(low, high, shape) for name, shape in self.shapes.items()}
        return [
            {name: np.asarray(sizes[name] * g) for name, g in _tree(rng, self.shapes).items()}
            for _ in range(self.steps)
        ]


# What an implementation is run by: from the start, a function that takes gradients and returns the new parameters.
Stepper = Callable[[Tree], Callable[[Tree], Tree]]


@dataclass(frozen=True)
class Pair:
    """A rule, an independent implementation of it, and how far apart they may be."""

    name: str  # of the rule, and of what is particular here
    rule: Callable[[], Rule]
    oracle: str  # as it is imported: torch.optim.Adam
    theirs: Stepper
    convention: str
    bound: float = 1e-12
    problem: Problem = field(default_factory=Problem)
    ours: Callable[[Rule], Stepper] | None = None  # how the rule is run, if it is not by its gradients alone

    @property
    def package(self) -> str:
        """What has to be installed."""
        return self.oracle.partition(".")[0]

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None


@dataclass(frozen=True)
class Outcome:
    pair: Pair
    difference: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.pair.bound  # not so for NaN


def run(pair: Pair) -> Outcome:
    """Runs both, which needs `jax.config.update("jax_enable_x64", True)`.

    The difference is the largest, over all steps and arrays, of ‖Δθ − Δθ′‖∞ / ‖Δθ′‖∞, where Δθ is what separates the
    parameters from the start.

    Raises:
      RuntimeError: 64-bit types are not enabled.
    """
    if not jax.config.read("jax_enable_x64"):
        raise RuntimeError('conformance is measured in float64: jax.config.update("jax_enable_x64", True)')
    start, grads = pair.problem.start(), pair.problem.grads()
    ours = trajectory((pair.ours or by_gradients)(pair.rule()), start, grads)
    theirs = trajectory(pair.theirs, start, grads)
    # Not `max`, to which a NaN is no larger than what stands in front of it.
    return Outcome(pair, float(np.max([_apart(start, x, y) for x, y in zip(ours, theirs, strict=True)])))


def trajectory(stepper: Stepper, start: Tree, grads: list[Tree]) -> Trajectory:
    step = stepper({name: x.copy() for name, x in start.items()})
    return [step({name: g.copy() for name, g in tree.items()}) for tree in grads]


def _apart(start: Tree, x: Tree, y: Tree) -> float:
    differences = []
    for name, origin in start.items():
        moved = np.abs(y[name] - origin).max(initial=0)
        apart = np.abs(np.asarray(x[name], np.float64) - y[name]).max(initial=0)
        differences.append(float(apart / moved) if moved > 0 else float(apart))
    return float(np.max(differences))


def by_gradients(rule: Rule, **extra: Any) -> Stepper:
    """Runs a rule by gradients (and the same extra arguments in every step)."""

    def begin(start: Tree) -> Callable[[Tree], Tree]:
        params = {name: jnp.asarray(x) for name, x in start.items()}
        state = rule.init(params)
        apply = jax.jit(lambda params, state, grads: rule.apply(grads, state, params, **extra))

        def step(grads: Tree) -> Tree:
            nonlocal params, state
            params, state = apply(params, state, {name: jnp.asarray(g) for name, g in grads.items()})
            return {name: np.asarray(x) for name, x in params.items()}

        return step

    return begin


def torch_optimizer(
    make: Callable[[Any, list[Any]], Any], before: Callable[[Any, list[Any]], Any] | None = None
) -> Stepper:
    """Runs make(torch, parameters), an optimizer of PyTorch's interface; `before` each step, before(torch, parameters).

    An optimizer with a mode for training is put into it.
    """

    def begin(start: Tree) -> Callable[[Tree], Tree]:
        torch: Any = importlib.import_module("torch")
        parameters = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in start.items()}
        optimizer = make(torch, list(parameters.values()))
        if callable(getattr(optimizer, "train", None)):
            optimizer.train()

        def step(grads: Tree) -> Tree:
            for name, parameter in parameters.items():
                parameter.grad = torch.tensor(grads[name])
            if before is not None:
                before(torch, list(parameters.values()))
            optimizer.step()
            return {name: parameter.detach().numpy().copy() for name, parameter in parameters.items()}

        return step

    return begin


def optax_transform(make: Callable[[Any], Any], **extra: Any) -> Stepper:
    """Runs make(optax), a gradient transformation."""

    def begin(start: Tree) -> Callable[[Tree], Tree]:
        optax: Any = importlib.import_module("optax")
        transform = make(optax)
        params = {name: jnp.asarray(x) for name, x in start.items()}
        state = transform.init(params)

        @jax.jit
        def apply(params: Any, state: Any, grads: Any) -> Any:
            updates, state = transform.update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), state

        def step(grads: Tree) -> Tree:
            nonlocal params, state
            params, state = apply(params, state, {name: jnp.asarray(g) for name, g in grads.items()})
            return {name: np.asarray(x) for name, x in params.items()}

        return step

    return begin


@cache
def timm(module: str) -> Any:
    """A module of `timm.optim`, without the rest of timm, which needs torchvision.

    Raises:
      ModuleNotFoundError: timm is not installed.
    """
    if "timm" not in sys.modules:
        spec = importlib.util.find_spec("timm")
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError("No module named 'timm'", name="timm")
        (root,) = spec.submodule_search_locations
        for name, path in (("timm", root), ("timm.optim", f"{root}/optim")):
            package: Any = types.ModuleType(name)
            package.__path__ = [path]
            package.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)  # asked for by find_spec
            sys.modules[name] = package
    return importlib.import_module(f"timm.optim.{module}")
