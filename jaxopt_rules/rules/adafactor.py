"""Adafactor: the mean of |g|² kept as the means of its rows and columns, and steps relative to the parameters."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxopt_rules.compose import chain
from jaxopt_rules.lift import leafwise, real_zeros
from jaxopt_rules.matrices import MatrixView, Views, viewed
from jaxopt_rules.numerics import abs2, ema, is_inexact, quotient, rms, sqrt
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.schedules import Linear, Schedule
from jaxopt_rules.select import Selector

Factoring = Literal["largest", "last"] | Views
AdafactorEpsilon = Literal["inside", "max"]
AdafactorDecay = Literal["decoupled", "scaled", "fixed"]


class Factors(NamedTuple):
    rows: Array  # mean over the columns of each row; the axes that it was taken over have length 1
    columns: Array  # mean over the rows of each column, likewise


class AdafactorState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # decay_rate, decay_offset, eps; clipping_threshold where there is one
    v: Any  # float32 or wider, real: running mean of |g|², like θ or as its `Factors`


class AdafactorStepState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # learning_rate; min_rms, weight_decay where they have a part


class AdafactorMomentumState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # one_minus_momentum, learning_rate; min_rms, weight_decay where they have a part
    m: Any  # like θ, float32 or wider: running mean of α_t d


def _second_moment(p: Any, view: MatrixView | None) -> Array | Factors:
    zero = real_zeros(p)
    if view is None:
        return zero
    return Factors(jnp.sum(zero, view.columns, keepdims=True), jnp.sum(zero, view.rows, keepdims=True))


def _mean(mean: Array, x: Array, one_minus_b: Array) -> Array:
    """β v + (1 − β) x, in this form since it is x to the bit for β = 0, as in every update up to t₀ + 1."""
    return (1 - one_minus_b) * jnp.minimum(mean, jnp.finfo(mean.dtype).max) + one_minus_b * x


def _unclipped(
    g: Array,
    v: Any,
    *,
    t: Array,
    view: MatrixView | None,
    decay_rate: Array,
    decay_offset: Array,
    eps: Array,
    eps_placement: AdafactorEpsilon,
) -> tuple[Array, tuple[Any]]:
    one_minus_b2 = jnp.maximum(t - decay_offset, 1) ** -decay_rate
    inside = eps if eps_placement == "inside" else 0
    # 1 / √V̂ from the roots of its factors: R C may leave the range of float32 where V̂ does not.
    if view is None:
        v = _mean(v, abs2(g) + inside, one_minus_b2)
        over_root = 1 / jnp.maximum(sqrt(v), jnp.finfo(v.dtype).tiny ** 0.5)
    else:
        # Added behind the means, where XLA does not keep g² + ε for both of them.
        rows = _mean(v.rows, jnp.mean(abs2(g), view.columns, keepdims=True) + inside, one_minus_b2)
        columns = _mean(v.columns, jnp.mean(abs2(g), view.rows, keepdims=True) + inside, one_minus_b2)
        mean = jnp.mean(rows, view.rows, keepdims=True)
        if eps_placement == "max":
            mean = jnp.maximum(mean, eps)
        over_root = quotient(sqrt(mean), sqrt(rows), otherwise=0) * quotient(1, sqrt(columns), otherwise=0)
        v = Factors(rows, columns)
    if eps_placement == "max":
        over_root = jnp.minimum(over_root, quotient(1, eps, otherwise=jnp.inf))
    return over_root * g, (v,)


def _clip(
    g: Array,
    v: Any,
    *,
    t: Array,
    view: MatrixView | None,
    decay_rate: Array,
    decay_offset: Array,
    eps: Array,
    clipping_threshold: Array,
    eps_placement: AdafactorEpsilon,
) -> Array:
    """1 / max(1, rms(U) / c)"""
    u, _ = _unclipped(
        g,
        v,
        t=t,
        view=view,
        decay_rate=decay_rate,
        decay_offset=decay_offset,
        eps=eps,
        eps_placement=eps_placement,
    )
    return jnp.minimum(1, quotient(clipping_threshold, rms(u), otherwise=1))


def _adafactor(
    g: Array,
    v: Any,
    *,
    t: Array,
    view: MatrixView | None,
    decay_rate: Array,
    decay_offset: Array,
    eps: Array,
    clip: Array,
    eps_placement: AdafactorEpsilon,
) -> tuple[Array, tuple[Any]]:
    u, slots = _unclipped(
        g,
        v,
        t=t,
        view=view,
        decay_rate=decay_rate,
        decay_offset=decay_offset,
        eps=eps,
        eps_placement=eps_placement,
    )
    return clip * u, slots


def _step_size(p: Array, t: Array, learning_rate: Array, min_rms: Array | None, relative_step: bool) -> Array:
    """α_t of the paper."""
    rho = jnp.minimum(learning_rate, t**-0.5) if relative_step else learning_rate
    return rho if min_rms is None else jnp.maximum(min_rms, rms(p)) * rho


def _decayed(
    p: Array, learning_rate: Array, size: Array, weight_decay: Array | None, decay: AdafactorDecay
) -> Array | float:
    """What decay takes off a parameter."""
    if weight_decay is None:
        return 0.0
    return {"decoupled": learning_rate, "scaled": size, "fixed": 1}[decay] * weight_decay * p


def _step(
    d: Array,
    *,
    p: Array,
    t: Array,
    learning_rate: Array,
    min_rms: Array | None = None,
    weight_decay: Array | None = None,
    relative_step: bool,
    decay: AdafactorDecay,
) -> Array:
    size = _step_size(p, t, learning_rate, min_rms, relative_step)
    return -size * d - _decayed(p, learning_rate, size, weight_decay, decay)


def _step_with_momentum(
    d: Array,
    m: Array,
    *,
    p: Array,
    t: Array,
    one_minus_momentum: Array,
    learning_rate: Array,
    min_rms: Array | None = None,
    weight_decay: Array | None = None,
    relative_step: bool,
    decay: AdafactorDecay,
) -> tuple[Array, tuple[Array]]:
    size = _step_size(p, t, learning_rate, min_rms, relative_step)
    m = ema(m, size * d, one_minus_momentum)
    return -m - _decayed(p, learning_rate, size, weight_decay, decay), (m,)


Given = Callable[[Sequence[str], Sequence[Any]], list[Any]]


def _by_shape(largest: bool, least: int) -> Given:
    """The view of the two largest or of the last two axes, where both have at least this size."""

    def view(shape: tuple[int, ...]) -> MatrixView | None:
        axes = range(-len(shape), 0)
        rows, columns = (sorted(axes, key=shape.__getitem__) if largest else axes)[-2:]
        return MatrixView(rows, columns) if min(shape[rows], shape[columns]) >= least else None

    def of_leaves(paths: Sequence[str], leaves: Sequence[Any]) -> list[MatrixView | None]:
        return [view(x.shape) if is_inexact(x) and x.ndim > 1 and x.size > 0 else None for x in leaves]

    return of_leaves


def _not_factored(paths: Sequence[str], leaves: Sequence[Any]) -> list[MatrixView | None]:
    return [None] * len(leaves)


def _by_views(views: Views) -> Given:
    """The view that is meant for each leaf, which has no parts."""
    meant = viewed(views, "adafactor", partial=True)

    def of_leaves(paths: Sequence[str], leaves: Sequence[Any]) -> list[MatrixView | None]:
        found = meant(paths, leaves)
        for view in found:
            if view is not None and view.parts != 1:
                raise ValueError(
                    f"adafactor: the means of a matrix belong to all of it, without parts: leave out those of {view!r}"
                )
        return [None if view is None or x.size == 0 else view for view, x in zip(found, leaves, strict=True)]

    return of_leaves


@constructor
def adafactor_direction(
    min_dim_size_to_factor: int = 128,
    decay_rate: float | Schedule = 0.8,
    decay_offset: float | Schedule = 0,
    clipping_threshold: float | Schedule | None = 1.0,
    eps: float | Schedule = 1e-30,
    *,
    eps_placement: AdafactorEpsilon = "inside",
    views: Factoring = "largest",
) -> Rule:
    """The direction U of `adafactor`, before any rate, for chains of your own."""
    if eps_placement not in ("inside", "max"):
        raise ValueError(f'adafactor: eps_placement is "inside" or "max", not {eps_placement!r}')
    if isinstance(views, str) and views not in ("largest", "last"):
        raise ValueError(
            f'adafactor: views is "largest", "last", a MatrixView, or one for each selector, not {views!r}'
        )
    if views is None:
        view = _not_factored
    elif isinstance(views, str):
        view = _by_shape(views == "largest", min_dim_size_to_factor)
    else:
        view = _by_views(views)
    clipped: dict[str, Any] = {"sums": {"clip": _clip}, "clipping_threshold": clipping_threshold}
    return leafwise(
        _unclipped if clipping_threshold is None else _adafactor,
        AdafactorState,
        slots={"v": _second_moment},
        given={"view": view},
        static={"eps_placement": eps_placement},
        decay_rate=decay_rate,
        decay_offset=decay_offset,
        eps=eps,
        **({} if clipping_threshold is None else clipped),
    )


@constructor
def adafactor(
    learning_rate: float | Schedule | None = None,
    min_dim_size_to_factor: int = 128,
    decay_rate: float | Schedule = 0.8,
    decay_offset: float | Schedule = 0,
    multiply_by_parameter_scale: bool = True,
    clipping_threshold: float | Schedule | None = 1.0,
    momentum: float | Schedule | None = None,
    *,
    eps: float | Schedule = 1e-30,
    eps_placement: AdafactorEpsilon = "inside",
    factored: bool = True,
    views: Factoring = "largest",
    relative_step: bool | None = None,
    min_rms: float | Schedule = 1e-3,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    decay: AdafactorDecay = "decoupled",
) -> Rule:
    """Adafactor (Shazeer & Stern 2018, arXiv:1804.04235, Algorithms 4 and 5).

        β̂₂ = 1 − max(t − t₀, 1)^(−c)                  R, C: of each row, of each column
        R ← β̂₂ R + (1 − β̂₂) mean(|g|² + ε₁)            C ← β̂₂ C + (1 − β̂₂) mean(|g|² + ε₁)
        V̂ = R C / mean(R)                             where θ is not factored, V̂ ← β̂₂ V̂ + (1 − β̂₂)(|g|² + ε₁)
        U = g / √V̂                                    U ← U / max(1, rms(U) / d)

        ρ = min(α, 1 / √t) with `relative_step`, else α
        α_t = ρ max(ε₂, rms(θ))                       θ ← θ − α_t U

        adafactor()                                                   # the paper's; T5's
        adafactor(Warmup(Cosine(1e-2, steps), 1000), momentum=0.9)

    Args:
      learning_rate: α. `None` is the paper's: 1e-2, with `relative_step`.
      min_dim_size_to_factor: what the second largest axis needs to be factored ("last": the smaller of the two).
      decay_rate, decay_offset: c, and t₀ for a run that goes on from a checkpoint.
      multiply_by_parameter_scale: without it, α_t = ρ.
      clipping_threshold: d; `None` does not clip.
      momentum: β₁ of a running mean of α_t U in the place of α_t U. It contains the rate, and is not corrected for its
        start at 0.
      eps, eps_placement: ε₁, "inside" as above; "max": not in R, C and V̂, but a least value of mean(R) and of √V̂.
      factored, views: which axes are rows and columns: the two "largest" (with equal ones, the last of them), or the
        "last" two; or a `MatrixView`, or one for each selector: they factor whatever the size, and what has none, or
        has fewer than two axes, is not factored. The other axes count matrices.
      relative_step: by default, where there is no `learning_rate`. Warmup as in the paper is
        `adafactor(Linear(1e-6, 9999, 1e-2), relative_step=True)`: ρ = min(10⁻⁶ t, 1 / √t).
      min_rms: ε₂.
      decay: what is taken off θ beside the step. "decoupled" α λ θ, "scaled" α_t λ θ, or "fixed" λ θ.

    `adafactor_pytorch` and `adafactor_transformers` have these libraries' choices:

                        factored             ε₁                  α_t                       momentum    decay
        T5X, Optax      largest, from 128    1e-30 inside        α · scale                 of α_t U    fixed
        PyTorch         last two             1.2e-7 max          min(α, 1 / √t) · scale    none        decoupled
        transformers    last two             1e-30 inside        relative or α, · scale    of α_t U    scaled

    Momentum in front of the rate, the other forms of decay, and other steps are chains:

        descend(chain(adafactor_direction(), ema(0.9, debias=False)), 1e-3, 0.1, decay="independent")

    Memory: of m rows and n columns 4 (m + n) bytes for each matrix; 4 bytes for each parameter that is not factored;
    with momentum 4 bytes more for each parameter. During the update XLA keeps one copy of the gradients.

    Raises:
      ValueError: a choice is none; `relative_step=False` without a rate; when used, a view does not fit.

    Differs from Optax where there is no `learning_rate`: there α is 1, with neither a bound nor 1 / √t; where t ≤ t₀,
    which is NaN there; in β̂₂, which Optax computes in float32; and in keywords: `weight_decay_rate` is `weight_decay`
    with `decay="fixed"`, `weight_decay_mask` is `where`, and there is no `dtype_momentum`. From timm's, which factors
    by other sizes and axes, and multiplies by the parameter scale under the relative step alone.
    """
    if decay not in ("decoupled", "scaled", "fixed"):
        raise ValueError(
            f'adafactor: decay is "decoupled", "scaled" or "fixed", not {decay!r}; '
            "for other forms: descend(adafactor_direction(), learning_rate, weight_decay, decay=...)"
        )
    if learning_rate is None and relative_step is False:
        raise ValueError("adafactor: without the relative step there must be a learning_rate, such as 1e-3")
    relative = learning_rate is None if relative_step is None else relative_step
    direction = adafactor_direction(
        min_dim_size_to_factor,
        decay_rate,
        decay_offset,
        clipping_threshold,
        eps,
        eps_placement=eps_placement,
        views=views if factored else None,
    )
    of_step: dict[str, Any] = {
        "static": {"relative_step": relative, "decay": decay},
        "where": {"weight_decay": where},
        "place": "end",
        "learning_rate": 1e-2 if learning_rate is None else learning_rate,
        "min_rms": min_rms if multiply_by_parameter_scale else None,
        "weight_decay": weight_decay,
    }
    if momentum is None:
        return chain(direction, leafwise(_step, AdafactorStepState, **of_step))
    return chain(direction, leafwise(_step_with_momentum, AdafactorMomentumState, momentum=momentum, **of_step))


@constructor
def adafactor_pytorch(
    learning_rate: float | Schedule = 1e-2,
    decay_rate: float | Schedule = 0.8,
    eps: float | Schedule = 2**-23,
    min_rms: float | Schedule = 1e-3,
    clipping_threshold: float | Schedule = 1.0,
    *,
    views: Factoring = "last",
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
) -> Rule:
    """Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) as `torch.optim.Adafactor` has it.

        θ ← θ − min(α, 1 / √t) max(ε₂, rms(θ)) U − α λ θ          V̂ = R C / max(mean(R), ε₁), U = g / max(√V̂, ε₁)

    Where |g| is near ε₁ or √ε₁ it is another method than that of the paper: gradients of 1e-7 take steps that are
    some 20 % apart.

    Args:
      learning_rate, decay_rate, eps, min_rms, clipping_threshold: `lr`, minus `beta2_decay`, the two of `eps`, `d`.
      views: those of `adafactor`. "last" is PyTorch's, in PyTorch's layout: there a convolution is factored as here one
        of (h, w, in, out) is by `[(by_ndim(2), MatrixView()), (by_ndim(4), MatrixView(rows=-4, columns=-3))]`.

    Memory: of m rows and n columns 4 (m + n) bytes; 4 bytes for each other parameter.

    Differs from PyTorch in the default of ε₁, the float32 epsilon for every precision: PyTorch takes that of the first
    parameter.
    """
    return adafactor(
        learning_rate,
        1,
        decay_rate,
        clipping_threshold=clipping_threshold,
        eps=eps,
        eps_placement="max",
        views=views,
        relative_step=True,
        min_rms=min_rms,
        weight_decay=weight_decay,
        where=where,
        decay="decoupled",
    )


@constructor
def adafactor_transformers(
    learning_rate: float | Schedule | None = None,
    eps: float | Schedule = 1e-30,
    min_rms: float | Schedule = 1e-3,
    clipping_threshold: float | Schedule = 1.0,
    decay_rate: float | Schedule = 0.8,
    momentum: float | Schedule | None = None,
    *,
    multiply_by_parameter_scale: bool = True,
    warmup_init: bool = False,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
) -> Rule:
    """Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) as transformers and fairseq have it.

        m ← β₁ m + (1 − β₁) α_t U          θ ← θ − m − α_t λ θ          α_t = ρ max(ε₂, rms(θ))

    Without `learning_rate` ρ = min(1e-2, 1 / √t), or min(10⁻⁶ t, 1 / √t) with `warmup_init`; else it is that.

    Args:
      learning_rate: `lr`, with `relative_step=False`; `None` is `relative_step=True`.
      eps, min_rms, clipping_threshold, decay_rate, momentum: the two of `eps`, `clip_threshold`, minus `decay_rate`,
        `beta1`.
      multiply_by_parameter_scale: `scale_parameter`.

    Memory: of m rows and n columns 4 (m + n) bytes, 4 bytes for each parameter that is no matrix; with momentum 4 bytes
    more for each parameter.

    Raises:
      ValueError: `warmup_init` beside a learning rate.
    """
    if warmup_init and learning_rate is not None:
        raise ValueError("adafactor_transformers: warmup_init belongs to the relative step, without learning_rate")
    return adafactor(
        Linear(1e-6, 9999, 1e-2) if warmup_init else learning_rate,
        1,
        decay_rate,
        multiply_by_parameter_scale=multiply_by_parameter_scale,
        clipping_threshold=clipping_threshold,
        momentum=momentum,
        eps=eps,
        views="last",
        relative_step=learning_rate is None,
        min_rms=min_rms,
        weight_decay=weight_decay,
        where=where,
        decay="scaled",
    )
