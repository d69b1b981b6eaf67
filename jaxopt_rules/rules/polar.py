"""The orthogonal factor of a matrix, by solvers that differ in cost and in how close they come.

The polar factor of X = U diag(σ) Vᴴ is U Vᴴ: all singular values become 1. A solver takes a stack of matrices,
(matrices, rows, columns), and returns their factors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from jaxopt_rules.numerics import norm, quotient, real, widened

Polar = Callable[[Array], Array]
Coefficients = tuple[tuple[float, float, float], ...]

_ORIGINAL = (3.4445, -4.7750, 2.0315)

# By name: a, b and c of each step, and the factor of the norm that the coefficients were made for.
_LISTS: dict[str, tuple[Coefficients, float]] = {
    "original": ((_ORIGINAL,) * 5, 1.0),
    "quintic": (
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        1.0,
    ),
    "polar_express": (
        (
            (8.237312490495555, -23.157747414558198, 16.680568411445915),
            (4.082441999064835, -2.893047735332586, 0.5252849256975648),
            (3.9263479922546582, -2.8547468034765298, 0.5318022422894988),
            (3.2982187133085143, -2.424541981026706, 0.48632008358844075),
            (2.2970369434552573, -1.63662558125903, 0.4002628455953627),
            (1.8763805351440397, -1.2347896577722228, 0.35891887501668385),
            (1.8564423485617974, -1.2132449880935525, 0.3568003487825883),
            (1.8749994008682747, -1.2499988017229169, 0.3749994008546422),
        ),
        1.01,
    ),
    "polar_express_safer": (
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.0429299351667245, -2.808917465908704, 0.5000178451051299),
            (3.8916678022926563, -2.7724841532176825, 0.5060648178503389),
            (3.285753657755658, -2.3681294933425394, 0.46449024233003117),
            (2.3005307116270983, -1.6111665557258408, 0.3833374427545273),
            (1.8631210546382593, -1.2042160621002727, 0.3421879560523383),
            (1.8382572152247512, -1.1779263289537742, 0.3396513038637379),
            (1.8749999923301852, -1.2499999836060613, 0.374999991275876),
        ),
        1.02,
    ),
    "deepseek": ((_ORIGINAL,) * 8 + ((2.0, -1.5, 0.5),) * 2, 1.0),
}

# Full products: accelerators would otherwise round the factors of a float32 product to bfloat16 or TF32. One who wants
# that speed iterates in bfloat16.
_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


@dataclass(frozen=True)
class NewtonSchulz:
    """Newton-Schulz iterations: polynomials of a matrix, by products alone.

        X ← G / (s ‖G‖_F + ε)          X ← a X + b (X Xᴴ) X + c (X Xᴴ)² X    for each (a, b, c)

    Each step maps every singular value σ to a σ + b σ³ + c σ⁵. Steps of a steep slope at 0 lift the small ones fast, at
    the price of not meeting 1 exactly. What becomes of singular values of G / ‖G‖ between 0.01, or 0.001, and 1:

        coefficients             steps   from 0.01       from 0.001      slope at 0   as in
        "original"               5       0.682 - 1.134   0.471 - 1.202   485          Keller Jordan, PyTorch, Optax
        "quintic"                5       0.978 - 1.032   0.475 - 1.145   493          timm, modded-nanogpt (2025)
        "polar_express"          8       1.000 - 1.000   1.000 - 1.000   6,469        arXiv:2505.16932, safety 0.01
        "polar_express"          5       0.869 - 1.131   0.857 - 1.131   990          arXiv:2505.16932, safety 0.01
        "polar_express_safer"    8       1.000 - 1.000   1.000 - 1.000   6,107        modded-nanogpt, safety 0.02
        "polar_express_safer"    5       0.859 - 1.141   0.834 - 1.141   951          modded-nanogpt, safety 0.02
        "deepseek"               10      1.000 - 1.001   1.000 - 1.001   79,263       DeepSeek-V4

    The slope is by how much rounding errors grow where σ is near 0: float32's 6e-8 become 3e-5 of the result with
    "original". A σ below that noise has a direction of the rounding's making, in every solver.

    Args:
      coefficients: the name of a list, or one of your own, a triple for each step.
      steps: how many of them; the last one is repeated where there are fewer. By default all.
      dtype: what is iterated in; by default the precision of the slots, float32 or wider. Others use bfloat16, which is
        what is fast on accelerators and moves elements by some hundredths; sums stay float32.
      eps: ε; at 0, too, zero stays zero.
      eps_placement: "outside" divides by s ‖G‖ + ε, as Keller Jordan and Optax; "max" by max(s ‖G‖, ε), as PyTorch and
        timm.
      safety: s. By default 1.01 and 1.02 for "polar_express" and "polar_express_safer", which are made for it, else 1.

    Matrices with more rows than columns are iterated by Xᴴ X, which is the smaller product. Complex ones are conjugated
    where they are transposed. What `muon` is compared with is the oracle of this, too.

    Raises:
      TypeError: `dtype` is no real floating-point type; or, when called, the matrices are complex and a `dtype` is
        given.
      ValueError: the name is unknown, a triple is none, or a number is out of range.
    """

    coefficients: str | Coefficients = "original"
    steps: int | None = None
    dtype: DTypeLike | None = None
    eps: float = 1e-7
    eps_placement: Literal["outside", "max"] = "outside"
    safety: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.coefficients, str):
            if self.coefficients not in _LISTS:
                raise ValueError(f"NewtonSchulz: no list of coefficients is named {self.coefficients!r}; {_NAMES}")
        else:
            if not self.coefficients or any(not isinstance(x, tuple | list) or len(x) != 3 for x in self.coefficients):
                raise ValueError(
                    f"NewtonSchulz: coefficients are triples (a, b, c), one for each step, or a name ({_NAMES}), not "
                    f"{self.coefficients!r}"
                )
            # A tuple of tuples, which hashes, whatever it was.
            object.__setattr__(
                self, "coefficients", tuple((float(a), float(b), float(c)) for a, b, c in self.coefficients)
            )
        if self.steps is not None and (not isinstance(self.steps, int) or self.steps < 1):
            raise ValueError(f"NewtonSchulz: steps is a whole number, at least 1, not {self.steps!r}")
        if self.dtype is not None:
            dtype = jnp.dtype(self.dtype)
            if not jnp.issubdtype(dtype, jnp.floating):
                raise TypeError(f"NewtonSchulz: dtype is a real floating-point type, not {dtype.name}")
            object.__setattr__(self, "dtype", dtype.name)
        for name in ("eps", "safety"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, float(value))  # hashes, whatever it was
        if not self.eps >= 0:
            raise ValueError(f"NewtonSchulz: eps must be at least 0, not {self.eps}")
        if self.eps_placement not in ("outside", "max"):
            raise ValueError(f'NewtonSchulz: eps_placement is "outside" or "max", not {self.eps_placement!r}')
        if self.safety is not None and not self.safety > 0:
            raise ValueError(f"NewtonSchulz: safety must be greater than 0, not {self.safety}")

    def __call__(self, g: Array) -> Array:
        if self.dtype is not None and jnp.iscomplexobj(g):
            raise TypeError(f"NewtonSchulz: complex matrices are iterated in their own precision, not in {self.dtype}")
        coefficients, safety = self._schedule()
        size = safety * norm(g, (-2, -1))
        size = size + self.eps if self.eps_placement == "outside" else jnp.maximum(size, self.eps)
        narrow = g.dtype if self.dtype is None else jax.dtypes.canonicalize_dtype(self.dtype)
        wide = widened(narrow)
        tall = g.shape[-2] > g.shape[-1]

        def times(x: Array, y: Array) -> Array:
            return _matmul(x, y, preferred_element_type=wide)

        def step(x: Array, abc: Array) -> tuple[Array, None]:
            a, b, c = abc
            adjoint = x.mT.conj()
            gram = (times(adjoint, x) if tall else times(x, adjoint)).astype(narrow)
            factor = (b * gram + c * times(gram, gram)).astype(narrow)
            return (a * x + (times(x, factor) if tall else times(factor, x))).astype(narrow), None

        x = quotient(g, size, otherwise=0).astype(narrow)
        return lax.scan(step, x, jnp.array(coefficients, real(wide)))[0].astype(g.dtype)

    def _schedule(self) -> tuple[Coefficients, float]:
        """The coefficients of all steps, and s."""
        given = self.coefficients
        triples, safety = _LISTS[given] if isinstance(given, str) else (given, 1.0)
        steps = len(triples) if self.steps is None else self.steps
        return (triples + triples[-1:] * (steps - len(triples)))[:steps], safety if self.safety is None else self.safety


_NAMES = f"there are {', '.join(map(repr, _LISTS))}"


@jax.custom_jvp
def svd(g: Array) -> Array:
    """The polar factor by a singular value decomposition: exact, and slow. A singular value of zero stays zero."""
    if not g.size:
        return g
    u, _, vh = _decomposed(g)
    return _matmul(u, vh)


def _decomposed(g: Array) -> tuple[Array, Array, Array]:
    """U, σ and Vᴴ, with zeros for what is zero but for rounding."""
    u, sigma, vh = jnp.linalg.svd(g, full_matrices=False)
    kept = sigma > max(g.shape[-2:]) * jnp.finfo(g.dtype).eps * sigma.max(-1, keepdims=True)
    return jnp.where(kept[..., None, :], u, 0), jnp.where(kept, sigma, 0), jnp.where(kept[..., None], vh, 0)


@svd.defjvp
def _(primals, tangents):
    # By sums of two singular values and never by differences, which are 0 where Muon leads: to equal ones.
    (g,), (dg,) = primals, tangents
    if not g.size:
        return g, dg
    u, sigma, vh = _decomposed(g)
    uh, v = u.mT.conj(), vh.mT.conj()
    along, across = _matmul(uh, dg), _matmul(dg, v)
    inner = _matmul(along, v)
    turned = quotient(inner - inner.mT.conj(), sigma[..., :, None] + sigma[..., None, :], otherwise=0)
    left = quotient(across - _matmul(u, inner), sigma[..., None, :], otherwise=0)
    right = quotient(along - _matmul(inner, vh), sigma[..., :, None], otherwise=0)
    return _matmul(u, vh), _matmul(_matmul(u, turned) + left, vh) + _matmul(u, right)


def solver(polar: str | Polar) -> Polar:
    """The solver of this name, or `polar` itself where it is a function of stacks.

    Raises:
      TypeError: it is neither.
      ValueError: no solver has this name.
    """
    if callable(polar):
        return polar
    if not isinstance(polar, str):
        raise TypeError(
            f"polar is a name, a NewtonSchulz(...) or a function of (matrices, rows, columns), not {polar!r}"
        )
    if polar == "svd":
        return svd
    if polar not in _LISTS:
        raise ValueError(f'no polar solver is named {polar!r}; {_NAMES} and "svd"')
    return NewtonSchulz(polar)
