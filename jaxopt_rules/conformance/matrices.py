"""Rules on matrices: Muon.

PyTorch's implementations iterate in bfloat16. Where both are held against each other in float64, their own iteration
runs with that rounding taken out; one pair keeps it.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

from jaxopt_rules.conformance.pairs import Pair, Problem, Stepper, Tree, optax_transform, timm, torch_optimizer
from jaxopt_rules.matrices import MatrixView
from jaxopt_rules.rules.muon import muon, muon_moonshot, muon_pytorch
from jaxopt_rules.rules.polar import NewtonSchulz
from jaxopt_rules.select import by_ndim

MATRICES = {"square": (5, 5), "wide": (4, 7), "tall": (7, 4)}
FILTERS = MATRICES | {"filter": (6, 4, 3, 2)}
OUT_IN = MatrixView(rows=-1, columns=-2)
OIHW = MatrixView(rows=(-3, -2, -1), columns=-4)
OUT_IN_AND_FILTERS = ((by_ndim(2), OUT_IN), ("filter", OIHW))


def inside(context: Callable[[], AbstractContextManager[Any]], stepper: Stepper) -> Stepper:
    """Runs each step of `stepper` inside a context of its own."""

    def begin(start: Tree) -> Callable[[Tree], Tree]:
        step = stepper(start)

        def within(grads: Tree) -> Tree:
            with context():
                return step(grads)

        return within

    return begin


def torch_float64() -> AbstractContextManager[Any]:
    tensor = import_module("torch").Tensor
    return mock.patch.object(tensor, "bfloat16", tensor.clone)


def iterating_in_float64(module: Callable[[], Any], name: str) -> Callable[[], AbstractContextManager[Any]]:
    def context() -> AbstractContextManager[Any]:
        iterate = partial(getattr(module(), name), dtype=import_module("torch").float64)
        return mock.patch.object(module(), name, iterate)

    return context


timm_float64 = iterating_in_float64(lambda: timm("muon"), "zeropower_via_newtonschulz")
kozistr_float64 = iterating_in_float64(
    lambda: import_module("pytorch_optimizer.optimizer.muon.base"), "zero_power_via_newton_schulz_5"
)


def torch_muon(**keywords: Any) -> Stepper:
    return torch_optimizer(lambda torch, p: torch.optim.Muon(p, 0.02, **keywords))


def timm_muon(**keywords: Any) -> Stepper:
    return torch_optimizer(lambda torch, p: timm("muon").Muon(p, 0.02, **keywords))


def kozistr_muon(**keywords: Any) -> Stepper:
    return torch_optimizer(
        lambda torch, p: import_module("pytorch_optimizer").Muon([{"params": p, "use_muon": True}], 0.02, **keywords)
    )


PAIRS = (
    Pair(
        "muon_pytorch",
        lambda: muon_pytorch(0.02, views=OUT_IN),
        "torch.optim.Muon",
        inside(torch_float64, torch_muon()),
        "scale original, eps max, iterated in float64",
        problem=Problem(MATRICES),
    ),
    Pair(
        "muon_pytorch tiny",
        lambda: muon_pytorch(0.02, beta=0.8, nesterov=False, scale="match_rms_adamw", views=OUT_IN),
        "torch.optim.Muon",
        inside(torch_float64, torch_muon(momentum=0.8, nesterov=False, adjust_lr_fn="match_rms_adamw")),
        "match_rms_adamw, norms near eps, iterated in float64",
        problem=Problem(MATRICES, 1e-10, 1e-7),
    ),
    Pair(
        "muon_pytorch bfloat16",
        lambda: muon_pytorch(
            0.02, polar=NewtonSchulz(eps_placement="max", dtype="bfloat16"), scale="match_rms_adamw", views=OUT_IN
        ),
        "torch.optim.Muon",
        torch_muon(adjust_lr_fn="match_rms_adamw"),
        "both iterate in bfloat16",
        # Each of 15 products is rounded to 8 bits, and by whom a sum is rounded how often is not the same: 0.064.
        bound=0.1,
        problem=Problem(MATRICES, 0.1, 1.0),
    ),
    Pair(
        "muon_moonshot",
        lambda: muon_moonshot(0.02, polar=NewtonSchulz(eps=0), views=OUT_IN),
        "torch.optim.Muon",
        inside(torch_float64, torch_muon(adjust_lr_fn="match_rms_adamw", eps=0.0)),
        "match_rms_adamw, no eps, iterated in float64",
        problem=Problem(MATRICES),
    ),
    Pair(
        "muon conv",
        lambda: muon(
            0.02,
            polar=NewtonSchulz("quintic", eps_placement="max"),
            weight_decay=0.1,
            views=OUT_IN_AND_FILTERS,
        ),
        "pytorch_optimizer.Muon",
        inside(kozistr_float64, kozistr_muon(weight_decay=0.1, ns_coeffs="quintic")),
        "Keller Jordan's, convolutions, iterated in float64",
        problem=Problem(FILTERS),
    ),
    Pair(
        "muon polar express",
        lambda: muon(
            0.02,
            nesterov=False,
            polar=NewtonSchulz("polar_express", eps_placement="max"),
            scale="match_rms_adamw",
            views=OUT_IN_AND_FILTERS,
        ),
        "timm.optim.Muon",
        inside(timm_float64, timm_muon(ns_coefficients="polar_express", ns_steps=8, safety_factor=1.01)),
        "8 steps, convolutions, iterated in float64",
        problem=Problem(FILTERS),
    ),
    Pair(
        "muon polar express safer",
        lambda: muon_moonshot(0.02, polar=NewtonSchulz("polar_express_safer", 5, eps_placement="max"), views=OUT_IN),
        "timm.optim.Muon",
        inside(
            timm_float64,
            timm_muon(nesterov=True, weight_decay=0.1, ns_coefficients="polar_express_safer", safety_factor=1.02),
        ),
        "5 of 8 steps, sum against ema, iterated in float64",
        problem=Problem(MATRICES),
    ),
    Pair(
        "muon spectral",
        lambda: muon(0.02, scale="spectral", polar=NewtonSchulz(steps=7, eps_placement="max"), views=OUT_IN),
        "timm.optim.Muon",
        inside(
            timm_float64,
            timm_muon(nesterov=True, ns_steps=7, ns_coefficients="original", adjust_lr_fn="rms_to_rms"),
        ),
        "spectral (rms_to_rms), 7 steps, iterated in float64",
        problem=Problem(MATRICES),
    ),
    Pair(
        "muon debiased",
        lambda: muon(0.02, momentum="debiased", polar=NewtonSchulz(eps=1e-8), weight_decay=0.1),
        "optax.contrib.muon",
        optax_transform(lambda optax: optax.contrib.muon(0.02, weight_decay=0.1)),
        "(in, out), eps outside, debiased",
        problem=Problem(MATRICES),
    ),
    Pair(
        "muon debiased tiny",
        lambda: muon(
            0.02, nesterov=False, momentum="debiased", polar=NewtonSchulz("quintic", eps=1e-8), scale="match_rms_adamw"
        ),
        "optax.contrib.muon",
        optax_transform(lambda optax: optax.contrib.muon(0.02, "dion", eps=1e-8, nesterov=False, consistent_rms=0.2)),
        "quintic (dion), no nesterov, norms near eps",
        problem=Problem(MATRICES, 1e-10, 1e-7),
    ),
)
