"""Muon: momentum whose matrices are made orthogonal. Momentum, solver and scale are three separate choices."""

from collections.abc import Callable
from math import sqrt
from typing import Any, Literal, NamedTuple

from jax import Array

from jaxopt_rules.apply import Decay
from jaxopt_rules.descend import descend
from jaxopt_rules.lift import leafwise
from jaxopt_rules.matrices import MatrixView, Views, viewed
from jaxopt_rules.numerics import debias, ema
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.rules.polar import NewtonSchulz, Polar, solver
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector

Momentum = Literal["ema", "sum", "debiased"]
Scale = Callable[[int, int], float]  # of the rows (inputs) and columns (outputs) of a matrix


class MuonState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # one_minus_beta
    m: Any  # like θ, float32 or wider: running mean of g, or with momentum="sum" its decaying sum


def _mean(g: Array, m: Array, t: Array, one_minus_beta: Array, nesterov: bool) -> tuple[Array, Array]:
    m = ema(m, g, one_minus_beta)
    return m, ema(m, g, one_minus_beta) if nesterov else m


def _sum(g: Array, m: Array, t: Array, one_minus_beta: Array, nesterov: bool) -> tuple[Array, Array]:
    beta = 1 - one_minus_beta
    m = beta * m + g
    return m, g + beta * m if nesterov else m


def _debiased(g: Array, m: Array, t: Array, one_minus_beta: Array, nesterov: bool) -> tuple[Array, Array]:
    m = ema(m, g, one_minus_beta)
    if not nesterov:
        return m, debias(m, one_minus_beta, t)
    return m, ema(debias(m, one_minus_beta, t + 1), debias(g, one_minus_beta, t), one_minus_beta)


_MOMENTA = {"ema": _mean, "sum": _sum, "debiased": _debiased}

_SCALES: dict[str, Scale] = {
    "original": lambda rows, columns: sqrt(max(1, columns / rows)),
    "match_rms_adamw": lambda rows, columns: 0.2 * sqrt(max(rows, columns)),
    "spectral": lambda rows, columns: sqrt(columns / rows),
}


def _muon(
    g: Array,
    m: Array,
    *,
    t: Array,
    one_minus_beta: Array,
    view: MatrixView,
    momentum: Momentum,
    nesterov: bool,
    polar: Polar,
    scale: Scale | None,
) -> tuple[Array, tuple[Array]]:
    m, u = _MOMENTA[momentum](g, m, t, one_minus_beta, nesterov)

    def orthogonal(x: Array) -> Array:
        _, rows, columns = x.shape
        return polar(x) if scale is None or not x.size else scale(rows, columns) * polar(x)

    return view.map(orthogonal, u), (m,)


@constructor
def muon_direction(
    *,
    beta: float | Schedule = 0.95,
    nesterov: bool = True,
    momentum: Momentum = "ema",
    polar: str | Polar = "original",
    scale: str | Scale | None = "original",
    views: Views = None,
) -> Rule:
    """The direction of `muon`, before any learning rate, for chains of your own."""
    if momentum not in _MOMENTA:
        raise ValueError(
            f"muon: momentum is its form, {', '.join(map(repr, _MOMENTA))}, not {momentum!r}; its rate is beta"
        )
    if scale is not None and not callable(scale) and scale not in _SCALES:
        raise ValueError(
            f"muon: scale is {', '.join(map(repr, _SCALES))}, a function of (rows, columns), or None, not {scale!r}"
        )
    return leafwise(
        _muon,
        MuonState,
        given={"view": viewed(views, "muon")},
        static={
            "momentum": momentum,
            "nesterov": bool(nesterov),
            "polar": solver(polar),
            "scale": _SCALES[scale] if isinstance(scale, str) else scale,
        },
        beta=beta,
    )


