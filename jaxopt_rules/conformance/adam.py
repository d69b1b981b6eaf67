"""Adam and its family."""

import importlib
from typing import Any

from jaxopt_rules.compose import chain
from jaxopt_rules.conformance.pairs import Pair, Stepper, optax_transform, timm, torch_optimizer
from jaxopt_rules.hooks import clip_by_global_norm
from jaxopt_rules.rules.adabelief import adabelief
from jaxopt_rules.rules.adam import adam, adamw
from jaxopt_rules.rules.adamax import adamax, adamaxw
from jaxopt_rules.rules.amsgrad import amsgrad
from jaxopt_rules.rules.nadam import nadam, nadamw
from jaxopt_rules.rules.radam import radam
from jaxopt_rules.rules.yogi import yogi


def _of(package: str, name: str, **keywords: Any) -> Stepper:
    """An optimizer of a package with PyTorch's interface, by its name there."""
    return torch_optimizer(lambda torch, p: getattr(importlib.import_module(package), name)(p, 0.1, **keywords))


def _torch_nadam(betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, **keywords: Any) -> Stepper:
    """PyTorch's NAdam with its product of all μ in float64; it would begin one in float32, which is off by 1e-8."""

    def make(torch: Any, p: list[Any]) -> Any:
        optimizer = torch.optim.NAdam(p, 0.1, betas, eps, **keywords)
        for x in p:
            optimizer.state[x] = {
                "step": torch.tensor(0.0),
                "mu_product": torch.ones((), dtype=torch.float64),
                "exp_avg": torch.zeros_like(x),
                "exp_avg_sq": torch.zeros_like(x),
            }
        return optimizer

    return torch_optimizer(make)


