"""Rules that need the loss: Polyak, L-BFGS.

L-BFGS is compared on losses that both frameworks compute; the given gradients are not used.
"""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_rules.compose import chain
from jaxopt_rules.conformance.pairs import Pair, Problem, Stepper, Tree, by_gradients, optax_transform
from jaxopt_rules.rule import Rule
from jaxopt_rules.rules.lbfgs import lbfgs, lbfgs_direction
from jaxopt_rules.rules.linesearch import backtracking
from jaxopt_rules.rules.polyak import polyak_sgd

# ---------------------------------------------------------------------------------------------------------------------
# Losses, written in what `jax.numpy` and `torch` have in common
# ---------------------------------------------------------------------------------------------------------------------

LOGISTIC = {"kernel": (6, 4), "bias": (4,)}
ROSENBROCK = {"x": (10,)}
_RNG = np.random.default_rng(0)
_INPUTS = _RNG.normal(size=(40, 6))
_LABELS = np.eye(4)[_RNG.integers(4, size=40)]


def logistic(np_like: Any, asarray: Callable[[Any], Any], params: Any) -> Any:
    """Softmax regression with a little decay: convex."""
    logits = asarray(_INPUTS) @ params["kernel"] + params["bias"]
    likelihood = (logits * asarray(_LABELS)).sum(1) - np_like.log(np_like.exp(logits).sum(1))
    return -likelihood.mean() + 0.05 * ((params["kernel"] ** 2).sum() + (params["bias"] ** 2).sum())


def rosenbrock(np_like: Any, asarray: Callable[[Any], Any], params: Any) -> Any:
    """A curved valley, which takes searches through all their branches."""
    x = params["x"]
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


Loss = Callable[[Any, Callable[[Any], Any], Any], Any]


def by_loss(loss: Loss) -> Callable[[Rule], Stepper]:
    """Runs a rule on a loss of its own."""

    def of(params: Any) -> Any:
        return loss(jnp, jnp.asarray, params)

    def stepper(rule: Rule) -> Stepper:
        def begin(start: Tree) -> Callable[[Tree], Tree]:
            params = {name: jnp.asarray(x) for name, x in start.items()}
            state = rule.init(params)

            @jax.jit
            def apply(params: Any, state: Any) -> Any:
                value, grads = jax.value_and_grad(of)(params)
                return rule.apply(grads, state, params, value=value, grad=grads, value_fn=of)

            def step(_: Tree) -> Tree:
                nonlocal params, state
                params, state = apply(params, state)
                return {name: np.asarray(x) for name, x in params.items()}

            return step

        return begin

    return stepper


def torch_lbfgs(loss: Loss, learning_rate: float = 1.0, **options: Any) -> Stepper:
    """Runs torch.optim.LBFGS, one iteration in each step."""

    def begin(start: Tree) -> Callable[[Tree], Tree]:
        torch: Any = importlib.import_module("torch")
        parameters = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in start.items()}
        optimizer = torch.optim.LBFGS(
            list(parameters.values()),
            learning_rate,
            max_iter=1,
            tolerance_grad=0,
            tolerance_change=1e-20,  # no step is the last one
            **options,
        )

        def closure() -> Any:
            optimizer.zero_grad()
            value = loss(torch, torch.tensor, parameters)
            value.backward()
            return value

        def step(_: Tree) -> Tree:
            optimizer.step(closure)
            return {name: parameter.detach().numpy().copy() for name, parameter in parameters.items()}

        return step

    return begin


def optax_on(loss: Loss, make: Callable[[Any], Any]) -> Stepper:
    """Runs make(optax), which may be a line search."""

    def of(params: Any) -> Any:
        return loss(jnp, jnp.asarray, params)

    def begin(start: Tree) -> Callable[[Tree], Tree]:
        optax: Any = importlib.import_module("optax")
        transform = optax.with_extra_args_support(make(optax))
        params = {name: jnp.asarray(x) for name, x in start.items()}
        state = transform.init(params)

        @jax.jit
        def apply(params: Any, state: Any) -> Any:
            value, grads = jax.value_and_grad(of)(params)
            updates, state = transform.update(grads, state, params, value=value, grad=grads, value_fn=of)
            return optax.apply_updates(params, updates), state

        def step(_: Tree) -> Tree:
            nonlocal params, state
            params, state = apply(params, state)
            return {name: np.asarray(x) for name, x in params.items()}

        return step

    return begin