@constructor
def muon(
    learning_rate: float | Schedule = 0.02,
    *,
    beta: float | Schedule = 0.95,
    nesterov: bool = True,
    momentum: Momentum = "ema",
    polar: str | Polar = "original",
    scale: str | Scale | None = "original",
    views: Views = None,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    decay: Decay | Literal["l2"] = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule:
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), with the author's defaults.

        "ema":       m ← m + (1 − β)(g − m)    u = m,                with `nesterov` (1 − β) g + β m
        "sum":       m ← β m + g               u = m,                                g + β m
        "debiased":  m as in "ema"             u = m / (1 − βᵗ),     (1 − β) g / (1 − βᵗ) + β m / (1 − βᵗ⁺¹)

        O = polar(u)                 by `polar`: U Vᵀ of u = U diag(σ) Vᵀ, or near it
        θ ← θ − α (s O + λ θ)

        scale                s, for a matrix of `in` rows and `out` columns
        "original"           √max(1, out / in)            Keller Jordan, PyTorch, Optax
        "match_rms_adamw"    0.2 √max(in, out)            Moonshot, PyTorch; rates and decays are those of AdamW
        "spectral"           √(out / in)                  arXiv:2310.17813; Scion, Dion; timm's "rms_to_rms"
        None                 1

    It is for hidden matrices. Embeddings, heads, vectors and scalars belong to another rule:

        partition({"hidden": muon(), "rest": adamw(3e-4)}, by={"hidden": "blocks/**/kernel"})

    Here rows are inputs, as in Flax; elsewhere, and for convolutions, heads, fused or scanned matrices, `views` say
    which axes are what (`MatrixView`): one for all, or one for each selector. The matrices of a leaf are made
    orthogonal one by one. `weight_decay`, `where`, `decay` and `peak` are those of `descend`.

    Args:
      learning_rate: α.
      beta: β.
      momentum: "sum" is 1 / (1 − β) times "ema", and the direction the same but for ε; a β that changes acts on the
        whole of it. "debiased" is Optax's: with `nesterov` early gradients have other weights.
      polar: the name of a list of coefficients of `NewtonSchulz`, which tells what each makes of singular values;
        "svd", exact and slow; a `NewtonSchulz(...)`; or a function from a stack (matrices, rows, columns) to another.
      scale: s; also a function of rows and columns.

    Memory: 1 slot, 4 bytes per float32 parameter; 2 slots, 8 bytes, with `decay="initial"`.

    Raises:
      TypeError, ValueError: a choice is none; when used, a leaf is no matrix or has no view (see `MatrixView`).

    Differs from PyTorch, timm and Keller Jordan's class in that it iterates in float32, not in bfloat16, which is
    `polar=NewtonSchulz(dtype="bfloat16")`; the two are some percent apart in single elements. From Keller Jordan's
    class, which scales convolutions by the sides of the filter, and holds an AdamW for other leaves. From Optax, which
    holds one, too (`adam_...`): that is `momentum="debiased"`, `polar=NewtonSchulz(eps=1e-8)` here; of its keywords
    `ns_coeffs`, `ns_steps` and `eps` are in `polar`, `consistent_rms=0.2` is `scale="match_rms_adamw"`,
    `muon_weight_dimension_numbers` are `views`, `weight_decay_mask` is `where`, and there are no `preconditioning`,
    `adaptive` and `mu_dtype`.
    """
    direction = muon_direction(beta=beta, nesterov=nesterov, momentum=momentum, polar=polar, scale=scale, views=views)
    return descend(direction, learning_rate, weight_decay, where, decay=decay, peak=peak)


@constructor
def muon_moonshot(
    learning_rate: float | Schedule = 1e-3,
    *,
    beta: float | Schedule = 0.95,
    nesterov: bool = True,
    polar: str | Polar = "original",
    views: Views = None,
    weight_decay: float | Schedule | None = 0.1,
    where: Selector | None = None,
    decay: Decay | Literal["l2"] = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule:
    """Muon as Moonshot trains with it (Liu et al. 2025, arXiv:2502.16982, Algorithm 1, and `Moonlight`).

        m ← β m + g          u = g + β m          θ ← θ − α (0.2 √max(in, out) polar(u) + λ θ)

    The scale gives updates the size that AdamW's have, so that α and λ tuned for AdamW can be kept, and one α serves
    both groups of a `partition`.

    Everything else is as in `muon`: this is muon(momentum="sum", scale="match_rms_adamw") with decay. It needs no
    oracle of its own, since both of these choices have one there.

    Memory: 1 slot, 4 bytes per float32 parameter; 2 slots, 8 bytes, with `decay="initial"`.
    """
    direction = muon_direction(
        beta=beta, nesterov=nesterov, momentum="sum", polar=polar, scale="match_rms_adamw", views=views
    )
    return descend(direction, learning_rate, weight_decay, where, decay=decay, peak=peak)


_PYTORCH = NewtonSchulz(eps_placement="max")


@constructor
def muon_pytorch(
    learning_rate: float | Schedule = 1e-3,
    *,
    beta: float | Schedule = 0.95,
    nesterov: bool = True,
    polar: str | Polar = _PYTORCH,
    scale: str | Scale | None = "original",
    views: Views = None,
    weight_decay: float | Schedule | None = 0.1,
    where: Selector | None = None,
    decay: Decay | Literal["l2"] = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule:
    """Muon (Jordan et al. 2024) as `torch.optim.Muon` has it.

        m ← m + (1 − β)(g − m)      u = (1 − β) g + β m      θ ← θ − α (√max(1, out / in) polar(u) + λ θ)

    Everything else is as in `muon`, from which it differs in the defaults of α and λ and in ε, which is a lower bound
    of the norm. PyTorch's layers store (out, in), which is `views=MatrixView(rows=-1, columns=-2)`.

    Memory: 1 slot, 4 bytes per float32 parameter; 2 slots, 8 bytes, with `decay="initial"`.

    Differs from PyTorch, which iterates in bfloat16: `polar=NewtonSchulz(eps_placement="max", dtype="bfloat16")`; and
    in keywords: `momentum` and `adjust_lr_fn` are `beta` and `scale`, and `ns_coefficients`, `ns_steps` and `eps` are
    in `polar`.
    """
    direction = muon_direction(beta=beta, nesterov=nesterov, polar=polar, scale=scale, views=views)
    return descend(direction, learning_rate, weight_decay, where, decay=decay, peak=peak)
