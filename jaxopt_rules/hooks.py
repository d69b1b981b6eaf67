"""Hooks: rules from gradient to gradient, for the places in front of a direction."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxopt_rules import numerics, trees
from jaxopt_rules.lift import leafwise, treewise
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector


class StatelessState(NamedTuple):
    """Of every rule that remembers nothing and has no hyperparameters."""

    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # nothing


# ---------------------------------------------------------------------------------------------------------------------
# Decay
# ---------------------------------------------------------------------------------------------------------------------


class WeightDecayState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # weight_decay


def _weight_decay(g: Array, *, p: Array, weight_decay: Array | None) -> Array:
    return g if weight_decay is None else g + weight_decay * p


@constructor
def weight_decay(rate: float | Schedule, where: Selector | None = None) -> Rule:
    """L2 regularisation: adds the gradient of ½ λ ‖θ‖² to the gradient.

        g ← g + λ θ

    In front of an adaptive direction the decay is divided by the root of v like the rest of the gradient;
    the decay of `step` and `adamw` is decoupled from it. `where` selects the leaves that decay; the
    hyperparameter is called `weight_decay`, and may be negative.

    Memory: none.
    """
    return leafwise(_weight_decay, WeightDecayState, where={"weight_decay": where}, weight_decay=rate)


# ---------------------------------------------------------------------------------------------------------------------
# Clipping
# ---------------------------------------------------------------------------------------------------------------------


class ClipState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # max_norm
    metrics: dict[str, Array]  # grad_norm: ()  the norm before clipping


def _clipping_factor(norm: Array, max_norm: Array) -> Array:
    return jnp.minimum(1, max_norm / (norm + 1e-6))


def _global_clipping_factor(*, grad_norm: Array, max_norm: Array) -> Array:
    return _clipping_factor(grad_norm, max_norm)


def _clip(g: Array, *, factor: Array) -> Array:
    return factor * g


@constructor
def clip_by_global_norm(max_norm: float | Schedule) -> Rule:
    """Scales all gradients by one factor so that their global norm stays below `max_norm`.

        n = √(Σ |g|²)          g ← g · min(1, c / (n + 1e-6))

    The sum runs over all gradients that take part, in float32 or wider. n is recorded as `grad_norm` in
    `metrics(state)`. As documented for `ClipGrad` and as in PyTorch's `clip_grad_norm_`: a norm of exactly c is
    scaled too, by c / (c + 1e-6). A non-finite norm propagates: an infinite gradient becomes NaN and makes the
    others 0, a NaN makes all of them NaN. max_norm = 0 makes every gradient 0, max_norm = ∞ clips nothing. In float32
    the norm is infinite already where the sum of squares is, from gradients of 1.8e19 on.

    Memory: none.

    Differs from Optax, which leaves a norm of exactly c alone and divides every element.
    """
    return leafwise(
        _clip,
        ClipState,
        measures={"grad_norm": numerics.global_norm, "factor": _global_clipping_factor},
        metrics=("grad_norm",),
        max_norm=max_norm,
    )


clip_grad = clip_by_global_norm


class ClipByLeafNormState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # max_norm


def _clip_by_leaf_norm(g: Array, *, norm: Array, max_norm: Array) -> Array:
    return _clipping_factor(norm, max_norm) * g


@constructor
def clip_by_leaf_norm(max_norm: float | Schedule) -> Rule:
    """Scales each gradient so that its own norm stays below `max_norm`.

        n = ‖g‖          g ← g · min(1, c / (n + 1e-6))          for each array

    The directions of the arrays relative to each other change, unlike under `clip_by_global_norm`, whose 1e-6 and whose
    treatment of what is not finite it shares, array by array.

    Memory: none.

    Differs from Keras (`clipnorm`) by the 1e-6.
    """
    return leafwise(_clip_by_leaf_norm, ClipByLeafNormState, sums={"norm": numerics.norm}, max_norm=max_norm)


class ClipByBlockRmsState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # threshold


def _bounded(norm: Array, bound: Array) -> Array:
    """1 / max(1, n / b), the factor that brings a norm n down to b; also for b = 0, where 0 / 0 would be NaN."""
    return 1 / jnp.maximum(1, norm / jnp.maximum(bound, jnp.finfo(norm.dtype).tiny))


def _clip_by_block_rms(g: Array, *, rms: Array, threshold: Array) -> Array:
    return _bounded(rms, threshold) * g


@constructor
def clip_by_block_rms(threshold: float | Schedule) -> Rule:
    """Bounds the root mean square of each gradient (Shazeer & Stern 2018, arXiv:1804.04235, section 6).

        g ← g / max(1, rms(g) / c)          rms(g) = √(mean |g|²), for each array

    The paper clips the update of Adafactor by it (c = 1): it also stands behind a direction.

    Memory: none.
    """
    return leafwise(_clip_by_block_rms, ClipByBlockRmsState, sums={"rms": numerics.rms}, threshold=threshold)


class ClipByValueState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # max_value


def _clip_by_value(g: Array, *, max_value: Array) -> Array:
    return jnp.clip(g, -max_value, max_value)


@constructor
def clip_by_value(max_value: float | Schedule) -> Rule:
    """Clips each element.

        g ← min(max(g, −c), c)

    An infinite element becomes ±c, a NaN stays one. Complex gradients are refused.

    Memory: none. In front of a norm (`clip_by_global_norm`) XLA keeps what the norm is of: a leaf or two under jax
    0.10, all of them under 0.12.
    """
    return leafwise(_clip_by_value, ClipByValueState, ordered=True, max_value=max_value)


Axis = int | Sequence[int] | None


def _unit_axes(x: Array, axis: Axis) -> tuple[int, ...] | None:
    """The axes that one unit extends over: `None` for all of them."""
    if x.ndim < 2:
        return None
    axes = tuple(range(x.ndim - 1)) if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    if not all(-x.ndim <= a < x.ndim for a in axes):
        raise ValueError(
            f"axis {axis} does not fit an array of shape {x.shape}; masked(rule, where) keeps a rule to some arrays"
        )
    return axes


def _check_axis(axis: Axis, owner: str) -> None:
    axes = (axis,) if isinstance(axis, int) else () if axis is None else axis
    if not (isinstance(axes, Sequence) and all(isinstance(a, int) and not isinstance(a, bool) for a in axes)):
        raise TypeError(f"{owner}: axis is an integer, a sequence of integers, or None, not {axis!r}")


class AdaptiveGradClipState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # clipping, eps


@dataclass(frozen=True)
class _UnitFactor:
    axis: Axis

    def __call__(self, g: Array, *, p: Array, clipping: Array | None, eps: Array) -> Array | None:
        if clipping is None:
            return None
        axes = _unit_axes(g, self.axis)
        return _bounded(numerics.norm(g, axes), clipping * jnp.maximum(numerics.norm(p, axes), eps))


def _adaptive_grad_clip(g: Array, *, factor: Array | None) -> Array:
    return g if factor is None else factor * g


@constructor
def adaptive_grad_clip(
    clipping: float | Schedule = 0.01,
    eps: float | Schedule = 1e-3,
    axis: Axis = None,
    where: Selector | None = None,
) -> Rule:
    """AGC: bounds the gradient of each unit by the norm of its weights (Brock et al. 2021, arXiv:2102.06171).

        g ← g · min(1, λ max(‖θ‖, ε) / ‖g‖)          for each unit i of an array: g = G_i, θ = W_i

    A unit is what feeds one output: all axes of an array but the last, where JAX's layers have their outputs
    (`(in, out)`, `HWIO`); of a vector or scalar, the whole. `where` selects the leaves that are clipped: the paper
    leaves out the last linear layer.

    Args:
      clipping: λ.
      eps: the least norm that weights are taken to have, so that weights of zero can leave it.
      axis: the axes that one unit extends over, in arrays of two axes and more, in place of all but the last: 0 for
        attention kernels `(in, heads, size)`, `(1, 2, 3)` for PyTorch's `OIHW`.

    Memory: none.

    Differs from Optax, where `axis=None` means axis 0 in arrays of three axes, the whole for matrices with one row or
    column, and an error for six axes and more; where `axis` is for vectors, too; and where ‖g‖ is at least 1e-6.
    """
    _check_axis(axis, "adaptive_grad_clip")
    return leafwise(
        _adaptive_grad_clip,
        AdaptiveGradClipState,
        sums={"factor": _UnitFactor(_frozen_axis(axis))},
        where={"clipping": where},
        clipping=clipping,
        eps=eps,
    )


def _frozen_axis(axis: Axis) -> Axis:
    return axis if axis is None or isinstance(axis, int) else tuple(axis)


# ---------------------------------------------------------------------------------------------------------------------
# Filters
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _UnitMean:
    axis: Axis

    def __call__(self, g: Array) -> Array | None:
        axes = _unit_axes(g, self.axis)
        return None if axes is None else jnp.mean(g, axes, keepdims=True)


def _centralize(g: Array, *, mean: Array | None) -> Array:
    return g if mean is None else g - mean


@constructor
def centralize(axis: Axis = None) -> Rule:
    """Gradient centralization (Yong et al. 2020, arXiv:2004.01461): the gradient of each unit has mean 0.

        g ← g − mean(g)          for each unit of an array with two axes and more

    A unit is what feeds one output: all axes but the last, where JAX's layers have their outputs. `axis` names the
    axes that the mean is taken over instead. Vectors and scalars pass unchanged.

    Memory: none. In front of a norm (`clip_by_global_norm`) XLA keeps what the norm is of: a leaf or two under jax
    0.10, all of them under 0.12.

    Differs from Optax, which takes the mean over all axes but the first: the layout of PyTorch, here `axis=1` for
    matrices, `axis=(1, 2, 3)` for `OIHW`.
    """
    _check_axis(axis, "centralize")
    return leafwise(_centralize, StatelessState, sums={"mean": _UnitMean(_frozen_axis(axis))})


def _infinity() -> Array:
    return jnp.array(jnp.inf)


def _zero_nonfinite(g: Array, *, infinity: Array) -> Array:
    return jnp.where(jnp.abs(g) < infinity, g, 0)


@constructor
def zero_nonfinite() -> Rule:
    """Puts 0 in place of every element that is infinite or NaN.

        g ← g where finite, else 0

    The other elements take their step. A step that is not to be taken at all is for `skip_nonfinite`.

    Memory: none. In front of a norm (`clip_by_global_norm`) XLA keeps what the norm is of.

    Differs from Optax's `zero_nans`, which lets infinities pass and records where there were NaNs.
    """
    # Measured, and so a number of its own for each time that this is computed: a norm behind it is to have its own.
    return leafwise(_zero_nonfinite, StatelessState, measures={"infinity": _infinity})


class AddNoiseState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # eta, gamma
    key: Array  # ()  PRNG key, never changed: noise comes from it, the count, and the leaf's path


def _add_noise(g: Array, *, key: Array, t: Array, eta: Array, gamma: Array) -> Array:
    sigma = numerics.sqrt(eta * t**-gamma)
    return g + sigma * jax.random.normal(key, g.shape, g.dtype)


@constructor
def add_noise(eta: float | Schedule, gamma: float | Schedule = 0.55, key: int | Array = 0) -> Rule:
    """Gaussian noise that fades (Neelakantan et al. 2015, arXiv:1511.06807).

        g ← g + σ N(0, 1)          σ² = η / (1 + count)^γ

    The noise of a leaf depends on the key, the count and the leaf's path, not on what other leaves there are. Complex
    gradients receive circular noise with E|σ N|² = σ².

    Args:
      key: a seed or a typed key (`jax.random.key(0)`).

    Memory: one key. In a compiled step XLA makes the noise in temporaries of four times the size of the gradients.

    Differs from Optax, whose key moves on with every update: here the state's key stays, and a run that resumes at some
    count goes on with the noise of that count.
    """
    return leafwise(_add_noise, AddNoiseState, key=key, eta=eta, gamma=gamma)


class EmaState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # one_minus_decay
    m: Any  # like θ, float32 or wider: running mean of g


def _ema(g: Array, m: Array, *, one_minus_decay: Array) -> tuple[Array, tuple[Array]]:
    m = numerics.ema(m, g, one_minus_decay)
    return m, (m,)


def _debiased_ema(g: Array, m: Array, *, t: Array, one_minus_decay: Array) -> tuple[Array, tuple[Array]]:
    m = numerics.ema(m, g, one_minus_decay)
    return numerics.debias(m, one_minus_decay, t), (m,)


@constructor
def ema(decay: float | Schedule, debias: bool = True) -> Rule:
    """The running mean of gradients in place of the gradient.

        m ← m + (1 − β)(g − m)          g ← m / (1 − βᵗ), or m without `debias`

    Memory: 1 slot, 4 bytes per float32 parameter.

    Differs from `trace` and `momentum_direction`, whose sum of gradients has weights 1, μ, μ², ...: 1 / (1 − μ) times
    as much.
    """
    return leafwise(_debiased_ema if debias else _ema, EmaState, decay=decay)


class GrokfastState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # one_minus_decay, factor
    m: Any  # like θ, float32 or wider: running mean of g, from the first g on


def _grokfast(g: Array, m: Array, *, t: Array, one_minus_decay: Array, factor: Array) -> tuple[Array, tuple[Array]]:
    m = numerics.ema(m, g, jnp.where(t == 1, 1, one_minus_decay))
    return g + factor * m, (m,)


@constructor
def grokfast(decay: float | Schedule = 0.98, factor: float | Schedule = 2.0) -> Rule:
    """Grokfast-EMA: amplifies the slow part of the gradient (Lee et al. 2024, arXiv:2405.20233).

        μ ← α μ + (1 − α) g, and g in the first update          g ← g + λ μ

    Memory: 1 slot, 4 bytes per float32 parameter.

    As in the authors' code μ begins as the first gradient; that of a parameter without a gradient in the first update
    begins at 0.
    """
    return leafwise(_grokfast, GrokfastState, decay=decay, factor=factor)


# ---------------------------------------------------------------------------------------------------------------------
# Building blocks
# ---------------------------------------------------------------------------------------------------------------------


class ScaleState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # factor


def _scale(g: Array, *, factor: Array) -> Array:
    return factor * g


@constructor
def scale(factor: float | Schedule) -> Rule:
    """Multiplies by a number what passes, wherever in a chain it stands.

        g ← f g

    In front of Adam it changes next to nothing; behind the terminal it multiplies the learning rate.

    Memory: none.
    """
    return leafwise(_scale, ScaleState, place="anywhere", factor=factor)


def _zero(g: Array) -> Array:
    return jnp.zeros_like(g)


@constructor
def set_to_zero() -> Rule:
    """Puts 0 in place of what passes: a hook, or in `partition` the whole rule of a group.

        g ← 0

    Parameters that are not trained are better left out by `freeze`, which gives them no update, and no decay either.

    Memory: none.
    """
    return leafwise(_zero, StatelessState, place=None)


@dataclass(frozen=True)
class _OfGradients:
    fn: Callable[[Any], Any]

    def __call__(self, grads: Any) -> Any:
        return _like(grads, self.fn(_widened(grads)))


@dataclass(frozen=True)
class _OfGradientsAndParameters:
    fn: Callable[[Any, Any], Any]

    def __call__(self, grads: Any, *, p: Any) -> Any:
        return _like(grads, self.fn(_widened(grads), _widened(p)))


def _widened(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(numerics.widened(x.dtype)), tree)


def _like(grads: Any, result: Any) -> Any:
    gs, treedef = trees.flatten(grads)
    outs = trees.align(treedef, result, "what the function of `stateless` returns")
    for k, (out, g) in enumerate(zip(outs, gs, strict=True)):
        trees.check_gradient(lambda k=k: trees.paths(grads)[k], out, g, "result of the function of `stateless`")
    return _widened(jax.tree.unflatten(treedef, outs))


@constructor
def stateless(fn: Callable[..., Any]) -> Rule:
    """A hook or a direction from a function of whole trees that remembers nothing.

        g ← fn(g), or fn(g, θ) where it takes two arguments

        stateless(lambda grads: jax.tree.map(jnp.tanh, grads))

    The function is pure and is traced by `jax.jit`. It sees arrays in float32 or wider, and `None` in place of what is
    absent, over which `jax.tree.map` passes; it returns a tree like the gradients. Rules made from one function are
    equal. For a function of one array that has hyperparameters or memory there is `leafwise`.

    Memory: none.

    Raises:
      TypeError: `fn` is no function of one or two arguments.
      ValueError: in `update`, it returns a tree or an array of another shape.
    """
    arguments = _positional(fn)
    if arguments not in (1, 2):
        raise TypeError(f"stateless takes a function of gradients, or of gradients and parameters, not {fn!r}")
    return treewise(_OfGradients(fn) if arguments == 1 else _OfGradientsAndParameters(fn), StatelessState)


def _positional(fn: Any) -> int:
    """The number of positional arguments of a function; 0 of what is none."""
    if not callable(fn):
        return 0
    kinds = [p.kind for p in inspect.signature(fn).parameters.values()]
    return sum(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)
