"""Rules with a norm for each array: LAMB, LARS, NovoGrad, StableAdamW."""

from importlib import import_module
from typing import Any

from jaxopt_rules.conformance.pairs import Pair, Stepper, optax_transform, timm, torch_optimizer
from jaxopt_rules.rules.lamb import lamb
from jaxopt_rules.rules.lars import lars
from jaxopt_rules.rules.novograd import novograd
from jaxopt_rules.rules.stable_adamw import stable_adamw


def _falling(count: Any) -> Any:
    """A rate that tells whether the velocity contains it."""
    return 1.0 / (1 + count)


def _nvnovograd(**settings: bool) -> Stepper:
    def make(torch: Any, parameters: list[Any]) -> Any:
        optimizer = timm("nvnovograd").NvNovoGrad(parameters, 0.1, weight_decay=0.1, **settings)
        # Its own v would be float32 beside parameters of float64.
        for p in parameters:
            v = torch.zeros((), dtype=p.dtype)
            optimizer.state[p] = {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": v}
        return optimizer

    return torch_optimizer(make)


PAIRS: tuple[Pair, ...] = (
    Pair(
        "lamb",
        lambda: lamb(0.1, weight_decay=0.1),
        "timm.optim.Lamb",
        torch_optimizer(lambda torch, p: timm("lamb").Lamb(p, 0.1, weight_decay=0.1, max_grad_norm=None)),
        "decay inside the ratio, no clip",
    ),
    Pair(
        "lamb no decay",
        lambda: lamb(0.1),
        "timm.optim.Lamb",
        torch_optimizer(
            lambda torch, p: timm("lamb").Lamb(p, 0.1, weight_decay=0.0, max_grad_norm=None, always_adapt=True)
        ),
        "every array has a ratio",
    ),
    Pair(
        "lamb max_ratio",
        lambda: lamb(0.1, 0.8, 0.99, weight_decay=0.1, max_ratio=1.0),
        "timm.optim.Lamb",
        torch_optimizer(
            lambda torch, p: timm("lamb").Lamb(
                p, 0.1, betas=(0.8, 0.99), weight_decay=0.1, max_grad_norm=None, trust_clip=True
            )
        ),
        "LAMBC",
    ),
    Pair(
        "lamb",
        lambda: lamb(0.1, weight_decay=0.1),
        "optax.lamb",
        optax_transform(lambda optax: optax.lamb(0.1, weight_decay=0.1)),
        "decay inside the ratio",
    ),
    Pair(
        "lars",
        lambda: lars(1.0, 0.1, eps=1e-8, rate="outside"),
        "timm.optim.Lars",
        torch_optimizer(lambda torch, p: timm("lars").Lars(p, 1.0, momentum=0.9, weight_decay=0.1)),
        "sum of norms",
    ),
    Pair(
        "lars nesterov",
        lambda: lars(1.0, eps=1e-8, nesterov=True, rate="outside"),
        "timm.optim.Lars",
        torch_optimizer(lambda torch, p: timm("lars").Lars(p, 1.0, momentum=0.9, nesterov=True, always_adapt=True)),
        "every array has a ratio",
    ),
    Pair(
        "lars trust_clip",
        lambda: lars(0.01, 0.1, trust_coefficient=0.1, eps=1e-8, rate="outside", trust_clip=True),
        "timm.optim.Lars",
        torch_optimizer(
            lambda torch, p: timm("lars").Lars(
                p, 0.01, momentum=0.9, weight_decay=0.1, trust_coeff=0.1, trust_clip=True
            )
        ),
        "LARC",
    ),
    Pair(
        "lars joint",
        lambda: lars(_falling, 0.1, denominator="joint"),
        "optax.lars",
        optax_transform(lambda optax: optax.lars(_falling, 0.1)),
        "norm of the sum, rate in the velocity",
    ),
    Pair(
        "lars joint nesterov",
        lambda: lars(_falling, 0.1, eps=0.1, nesterov=True, denominator="joint"),
        "optax.lars",
        optax_transform(lambda optax: optax.lars(_falling, 0.1, eps=0.1, nesterov=True)),
        "norm of the sum, rate in the velocity",
    ),
    Pair(
        "novograd",
        lambda: novograd(0.1, weight_decay=0.1),
        "optax.novograd",
        optax_transform(lambda optax: optax.novograd(0.1, weight_decay=0.1)),
        "sum, decay in the momentum",
    ),
    Pair(
        "novograd grad_averaging",
        lambda: novograd(0.1, 0.95, 0.98, 1e-8, grad_averaging=True, weight_decay=0.1),
        "timm.optim.NvNovoGrad",
        _nvnovograd(grad_averaging=True),
        "mean, decay in the momentum",
    ),
    Pair(
        "novograd decoupled",
        lambda: novograd(0.1, 0.95, 0.98, 1e-8, weight_decay=0.1, decay="decoupled"),
        "timm.optim.NvNovoGrad",
        _nvnovograd(decoupled_decay=True),
        "sum, decoupled decay",
    ),
    Pair(
        "stable_adamw",
        lambda: stable_adamw(0.1, weight_decay=0.1),
        "optimi.StableAdamW",
        torch_optimizer(lambda torch, p: import_module("optimi").StableAdamW(p, 0.1, weight_decay=0.1)),
        "decay inside",
    ),
    Pair(
        "stable_adamw",
        lambda: stable_adamw(0.1, 0.8, 0.95, 1e-8),
        "pytorch_optimizer.StableAdamW",
        torch_optimizer(lambda torch, p: import_module("pytorch_optimizer").StableAdamW(p, 0.1, (0.8, 0.95))),
        "decay inside",
    ),
)