PAIRS = (
    Pair(
        "adam",
        lambda: adam(0.1, 0.8, 0.99, 1e-6),
        "torch.optim.Adam",
        torch_optimizer(lambda torch, p: torch.optim.Adam(p, 0.1, (0.8, 0.99), 1e-6)),
        "eps outside",
    ),
    Pair(
        "adam decay l2",
        lambda: adamw(0.1, weight_decay=0.1, decay="l2"),
        "torch.optim.Adam",
        torch_optimizer(lambda torch, p: torch.optim.Adam(p, 0.1, weight_decay=0.1)),
        "eps outside, L2 decay",
    ),
    Pair(
        "adamw",
        lambda: adamw(0.1, weight_decay=0.1),
        "torch.optim.AdamW",
        torch_optimizer(lambda torch, p: torch.optim.AdamW(p, 0.1, weight_decay=0.1)),
        "eps outside, decoupled decay",
    ),
    Pair(
        "adamw",
        lambda: adamw(0.1, weight_decay=0.1),
        "optax.adamw",
        optax_transform(lambda optax: optax.adamw(0.1, weight_decay=0.1)),
        "eps outside, decoupled decay",
    ),
    Pair(
        "adamw clip",
        lambda: chain(clip_by_global_norm(1.0), adamw(0.1, weight_decay=0.1)),
        "torch.optim.AdamW",
        torch_optimizer(
            lambda torch, p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
            before=lambda torch, p: torch.nn.utils.clip_grad_norm_(p, 1.0),
        ),
        "norm clipped as by clip_grad_norm_",
    ),
    Pair(
        "adam eps inside",
        lambda: adam(0.1, eps=1e-6, eps_placement="inside"),
        "optax.adam",
        optax_transform(lambda optax: optax.adam(0.1, eps=0.0, eps_root=1e-6)),
        "eps inside",
    ),
    Pair(
        "amsgrad",
        lambda: amsgrad(0.1, eps=1e-6),
        "optax.amsgrad",
        optax_transform(lambda optax: optax.amsgrad(0.1, eps=1e-6)),
        "maximum of the corrected v",
    ),
    Pair(
        "amsgrad uncorrected",
        lambda: amsgrad(0.1, eps=1e-6, maximum_of="uncorrected"),
        "torch.optim.Adam",
        torch_optimizer(lambda torch, p: torch.optim.Adam(p, 0.1, eps=1e-6, amsgrad=True)),
        "maximum of v",
    ),
    Pair(
        "amsgrad uncorrected decay",
        lambda: amsgrad(0.1, maximum_of="uncorrected", weight_decay=0.1),
        "torch.optim.AdamW",
        torch_optimizer(lambda torch, p: torch.optim.AdamW(p, 0.1, weight_decay=0.1, amsgrad=True)),
        "maximum of v, decoupled decay",
    ),
    Pair(
        "nadam",
        lambda: nadam(0.1, 0.8, 0.99, 1e-6, momentum_decay=0.1),
        "torch.optim.NAdam",
        _torch_nadam((0.8, 0.99), 1e-6, momentum_decay=0.1),
        "schedule of momenta",
    ),
    Pair(
        "nadam decay l2",
        lambda: nadam(0.1, weight_decay=0.1, decay="l2"),
        "torch.optim.NAdam",
        _torch_nadam(weight_decay=0.1),
        "schedule of momenta, L2 decay",
    ),
    Pair(
        "nadam decay",
        lambda: nadam(0.1, weight_decay=0.1),
        "torch.optim.NAdam",
        _torch_nadam(weight_decay=0.1, decoupled_weight_decay=True),
        "schedule of momenta, decoupled decay",
    ),
    Pair(
        "nadamw",
        lambda: nadamw(0.1, 0.8, eps=1e-6, weight_decay=0.1),
        "optax.nadamw",
        optax_transform(lambda optax: optax.nadamw(0.1, 0.8, eps=1e-6, weight_decay=0.1)),
        "m corrected as of the next update",
    ),
    Pair(
        "nadamw no decay",
        lambda: nadamw(0.1, weight_decay=None),
        "optax.nadam",
        optax_transform(lambda optax: optax.nadam(0.1)),
        "m corrected as of the next update",
    ),
    Pair(
        "nadamw timm",
        lambda: nadamw(0.1, 0.8, eps=1e-6, form="timm", weight_decay=0.1),
        "timm.optim.NAdamW",
        torch_optimizer(lambda torch, p: timm("nadamw").NAdamW(p, 0.1, (0.8, 0.999), 1e-6, weight_decay=0.1)),
        "m corrected as of this update",
    ),
    Pair(
        "nadamw timm corrected decay",
        lambda: nadamw(0.1, form="timm", weight_decay=0.1, decay="corrected", peak=0.1),
        "timm.optim.NAdamW",
        torch_optimizer(lambda torch, p: timm("nadamw").NAdamW(p, 0.1, weight_decay=0.1, corrected_weight_decay=True)),
        "m corrected as of this update, corrected decay",
    ),
    Pair(
        "adamax",
        lambda: adamax(0.1, 0.8, 0.99, 1e-6),
        "torch.optim.Adamax",
        torch_optimizer(lambda torch, p: torch.optim.Adamax(p, 0.1, (0.8, 0.99), 1e-6)),
        "eps in the maximum",
    ),
    Pair(
        "adamax decay l2",
        lambda: adamax(0.1, weight_decay=0.1, decay="l2"),
        "torch.optim.Adamax",
        torch_optimizer(lambda torch, p: torch.optim.Adamax(p, 0.1, weight_decay=0.1)),
        "eps in the maximum, L2 decay",
    ),
    Pair(
        "adamax",
        lambda: adamax(0.1, 0.8, 0.99, 1e-6),
        "optax.adamax",
        optax_transform(lambda optax: optax.adamax(0.1, 0.8, 0.99, 1e-6)),
        "eps in the maximum",
    ),
    Pair(
        "adamaxw",
        lambda: adamaxw(0.1),
        "optax.adamaxw",
        optax_transform(lambda optax: optax.adamaxw(0.1)),
        "eps in the maximum, decoupled decay",
    ),
    Pair(
        "radam",
        lambda: radam(0.1, 0.8, 0.99, 1e-6),
        "optax.radam",
        optax_transform(lambda optax: optax.radam(0.1, 0.8, 0.99, 1e-6)),
        "eps outside",
    ),
    Pair(
        "radam",
        lambda: radam(0.1, 0.8, 0.99, 1e-6, weight_decay=0.1),
        "optimi.RAdam",
        _of("optimi", "RAdam", betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1, decouple_wd=True, foreach=False),
        "eps outside, decoupled decay",
    ),
    Pair(
        "radam hat",
        lambda: radam(0.1, 0.8, 0.99, 1e-6, eps_placement="hat"),
        "torch.optim.RAdam",
        torch_optimizer(lambda torch, p: torch.optim.RAdam(p, 0.1, (0.8, 0.99), 1e-6)),
        "eps hat",
    ),
    Pair(
        "radam hat decay l2",
        lambda: radam(0.1, eps_placement="hat", weight_decay=0.1, decay="l2"),
        "torch.optim.RAdam",
        torch_optimizer(lambda torch, p: torch.optim.RAdam(p, 0.1, weight_decay=0.1)),
        "eps hat, L2 decay",
    ),
    Pair(
        "radam hat decay",
        lambda: radam(0.1, eps_placement="hat", weight_decay=0.1),
        "torch.optim.RAdam",
        torch_optimizer(lambda torch, p: torch.optim.RAdam(p, 0.1, weight_decay=0.1, decoupled_weight_decay=True)),
        "eps hat, decoupled decay",
    ),
    Pair(
        "radam skip",
        lambda: radam(0.1, 0.8, 0.99, 1e-6, threshold=7.0, eps_placement="hat", silent="skip"),
        "pytorch_optimizer.RAdam",
        _of("pytorch_optimizer", "RAdam", betas=(0.8, 0.99), eps=1e-6, n_sma_threshold=7, degenerated_to_sgd=False),
        "eps hat, silent updates skipped",
    ),
    Pair(
        "adabelief",
        lambda: adabelief(0.1, 0.8, 0.99, 1e-6, 1e-10),
        "optax.adabelief",
        optax_transform(lambda optax: optax.adabelief(0.1, 0.8, 0.99, 1e-6, 1e-10)),
        "eps_root in s, eps outside",
    ),
    Pair(
        "adabelief decay",
        lambda: adabelief(0.1, weight_decay=0.1),
        "adabelief_pytorch.AdaBelief",
        _of("adabelief_pytorch", "AdaBelief", weight_decay=0.1, rectify=False, print_change_log=False),
        "one eps, decoupled decay",
    ),
    Pair(
        "adabelief rectified",
        lambda: adabelief(0.1, 0.8, 0.99, 1e-8, 1e-8, rectify=True),
        "adabelief_pytorch.AdaBelief",
        _of("adabelief_pytorch", "AdaBelief", betas=(0.8, 0.99), eps=1e-8, print_change_log=False),
        "one eps, rectified",
    ),
    Pair(
        "adabelief",
        lambda: adabelief(0.1, 0.8, 0.99, 1e-8, 1e-8),
        "pytorch_optimizer.AdaBelief",
        _of("pytorch_optimizer", "AdaBelief", betas=(0.8, 0.99), eps=1e-8),
        "one eps",
    ),
    Pair(
        "yogi",
        lambda: yogi(0.1, 0.8, 0.99, 1e-3),
        "optax.yogi",
        optax_transform(lambda optax: optax.yogi(0.1, 0.8, 0.99, 1e-3)),
        "m and v begin at 1e-6",
    ),
    Pair(
        "yogi decay",
        lambda: yogi(0.1, initial_accumulator_value=1e-4, weight_decay=0.1),
        "pytorch_optimizer.Yogi",
        _of("pytorch_optimizer", "Yogi", initial_accumulator=1e-4, weight_decay=0.1),
        "m and v begin at 1e-4, decoupled decay",
    ),
)
