"""Rules that differ in their momenta: Lion, Adan, ADOPT, AdEMAMix."""

import warnings
from importlib import import_module
from typing import Any

import jax.numpy as jnp

from jaxopt_rules.conformance.pairs import Pair, Stepper, optax_transform, timm, torch_optimizer
from jaxopt_rules.rules.adan import adan
from jaxopt_rules.rules.ademamix import ademamix
from jaxopt_rules.rules.adopt import adopt
from jaxopt_rules.rules.lion import lion


def _adopt(**settings: Any) -> Stepper:
    def make(torch: Any, parameters: list[Any]) -> Any:
        optimizer = import_module("adopt").ADOPT(parameters, 0.1, weight_decay=0.1, **settings)
        loud = optimizer.step

        def step() -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it calls what PyTorch has deprecated since
                loud()

        optimizer.step = step
        return optimizer

    return torch_optimizer(make)


def _after_the_first(count: Any) -> Any:
    """A weight decay of 0.1, but of 0 in the first update, where others have none."""
    return jnp.where(count == 0, 0.0, 0.1)


PAIRS: tuple[Pair, ...] = (
    Pair(
        "lion",
        lambda: lion(0.01, 0.95, 0.98),
        "lion_pytorch.Lion",
        torch_optimizer(lambda torch, p: import_module("lion_pytorch").Lion(p, 0.01, (0.95, 0.98))),
        "no decay",
        bound=0.0,
    ),
    Pair(
        "lion decay",
        lambda: lion(0.01, weight_decay=0.1),
        "lion_pytorch.Lion",
        torch_optimizer(lambda torch, p: import_module("lion_pytorch").Lion(p, 0.01, weight_decay=0.1)),
        "decoupled decay",
    ),
    Pair(
        "lion decay",
        lambda: lion(0.01, 0.98, 0.9, weight_decay=0.1),
        "optimi.Lion",
        torch_optimizer(lambda torch, p: import_module("optimi").Lion(p, 0.01, (0.98, 0.9), weight_decay=0.1)),
        "decoupled decay, b1 > b2",
    ),
    Pair(
        "lion decay",
        lambda: lion(0.01, weight_decay=1e-3),
        "optax.lion",
        optax_transform(lambda optax: optax.lion(0.01)),
        "decoupled decay, Optax's default",
    ),
    Pair(
        "adan",
        lambda: adan(0.1, weight_decay=0.1),
        "timm.optim.Adan",
        torch_optimizer(lambda torch, p: timm("adan").Adan(p, 0.1, weight_decay=0.1)),
        "proximal decay",
    ),
    Pair(
        "adan no_prox",
        lambda: adan(0.1, 0.9, 0.8, 0.95, 1e-6, weight_decay=0.1, decay="decoupled"),
        "timm.optim.Adan",
        torch_optimizer(
            lambda torch, p: timm("adan").Adan(p, 0.1, (0.9, 0.8, 0.95), 1e-6, weight_decay=0.1, no_prox=True)
        ),
        "decoupled decay",
    ),
    Pair(
        "adan",
        lambda: adan(0.1, eps=1e-6, weight_decay=0.02),
        "optimi.Adan",
        torch_optimizer(lambda torch, p: import_module("optimi").Adan(p, 0.1)),
        "proximal decay, optimi's defaults",
    ),
    Pair(
        "adan decoupled",
        lambda: adan(0.1, b2=0.5, weight_decay=0.1, decay="decoupled"),
        "optax.adan",
        # Optax has 1 − b2 in place of the factor b2; here they are the same.
        optax_transform(lambda optax: optax.adan(0.1, b2=0.5, eps_root=0.0, weight_decay=0.1)),
        "b2=0.5, eps_root=0, decoupled decay",
    ),
    Pair(
        "adopt",
        lambda: adopt(0.1, weight_decay=_after_the_first),
        "adopt.ADOPT",
        _adopt(decouple=True),
        "decoupled decay, none in the first update",
    ),
    Pair(
        "adopt l2",
        lambda: adopt(0.1, b2=0.99, clip_exponent=None, weight_decay=0.1, decay="l2"),
        "adopt.ADOPT",
        _adopt(betas=(0.9, 0.99), clip_lambda=None),
        "L2 decay, no clip",
    ),
    Pair(
        "adopt",
        lambda: adopt(0.1, clip_exponent=0.333),
        "timm.optim.Adopt",
        torch_optimizer(lambda torch, p: timm("adopt").Adopt(p, 0.1)),
        "timm's clip",
    ),
    Pair(
        "adopt",
        lambda: adopt(0.1),
        "optax.contrib.adopt",
        optax_transform(lambda optax: import_module("optax.contrib").adopt(0.1)),
        "clipped",
    ),
    Pair(
        "ademamix warmup",
        lambda: ademamix(0.1, b3=0.999, warmup=30),
        "pytorch_optimizer.AdEMAMix",
        torch_optimizer(
            lambda torch, p: import_module("pytorch_optimizer").AdEMAMix(p, 0.1, (0.9, 0.999, 0.999), t_alpha_beta3=30)
        ),
        "schedules of alpha and b3 from t = 1",
    ),
    Pair(
        "ademamix",
        lambda: ademamix(0.1, weight_decay=0.1),
        "optax.contrib.ademamix",
        optax_transform(lambda optax: import_module("optax.contrib").ademamix(0.1, weight_decay=0.1)),
        "constant alpha and b3, decoupled decay",
    ),
)
