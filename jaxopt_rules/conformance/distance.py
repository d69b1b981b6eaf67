"""Rules that find their learning rate: Prodigy, DoG."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from jaxopt_rules.conformance.pairs import Pair, Stepper, optax_transform, torch_optimizer
from jaxopt_rules.rules.dog import dog, ldog
from jaxopt_rules.rules.prodigy import prodigy


def _prodigyopt(**arguments: Any) -> Stepper:
    return torch_optimizer(lambda torch, p: import_module("prodigyopt").Prodigy(p, **arguments))


def _dog_optimizer(name: str, **arguments: Any) -> Stepper:
    return torch_optimizer(lambda torch, p: getattr(import_module("dog"), name)(p, **arguments))


_prodigy: Callable[..., Pair] = partial(Pair, oracle="prodigyopt.Prodigy")
_dog: Callable[..., Pair] = partial(Pair, oracle="dog.DoG")
_ldog: Callable[..., Pair] = partial(Pair, oracle="dog.LDoG")

PAIRS: tuple[Pair, ...] = (
    _prodigy("prodigy", lambda: prodigy(), theirs=_prodigyopt(), convention="new d beside eps"),
    _prodigy(
        "prodigy decay",
        lambda: prodigy(0.5, 0.8, 0.99, 0.9, d0=1e-2, use_bias_correction=True, weight_decay=0.1),
        theirs=_prodigyopt(lr=0.5, betas=(0.8, 0.99), beta3=0.9, d0=1e-2, use_bias_correction=True, weight_decay=0.1),
        convention="decoupled decay, bias correction",
    ),
    _prodigy(
        "prodigy decay l2",
        lambda: prodigy(0.5, d0=1e-3, d_coef=2.0, safeguard_warmup=True, slice_p=3, weight_decay=0.1, decay="l2"),
        theirs=_prodigyopt(
            lr=0.5, d0=1e-3, d_coef=2.0, safeguard_warmup=True, slice_p=3, weight_decay=0.1, decouple=False
        ),
        convention="L2 decay, safeguard, slices of 3",
    ),
    _prodigy(
        "prodigy growth",
        lambda: prodigy(d0=1e-2, d_coef=2.0, growth_rate=1.05),
        theirs=_prodigyopt(d0=1e-2, d_coef=2.0, growth_rate=1.05),
        convention="bounded growth",
    ),
    Pair(
        "prodigy",
        lambda: prodigy(0.5, d0=1e-3, use_bias_correction=True, weight_decay=0.1),
        "optax.contrib.prodigy",
        optax_transform(lambda optax: optax.contrib.prodigy(0.5, estim_lr0=1e-3, weight_decay=0.1)),
        "bias correction, decoupled decay",
    ),
    _dog(
        "dog",
        lambda: dog(0.5, reps_rel=1e-2, eps=1.0),
        theirs=_dog_optimizer("DoG", lr=0.5, reps_rel=1e-2, eps=1.0),
        convention="eps beside the squares",
    ),
    _dog(
        "dog decay",
        lambda: dog(init_eta=1e-2, weight_decay=0.1, decay="l2"),
        theirs=_dog_optimizer("DoG", init_eta=1e-2, weight_decay=0.1),
        convention="L2 decay, first rate given",
    ),
    Pair(
        "dog decay",
        lambda: dog(0.5, reps_rel=1e-2, eps=1.0, weight_decay=0.1, decay="l2"),
        "optax.contrib.dog",
        optax_transform(lambda optax: optax.contrib.dog(0.5, ("heuristic", 1e-2), eps=1.0, weight_decay=0.1)),
        "L2 decay, eps beside the squares",
    ),
    Pair(
        "dog first rate",
        lambda: dog(0.5, init_eta=1e-2),
        "optax.contrib.dog",
        optax_transform(lambda optax: optax.contrib.dog(0.5, ("learning_rate", 1e-2))),
        "first rate given, times the learning rate",
    ),
    _ldog(
        "ldog",
        lambda: ldog(0.5, reps_rel=1e-2, eps=1.0),
        theirs=_dog_optimizer("LDoG", lr=0.5, reps_rel=1e-2, eps=1.0),
        convention="eps beside the squares",
    ),
    _ldog(
        "ldog decay",
        lambda: ldog(init_eta=1e-2, weight_decay=0.1, decay="l2"),
        theirs=_dog_optimizer("LDoG", init_eta=1e-2, weight_decay=0.1),
        convention="L2 decay, first rate given",
    ),
)