# PyTorch's conditions for the first step and for keeping a pair.
_TORCH: dict[str, Any] = {"first": "l1", "skip": "absolute", "min_curvature": 1e-10}


MAX = 0.0225  # the bound of the step; with the loss 900, it is reached in most steps, not in all

PAIRS = (
    Pair(
        "polyak_sgd",
        lambda: polyak_sgd(MAX, f_min=3.0, eps=0.5),
        "optax.polyak_sgd",
        optax_transform(lambda optax: optax.polyak_sgd(MAX, f_min=3.0, eps=0.5), value=900.0),
        "sps",
        ours=lambda rule: by_gradients(rule, value=900.0),
    ),
    Pair(
        "polyak_sgd below f_min",
        lambda: polyak_sgd(MAX, f_min=3.0),
        "optax.polyak_sgd",
        optax_transform(lambda optax: optax.polyak_sgd(MAX, f_min=3.0), value=2.0),
        "sps: climbs",
        ours=lambda rule: by_gradients(rule, value=2.0),
    ),
    Pair(
        "polyak_sgd scaling",
        lambda: polyak_sgd(MAX, 0.3, variant="sps+"),
        "optax.scale_by_polyak",
        optax_transform(
            lambda optax: optax.chain(
                optax.scale_by_polyak(max_learning_rate=MAX, variant="sps+"), optax.scale_by_learning_rate(0.3)
            ),
            value=900.0,
        ),
        "sps+, scaled behind the formula",
        ours=lambda rule: by_gradients(rule, value=900.0),
    ),
    Pair(
        "lbfgs fixed rate",
        lambda: lbfgs(0.5, 5, linesearch=None, **_TORCH),
        "torch.optim.LBFGS",
        torch_lbfgs(logistic, 0.5, history_size=5),
        "no line search",
        ours=by_loss(logistic),
        problem=Problem(LOGISTIC, steps=30),
    ),
    Pair(
        "lbfgs",
        lambda: lbfgs(memory_size=5, **_TORCH),
        "torch.optim.LBFGS",
        torch_lbfgs(logistic, history_size=5, max_eval=25, line_search_fn="strong_wolfe"),
        "strong Wolfe, convex",
        ours=by_loss(logistic),
        problem=Problem(LOGISTIC, steps=20),
    ),
    Pair(
        "strong_wolfe lbfgs",
        lambda: lbfgs(memory_size=5, **_TORCH),
        "torch.optim.LBFGS",
        torch_lbfgs(rosenbrock, history_size=5, max_eval=25, line_search_fn="strong_wolfe"),
        "strong Wolfe, not convex",
        ours=by_loss(rosenbrock),
        problem=Problem(ROSENBROCK, steps=20),
    ),
    Pair(
        "lbfgs fixed rate",
        lambda: lbfgs(0.5, 5, linesearch=None, min_curvature=0.0),
        "optax.lbfgs",
        optax_on(logistic, lambda optax: optax.lbfgs(0.5, 5, linesearch=None)),
        "no line search, first step by the 2-norm",
        ours=by_loss(logistic),
        problem=Problem(LOGISTIC, steps=30),
    ),
    Pair(
        "lbfgs unscaled",
        lambda: lbfgs(0.01, 5, False, None, min_curvature=0.0),
        "optax.lbfgs",
        optax_on(logistic, lambda optax: optax.lbfgs(0.01, 5, False, None)),
        "H from the identity",
        ours=by_loss(logistic),
        problem=Problem(LOGISTIC, steps=30),
    ),
    Pair(
        "lbfgs backtracking",
        lambda: chain(lbfgs_direction(5), backtracking(20, increase_factor=np.inf, decrease_factor=0.5)),
        "optax.scale_by_lbfgs",
        optax_on(
            rosenbrock,
            lambda optax: optax.chain(
                optax.scale_by_lbfgs(5),
                optax.scale(-1.0),
                optax.scale_by_backtracking_linesearch(20, increase_factor=np.inf, decrease_factor=0.5),
            ),
        ),
        "Armijo from the first length",
        ours=by_loss(rosenbrock),
        problem=Problem(ROSENBROCK, steps=20),
    ),
    Pair(
        "backtracking",
        lambda: backtracking(30, 0.3, 0.6),
        "optax.scale_by_backtracking_linesearch",
        optax_on(
            rosenbrock,
            lambda optax: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(30, 0.3, 0.6)),
        ),
        "Armijo from the last length, grown",
        ours=by_loss(rosenbrock),
        problem=Problem(ROSENBROCK),
    ),
)
