"""The arithmetic that every rule shares: running means, bias corrections, norms, and the precision they use."""

from typing import Any, Literal, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike


def widened(dtype: DTypeLike) -> jnp.dtype:
    """The precision that arithmetic on `dtype` is done in: float32, or `dtype` itself where that is wider."""
    dtype = jnp.dtype(jax.dtypes.canonicalize_dtype(dtype))  # float32 for NumPy's float64 among 32-bit types
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else dtype


def real(dtype: DTypeLike) -> jnp.dtype:
    """The real type of a complex `dtype`; a real `dtype` itself."""
    return jnp.dtype(jnp.finfo(dtype).dtype)


def is_inexact(x: object) -> TypeGuard[Array]:
    """Whether `x` is an array (or the shape of one) of real or complex floating-point numbers."""
    if isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return jnp.issubdtype(x.dtype, jnp.inexact)
    return False


@jax.custom_jvp
def sqrt(x: Array) -> Array:
    """√x whose derivative at 0 is 0, so that a gradient taken through an update meets no ∞ · 0."""
    return jnp.sqrt(x)


@sqrt.defjvp
def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    root = sqrt(x)
    nonzero = root != 0
    return root, jnp.where(nonzero, 0.5 / jnp.where(nonzero, root, 1), 0) * dx


@jax.custom_jvp
def one_minus_power(one_minus_b: Array, t: Array) -> Array:
    """1 − bᵗ from 1 − b, as −expm1(t · log1p(−(1 − b))): no cancellation for b near 1, and right for b = 0."""
    return -jnp.expm1(t * jnp.log1p(-one_minus_b))


@one_minus_power.defjvp
def _(primals, tangents):
    (c, t), (dc, _) = primals, tangents
    return one_minus_power(c, t), t * (1 - c) ** (t - 1) * dc


def ema(mean: Array, x: Array, one_minus_b: Array) -> Array:
    """m ← m + (1 − b)(x − m), the running mean with decay rate b.

    A real mean that is ∞ stays ∞, without the NaN of ∞ − ∞: the square of one finite gradient may be too large for v,
    which then stops its element, as where the mean is written b m + (1 − b) x.
    """
    held = mean if jnp.iscomplexobj(mean) else jnp.minimum(mean, jnp.finfo(jnp.result_type(mean)).max)
    return mean + one_minus_b * (x - held)


def debias(mean: Array, one_minus_b: Array, t: Array) -> Array:
    """m / (1 − bᵗ): what a running mean that began at zero says after `t` values."""
    return mean / one_minus_power(one_minus_b, t)


# Where ε stands in m / √v. The field has all four, and they differ by more than a rounding wherever |g| is near ε.
Epsilon = Literal["outside", "hat", "inside", "max"]


def check_epsilon(where: str) -> None:
    """Refuses what is no place for ε.

    Raises:
      ValueError: names the places.
    """
    if where not in ("outside", "hat", "inside", "max"):
        raise ValueError(f'eps_placement is "outside", "hat", "inside" or "max", not {where!r}')


def over_root(m: Array, v: Array, eps: Array, where: Epsilon, correction: ArrayLike = 1) -> Array:
    """m / √(v / c) with ε where `where` says; c is the bias correction of v.

    outside   m / (√(v / c) + ε)     Kingma & Ba, Algorithm 1; PyTorch, Optax
    hat       √c m / (√v + ε)        the same authors, end of section 2; Keras, TensorFlow
    inside    m / √(v / c + ε)       Optax's `eps_root`, TensorFlow's RMSProp
    max       m / max(√(v / c), ε)   HeavyBall, ADOPT

    0 / 0, of a zero gradient without ε, is 0.
    """
    if where == "hat":
        return quotient(sqrt(jnp.asarray(correction, jnp.result_type(v))) * m, sqrt(v) + eps, otherwise=0)
    v = v / correction
    if where == "outside":
        return quotient(m, sqrt(v) + eps, otherwise=0)
    if where == "inside":
        return quotient(m, sqrt(v + eps), otherwise=0)
    return quotient(m, jnp.maximum(sqrt(v), eps), otherwise=0)


def abs2(x: Array) -> Array:
    """|x|², real for a complex `x`."""
    return x.real**2 + x.imag**2 if jnp.iscomplexobj(x) else x * x


def norm(x: Array, axes: tuple[int, ...] | None = None) -> Array:
    """√(Σ |x|²) over an array that was widened before; over these axes of it, which are kept with length 1."""
    return sqrt(jnp.sum(abs2(x), axes, keepdims=axes is not None))


def rms(x: Array) -> Array:
    """√(mean |x|²) of an array that was widened before; 0 of an empty one."""
    return sqrt(jnp.sum(abs2(x)) / max(x.size, 1))


def quotient(x: ArrayLike, y: Array, otherwise: float) -> Array:
    """x / y, and `otherwise` where y = 0, there with derivative 0."""
    nonzero = y != 0
    return jnp.where(nonzero, x / jnp.where(nonzero, y, 1), otherwise)


def read_wide(x: Array) -> Array:
    """`x` in float32 or wider, for a sum over it that another use of `x` waits for.

    Arrays narrower than float32 are read behind an optimization barrier. Without it XLA widens them once for
    the sum and for whatever else reads them, and keeps that wide copy of the whole tree in memory.
    """
    wide = widened(x.dtype)
    return x if x.dtype == wide else lax.optimization_barrier(x).astype(wide)


def sum_of_squares(tree: Any) -> Array:
    """Σ |x|² over all inexact arrays of a tree, summed in float32 or wider; 0 for an empty tree."""
    return sum((jnp.sum(abs2(read_wide(x))) for x in jax.tree.leaves(tree) if is_inexact(x)), jnp.float32(0))


def global_norm(tree: Any) -> Array:
    """√(Σ |x|²) over all inexact arrays of a tree, summed in float32 or wider; 0 for an empty tree."""
    return sqrt(sum_of_squares(tree))


def scale(factor: ArrayLike, x: Array) -> Array:
    """factor · x, in the widened precision of `x` whatever the precision of the scalar `factor`."""
    wide = widened(x.dtype)
    return jnp.asarray(factor, real(wide)) * x.astype(wide)
