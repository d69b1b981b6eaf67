"""Rules whose slots are smaller than the parameters: Adafactor, SM3."""

from importlib import import_module
from typing import Any

from jaxopt_rules.compose import chain
from jaxopt_rules.conformance.pairs import SHAPES, Pair, Problem, Stepper, optax_transform, timm, torch_optimizer
from jaxopt_rules.descend import descend
from jaxopt_rules.hooks import ema
from jaxopt_rules.matrices import MatrixView
from jaxopt_rules.rules.adafactor import (
    adafactor,
    adafactor_direction,
    adafactor_pytorch,
    adafactor_transformers,
)
from jaxopt_rules.rules.sm3 import sm3

LARGE = Problem({"wide": (130, 150), "tall": (150, 130), "small": (127, 140), "bias": (150,), "stack": (2, 140, 129)})
WITHOUT_SCALARS = Problem({name: shape for name, shape in SHAPES.items() if shape})
# Optax computes t^(−c) in float32.
IN_FLOAT32 = 1e-6


def torch_adafactor(**keywords: Any) -> Stepper:
    return torch_optimizer(lambda torch, p: torch.optim.Adafactor(p, 0.1, **keywords))


def transformers_adafactor(**keywords: Any) -> Stepper:
    return torch_optimizer(lambda torch, p: import_module("transformers.optimization").Adafactor(p, **keywords))


PAIRS = (
    Pair(
        "adafactor_pytorch",
        lambda: adafactor_pytorch(0.1, eps=2**-52, weight_decay=0.1),
        "torch.optim.Adafactor",
        torch_adafactor(weight_decay=0.1),
        "eps of float64, decay by the bound of the rate",
    ),
    Pair(
        "adafactor_pytorch bounds",
        lambda: adafactor_pytorch(0.1, 0.7, 1e-3, 0.5, 2.0),
        "torch.optim.Adafactor",
        torch_adafactor(beta2_decay=-0.7, eps=(1e-3, 0.5), d=2.0),
        "least root and least mean 1e-3, least scale 0.5",
    ),
    Pair(
        "adafactor_transformers",
        lambda: adafactor_transformers(momentum=0.9, weight_decay=0.1),
        "transformers.optimization.Adafactor",
        transformers_adafactor(beta1=0.9, weight_decay=0.1),
        "relative step, momentum of α_t U, scaled decay",
    ),
    Pair(
        "adafactor_transformers warmup",
        lambda: adafactor_transformers(warmup_init=True, multiply_by_parameter_scale=False),
        "transformers.optimization.Adafactor",
        transformers_adafactor(warmup_init=True, scale_parameter=False),
        "relative step with warmup, not by the parameter scale",
        # The first step is 1e-6 U: one rounding of θ is 2e-10 of it.
        1e-9,
    ),
    Pair(
        "adafactor_transformers rate",
        lambda: adafactor_transformers(0.1, 1e-6, 0.5, 0.7, 0.6),
        "transformers.optimization.Adafactor",
        transformers_adafactor(lr=0.1, eps=(1e-6, 0.5), clip_threshold=0.7, decay_rate=-0.6, relative_step=False),
        "rate, eps inside, least scale 0.5",
    ),
    Pair(
        "adafactor",
        lambda: adafactor(0.1, momentum=0.9, weight_decay=0.1, decay="fixed"),
        "optax.adafactor",
        optax_transform(lambda optax: optax.adafactor(0.1, momentum=0.9, weight_decay_rate=0.1)),
        "two largest axes from 128, fixed decay",
        IN_FLOAT32,
        LARGE,
    ),
    Pair(
        "adafactor all sizes",
        lambda: descend(adafactor_direction(1, 0.7, clipping_threshold=None, eps=1e-6), 0.1),
        "optax.scale_by_factored_rms",
        optax_transform(
            lambda optax: optax.chain(
                optax.scale_by_factored_rms(True, 0.7, 0, 1, 1e-6, lambda count, rate: 1 - (count + 1.0) ** -rate),
                optax.scale(-0.1),
            )
        ),
        "two largest axes of any size, decay rate in float64",
    ),
    Pair(
        "adafactor not factored",
        lambda: adafactor(0.1, multiply_by_parameter_scale=False, factored=False),
        "optax.adafactor",
        optax_transform(lambda optax: optax.adafactor(0.1, multiply_by_parameter_scale=False, factored=False)),
        "not factored, not by the parameter scale",
        IN_FLOAT32,
    ),
    Pair(
        "adafactor views",
        lambda: adafactor(
            momentum=0.9,
            weight_decay=0.1,
            decay="scaled",
            views={"filter": MatrixView(rows=-4, columns=-3), "kernel": MatrixView()},
        ),
        "timm.optim.adafactor.Adafactor",
        torch_optimizer(
            lambda torch, p: timm("adafactor").Adafactor(
                p, betas=(0.9, 0.999), weight_decay=0.1, min_dim_size_to_factor=1
            )
        ),
        "filters factored by their first two axes",
    ),
    Pair(
        "adafactor momentum first",
        lambda: descend(chain(adafactor_direction(1, decay_offset=3), ema(0.9, debias=False)), 0.1, 0.1),
        "timm.optim.adafactor_bv.AdafactorBigVision",
        torch_optimizer(
            lambda torch, p: timm("adafactor_bv").AdafactorBigVision(
                p,
                0.1,
                1,
                decay_offset=3,
                beta2_cap=1.0,
                momentum_dtype=torch.float64,
                clipping_threshold=1.0,
                weight_decay=0.1,
            )
        ),
        "momentum in front of the rate",
    ),
    Pair(
        "sm3",
        lambda: sm3(0.1, 0.8, eps=1e-8),
        "optax.sm3",
        optax_transform(lambda optax: optax.sm3(0.1, 0.8)),
        "eps 1e-8 inside",
        problem=WITHOUT_SCALARS,
    ),
    Pair(
        "sm3",
        lambda: sm3(0.1, 0.8, eps=1e-30),
        "pytorch_optimizer.SM3",
        torch_optimizer(lambda torch, p: import_module("pytorch_optimizer").SM3(p, 0.1, 0.8)),
        "eps 1e-30 inside",
    ),
    Pair(
        "sm3 no momentum",
        lambda: sm3(0.1, None),
        "pytorch_optimizer.SM3",
        torch_optimizer(lambda torch, p: import_module("pytorch_optimizer").SM3(p, 0.1, eps=0.0)),
        "no eps, no momentum",
    ),
)
