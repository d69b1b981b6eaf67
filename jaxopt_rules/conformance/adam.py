"""Adam and its family."""

from jaxopt_rules.compose import chain
from jaxopt_rules.conformance.pairs import Pair, optax_transform, torch_optimizer
from jaxopt_rules.hooks import clip_by_global_norm
from jaxopt_rules.rules.adam import adam, adamw

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
)
