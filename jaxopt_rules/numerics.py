"""The arithmetic that every rule shares: running means, bias corrections, norms, and the precision they use."""

from collections.abc import Sequence
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
    """m ← m + (1 − b)(x − m), the running mean with decay rate b."""
    return mean + one_minus_b * (x - mean)


def ema_of_squares(mean: Array, x: Array, one_minus_b: Array) -> Array:
    """v ← v + (1 − b)(x − v) for x ≥ 0, such as |g|².

    A mean that is ∞ stays ∞, without the NaN of ∞ − ∞: the square of one finite gradient may be too large for v, which
    then stops its element, as where the mean is written b v + (1 − b) x.
    """
    return mean + one_minus_b * (x - jnp.minimum(mean, jnp.finfo(jnp.result_type(mean)).max))


def debias(mean: Array, one_minus_b: Array, t: Array) -> Array:
    """m / (1 − bᵗ): what a running mean that began at zero says after `t` values."""
    return mean / one_minus_power(one_minus_b, t)


# What is the same for all leaves is measured once: `leafwise(..., measures={"c1": first_correction})`.


def first_correction(*, t: Array, one_minus_b1: Array) -> Array:
    """1 − β₁ᵗ, what a running mean with decay rate β₁ that began at zero is divided by."""
    return one_minus_power(one_minus_b1, t)


def second_correction(*, t: Array, one_minus_b2: Array) -> Array:
    """1 − β₂ᵗ, the same for β₂."""
    return one_minus_power(one_minus_b2, t)


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

    ε is at least the root of the smallest normal number (1e-19 in float32; "inside", that number): a zero gradient
    without ε gives 0 and not 0 / 0, and one whose square is too small for v a quotient of about 1 at most.
    """
    tiny = jnp.finfo(jnp.result_type(v)).tiny
    eps = jnp.maximum(eps, tiny if where == "inside" else tiny**0.5)
    if where == "hat":
        return sqrt(jnp.asarray(correction, jnp.result_type(v))) * m / (sqrt(v) + eps)
    v = v / correction
    if where == "outside":
        return m / (sqrt(v) + eps)
    if where == "inside":
        return m / sqrt(v + eps)
    return m / jnp.maximum(sqrt(v), eps)


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

    Behind an optimization barrier: without it XLA widens or squares an array once for the sum and for whatever else
    does the same with it, and keeps what comes of the whole tree in memory.
    """
    wide = widened(x.dtype)
    return lax.optimization_barrier(x).astype(wide)


def after(done: Sequence[Array], scalars: Any) -> Any:
    """A tree with the same floating-point scalars, which are there when `done` is, as far as XLA can tell.

    What a formula then writes over the arrays that `done` are sums of, it writes behind the sums: XLA need not copy
    these arrays first. An optimization barrier does not tell it that; those are gone when it decides on copies.
    """
    if not done:
        return scalars
    total = sum((jnp.sum(y.real) for y in done), jnp.zeros((), real(done[0].dtype)))
    never = (total != total) & (total == 0)  # not a number, and 0
    return jax.tree.map(lambda x: jnp.where(never, 0, x) if is_inexact(x) and x.ndim == 0 else x, scalars)


def anew(tree: Any) -> Any:
    """The same arrays, of which XLA computes once more what was computed of them before."""
    # All behind one barrier: around each array by itself, XLA still takes what is done with it for the same.
    leaves, treedef = jax.tree.flatten(tree)
    at = [k for k, x in enumerate(leaves) if is_inexact(x)]
    for k, x in zip(at, lax.optimization_barrier([leaves[k] for k in at]), strict=True):
        leaves[k] = x
    return jax.tree.unflatten(treedef, leaves)


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
