"""Rules that evaluate elsewhere than they train: schedule-free, SAM."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_rules.averages import eval_params
from jaxopt_rules.conformance.pairs import SHAPES, Pair, Problem, Stepper, Tree, optax_transform, torch_optimizer
from jaxopt_rules.descend import descend
from jaxopt_rules.rule import Rule
from jaxopt_rules.rules.adam import adam
from jaxopt_rules.rules.sam import sam
from jaxopt_rules.rules.schedule_free import schedule_free, schedule_free_adamw, schedule_free_sgd
from jaxopt_rules.rules.sgd import momentum_direction, sgd


def _averages(rule: Rule) -> Stepper:
    """The parameters to evaluate with, behind each step."""

    def begin(start: Tree) -> Callable[[Tree], Tree]:
        params: Any = {name: jnp.asarray(x) for name, x in start.items()}
        state = rule.init(params)
        apply = jax.jit(lambda params, state, grads: rule.apply(grads, state, params))

        def step(grads: Tree) -> Tree:
            nonlocal params, state
            params, state = apply(params, state, {name: jnp.asarray(g) for name, g in grads.items()})
            return {name: np.asarray(x) for name, x in eval_params(state, params).items()}

        return step

    return begin


def _torch_averages(make: Callable[[Any, list[Any]], Any]) -> Stepper:
    """What the parameters are behind `eval()`, after each step behind `train()`."""

    def begin(start: Tree) -> Callable[[Tree], Tree]:
        torch: Any = importlib.import_module("torch")
        parameters = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in start.items()}
        optimizer = make(torch, list(parameters.values()))

        def step(grads: Tree) -> Tree:
            optimizer.train()
            for name, parameter in parameters.items():
                parameter.grad = torch.tensor(grads[name])
            optimizer.step()
            optimizer.eval()
            return {name: parameter.detach().numpy().copy() for name, parameter in parameters.items()}

        return step

    return begin


def _authors(name: str, *args: Any, **kwargs: Any) -> Callable[[Any, list[Any]], Any]:
    return lambda torch, p: getattr(importlib.import_module("schedulefree"), name)(p, *args, **kwargs)


def _wrapped(torch: Any, p: list[Any]) -> Any:
    wrapper = importlib.import_module("schedulefree").ScheduleFreeWrapper
    # An optimizer that looks whether its state is empty, as Adam does, finds that of the wrapper there.
    return wrapper(torch.optim.SGD(p, 0.1, 0.5), weight_decay_at_y=0.1, momentum=0.95, r=1.0)


# The gradients of a problem are, to SAM, the data of these losses: log(1 + exp⟨a, θ⟩) + ½ Σ a² θ².


def _loss(params: Any, data: Any) -> Any:
    inner = sum(jnp.sum(data[name] * p) for name, p in params.items())
    return jax.nn.softplus(inner) + sum(jnp.sum((data[name] * p) ** 2) for name, p in params.items()) / 2


def _by_loss(rule: Rule) -> Stepper:
    def begin(start: Tree) -> Callable[[Tree], Tree]:
        params: Any = {name: jnp.asarray(x) for name, x in start.items()}
        state = rule.init(params)

        @jax.jit
        def apply(params: Any, state: Any, data: Any) -> Any:
            grads = jax.grad(_loss)(params, data)
            return rule.apply(grads, state, params, value_fn=lambda params: _loss(params, data))

        def step(data: Tree) -> Tree:
            nonlocal params, state
            params, state = apply(params, state, {name: jnp.asarray(a) for name, a in data.items()})
            return {name: np.asarray(x) for name, x in params.items()}

        return step

    return begin


def _torch_by_loss(make: Callable[[Any, list[Any]], Any]) -> Stepper:
    def begin(start: Tree) -> Callable[[Tree], Tree]:
        torch: Any = importlib.import_module("torch")
        parameters = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in start.items()}
        optimizer = make(torch, list(parameters.values()))

        def step(data: Tree) -> Tree:
            known = {name: torch.tensor(a) for name, a in data.items()}

            def closure() -> Any:
                for parameter in parameters.values():
                    parameter.grad = None
                inner = sum((known[name] * p).sum() for name, p in parameters.items())
                squares = sum(((known[name] * p) ** 2).sum() for name, p in parameters.items())
                loss = torch.nn.functional.softplus(inner, threshold=1e9) + squares / 2
                loss.backward()
                return loss

            closure()
            optimizer.step(closure)
            return {name: parameter.detach().numpy().copy() for name, parameter in parameters.items()}

        return step

    return begin


def _optax_by_loss(make: Callable[[Any], Any]) -> Stepper:
    def begin(start: Tree) -> Callable[[Tree], Tree]:
        optax: Any = importlib.import_module("optax")
        transform = make(optax)
        params: Any = {name: jnp.asarray(x) for name, x in start.items()}
        state = transform.init(params)

        @jax.jit
        def apply(params: Any, state: Any, data: Any) -> Any:
            def grad_fn(params: Any, _: Any) -> Any:
                return jax.grad(_loss)(params, data)

            updates, state = transform.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
            return optax.apply_updates(params, updates), state

        def step(data: Tree) -> Tree:
            nonlocal params, state
            params, state = apply(params, state, {name: jnp.asarray(a) for name, a in data.items()})
            return {name: np.asarray(x) for name, x in params.items()}

        return step

    return begin


def _optax_sam(optax: Any) -> Any:
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.5))
    return optax.contrib.sam(optax.adam(0.1), adversary, sync_period=2, opaque_mode=True)


def _torch_sam(torch: Any, p: list[Any], *, adaptive: bool) -> Any:
    module = importlib.import_module("pytorch_optimizer.optimizer.sam")
    return module.SAM(p, torch.optim.SGD, rho=0.5, adaptive=adaptive, lr=0.1, momentum=0.9)


DATA = Problem(low=1e-3, high=1.0)
# The wrapper of the authors swaps arrays as bytes, which it cannot do with one that has no axes.
WITHOUT_SCALAR = Problem({name: shape for name, shape in SHAPES.items() if shape})


def _rising(count: Any) -> Any:
    # Optax's own schedules compute in float32.
    return 0.01 + 0.009 * jnp.minimum(count, 10).astype(float)


_CLASSES = (
    (
        "schedule_free_sgd",
        lambda: schedule_free_sgd(0.1, 10, 0.8, weight_decay=0.1),
        _authors("SGDScheduleFree", 0.1, 0.8, 0.1, 10),
        "warm-up, decay at y",
    ),
    (
        "schedule_free_sgd weights",
        lambda: schedule_free_sgd(0.1, 10, r=1.0, weight_lr_power=1.0, weight_decay=0.1),
        _authors("SGDScheduleFree", 0.1, weight_decay=0.1, warmup_steps=10, r=1.0, weight_lr_power=1.0, foreach=False),
        "weights t · α",
    ),
    (
        "schedule_free_adamw",
        lambda: schedule_free_adamw(0.1, 10, 0.95, 0.99, 1e-6, weight_decay=0.1),
        _authors("AdamWScheduleFree", 0.1, (0.95, 0.99), 1e-6, 0.1, 10),
        "eps outside, warm-up, decay at y",
    ),
    (
        "schedule_free_adamw weights",
        lambda: schedule_free_adamw(0.1, 10, r=0.5, weight_lr_power=0.0),
        _authors("AdamWScheduleFree", 0.1, warmup_steps=10, r=0.5, weight_lr_power=0.0, foreach=False),
        "eps outside, weights √t",
    ),
)
_AUTHORS = {"schedule_free_sgd": "SGDScheduleFree", "schedule_free_adamw": "AdamWScheduleFree"}

PAIRS: tuple[Pair, ...] = (
    *(
        Pair(name, rule, f"schedulefree.{_AUTHORS[name.split()[0]]}", torch_optimizer(make), f"y; {text}")
        for name, rule, make, text in _CLASSES
    ),
    *(
        Pair(
            f"{name} eval_params",
            rule,
            f"schedulefree.{_AUTHORS[name.split()[0]]}",
            _torch_averages(make),
            f"x; {text}",
            ours=_averages,
        )
        for name, rule, make, text in _CLASSES
    ),
    Pair(
        "schedule_free momentum",
        lambda: schedule_free(descend(momentum_direction(0.5), 0.1, 0.1), b1=0.95, r=1.0),
        "schedulefree.ScheduleFreeWrapper",
        torch_optimizer(_wrapped),
        "y; a base with momentum, decay at y",
        problem=WITHOUT_SCALAR,
    ),
    Pair(
        "schedule_free momentum eval_params",
        lambda: schedule_free(descend(momentum_direction(0.5), 0.1, 0.1), b1=0.95, r=1.0),
        "schedulefree.ScheduleFreeWrapper",
        _torch_averages(_wrapped),
        "x; a base with momentum, decay at y",
        problem=WITHOUT_SCALAR,
        ours=_averages,
    ),
    Pair(
        "schedule_free_adamw",
        lambda: schedule_free_adamw(0.1, b1=0.95, b2=0.99, weight_decay=0.1),
        "optax.contrib.schedule_free_adamw",
        optax_transform(lambda optax: optax.contrib.schedule_free_adamw(0.1, b1=0.95, b2=0.99, weight_decay=0.1)),
        "y; without warm-up",
    ),
    Pair(
        "schedule_free schedule",
        lambda: schedule_free(sgd(_rising), lambda count: _rising(count + 1), 0.8),
        "optax.contrib.schedule_free",
        optax_transform(lambda optax: optax.contrib.schedule_free(optax.sgd(_rising), _rising, 0.8)),
        "y; weights from a schedule one update ahead",
        problem=Problem(low=1.0),
    ),
    Pair(
        "sam",
        lambda: sam(adam(0.1), 0.5),
        "optax.contrib.sam",
        _optax_by_loss(_optax_sam),
        "opaque mode, sync_period 2; ε̂ has no 1e-12",
        problem=DATA,
        ours=_by_loss,
    ),
    *(
        Pair(
            name,
            lambda adaptive=adaptive: sam(sgd(0.1, 0.9), 0.5, adaptive=adaptive),
            "pytorch_optimizer.SAM",
            _torch_by_loss(lambda torch, p, adaptive=adaptive: _torch_sam(torch, p, adaptive=adaptive)),
            "ε̂ over ‖g‖ + 1e-12" if name == "sam" else "ε̂ over ‖|θ| g‖ + 1e-12",
            # The oracle sums the squares of the norm in float32.
            bound=1e-7,
            problem=DATA,
            ours=_by_loss,
        )
        for name, adaptive in (("sam", False), ("asam", True))
    ),
)
