"""L-BFGS: the inverse Hessian from the last steps. Tree-level: its inner products are over all arrays."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxopt_rules.apply import step
from jaxopt_rules.compose import chain
from jaxopt_rules.lift import copied, treewise, zeros
from jaxopt_rules.numerics import global_norm, quotient, scale, sqrt, widened
from jaxopt_rules.rule import Rule, as_rule, constructor, definition_of
from jaxopt_rules.rules.linesearch import backtracking, inner, strong_wolfe
from jaxopt_rules.schedules import Schedule

First = Literal["l2", "l1"]
Skip = Literal["relative", "absolute"]


class LbfgsState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # min_curvature
    pairs: Array  # ()  int32, pairs (s, y) ever kept; pair i stands in row i mod m, so that none is ever moved
    rho: Array  # (m,)  1 / yᵀs; 0 where there is no pair yet
    gamma: Array  # ()  yᵀs / yᵀy of the newest pair
    last_p: Any  # like θ, float32 or wider: θ of the last update
    last_g: Any  # like θ, float32 or wider: its gradient
    s: Any  # (m, *θ.shape), float32 or wider: differences of parameters
    y: Any  # (m, *θ.shape), float32 or wider: differences of gradients


@dataclass(frozen=True)
class _History:
    """The birth of a slot with `memory_size` rows like the parameter."""

    memory_size: int

    def __call__(self, p: Any) -> Array:
        # From zeros like the parameter, so that the rows lie where it does.
        return jnp.broadcast_to(zeros(p), (self.memory_size, *p.shape))


def _subtract(x: Any, y: Any) -> Any:
    return jax.tree.map(jnp.subtract, x, y)


def _add(x: Any, factor: Array, y: Any) -> Any:
    return jax.tree.map(lambda x, y: x + scale(factor, y), x, y)


@dataclass(frozen=True)
class _Lbfgs:
    memory_size: int
    scales: bool
    first: First
    relative: bool

    def __call__(
        self,
        g: Any,
        pairs: Array,
        rho: Array,
        gamma: Array,
        last_p: Any,
        last_g: Any,
        s: Any,
        y: Any,
        *,
        p: Any,
        t: Array,
        min_curvature: Array,
    ) -> Any:
        m, dtype = self.memory_size, rho.dtype
        p = jax.tree.map(lambda p: p.astype(widened(p.dtype)), p)
        g = jax.tree.map(lambda g, p: g.astype(p.dtype), g, p)
        new_s, new_y = _subtract(p, last_p), _subtract(g, last_g)
        ys, yy = inner(new_y, new_s).astype(dtype), inner(new_y, new_y).astype(dtype)
        bound = sqrt(yy) * sqrt(inner(new_s, new_s).astype(dtype)) if self.relative else 1
        kept = (t > 1) & (ys > min_curvature * bound)
        row = jnp.where(kept, pairs % m, m)  # beyond the last row, nothing is written

        def written(rows: Any, new: Any) -> Any:
            return jax.tree.map(lambda rows, x: rows.at[row].set(x.astype(rows.dtype), mode="drop"), rows, new)

        s, y = written(s, new_s), written(y, new_y)
        rho = rho.at[row].set(quotient(1, ys, otherwise=0), mode="drop")
        gamma = jnp.where(kept, quotient(ys, yy, otherwise=1), gamma)
        pairs = jnp.where(kept, pairs + 1, pairs)
        d = self.two_loops(g, pairs, rho, self.initial(g, pairs, gamma), s, y)
        return d, (pairs, rho, gamma, p, g, s, y)

    def initial(self, g: Any, pairs: Array, gamma: Array) -> Array:
        """The multiple of the identity that H begins with."""
        if not self.scales:
            return jnp.ones_like(gamma)
        if self.first == "l2":
            norm = global_norm(g)
        else:
            norm = sum((jnp.sum(jnp.abs(g)) for g in jax.tree.leaves(g)), jnp.float32(0))
        return jnp.where(pairs > 0, gamma, jnp.minimum(1, quotient(1, norm.astype(gamma.dtype), otherwise=1)))

    def two_loops(self, g: Any, pairs: Array, rho: Array, initial: Array, s: Any, y: Any) -> Any:
        """Algorithm 7.4. Rows without a pair have ρ = 0 and change nothing."""
        m = self.memory_size

        def row(rows: Any, i: Array) -> Any:
            return jax.tree.map(lambda rows: rows[i], rows)

        def backward(q: Any, i: Array) -> tuple[Any, Array]:
            alpha = rho[i] * inner(row(s, i), q).astype(rho.dtype)
            return _add(q, -alpha, row(y, i)), alpha

        def forward(r: Any, at: tuple[Array, Array]) -> tuple[Any, None]:
            i, alpha = at
            beta = rho[i] * inner(row(y, i), r).astype(rho.dtype)
            return _add(r, alpha - beta, row(s, i)), None

        newest_first = (pairs - 1 - jnp.arange(m)) % m
        q, alphas = lax.scan(backward, g, newest_first)
        r = jax.tree.map(lambda x: scale(initial, x), q)
        return lax.scan(forward, r, (newest_first, alphas), reverse=True)[0]


@constructor
def lbfgs_direction(
    memory_size: int = 10,
    scale_init_precond: bool = True,
    *,
    first: First = "l2",
    min_curvature: float | Schedule = 1e-8,
    skip: Skip = "relative",
) -> Rule:
    """The direction H g of `lbfgs`, for line searches and chains of your own.

    `chain(clip_by_global_norm(1.0), lbfgs_direction(), step(0.1))` sees clipped gradients alone, and their differences.
    """
    if isinstance(memory_size, bool) or not isinstance(memory_size, int) or memory_size < 1:
        raise ValueError(f"memory_size must be an integer >= 1, not {memory_size!r}")
    for name, value, known in (("first", first, ("l2", "l1")), ("skip", skip, ("relative", "absolute"))):
        if value not in known:
            raise ValueError(f'{name} is "{known[0]}" or "{known[1]}", not {value!r}')
    rows = _History(memory_size)
    return treewise(
        _Lbfgs(memory_size, scale_init_precond, first, skip == "relative"),
        LbfgsState,
        slots={"last_p": copied, "s": rows, "y": rows},
        shared={"pairs": 0, "rho": np.zeros(memory_size), "gamma": 1.0},
        min_curvature=min_curvature,
    )


@constructor
def lbfgs(
    learning_rate: float | Schedule | None = None,
    memory_size: int = 10,
    scale_init_precond: bool = True,
    linesearch: Literal["strong_wolfe", "backtracking"] | Rule | None = "strong_wolfe",
    *,
    first: First = "l2",
    min_curvature: float | Schedule = 1e-8,
    skip: Skip = "relative",
    has_aux: bool = False,
) -> Rule:
    """L-BFGS (Liu & Nocedal 1989; Nocedal & Wright 2006, Algorithms 7.4 and 7.5).

        s = θₜ − θₜ₋₁          y = gₜ − gₜ₋₁          ρ = 1 / yᵀs          γ = yᵀs / yᵀy

        q ← g           for the last m pairs, the newest first:   a ← ρ sᵀq          q ← q − a y
        d ← γ q         for the same, the oldest first:           d ← d + (a − ρ yᵀd) s

        θ ← θ − η d          η from the line search, or the learning rate where there is none

    With a search, `update(grads, state, params, value=f, grad=g, value_fn=loss)`; see `strong_wolfe`, and
    `value_and_grad_from_state`, which saves the evaluation at θ. It is made for losses that are the same function in
    every step: full batches, and few parameters that matter.

    Args:
      learning_rate: the first length that a search tries, by default 1; without a search, η.
      memory_size: m.
      scale_init_precond: whether γ is as above; else γ = 1, also before the first pair.
      linesearch: "strong_wolfe", "backtracking" (each time from the first length on), a rule that ends a chain, a line
        search of Optax, or `None`. Those of Optax take updates, and stand behind the step of the learning rate.
      first: before there is a pair, γ = min(1, 1 / ‖g‖) with the norm "l2" (Optax), or "l1" (PyTorch).
      min_curvature: κ. A pair is kept if yᵀs > κ ‖y‖ ‖s‖, so that H stays positive definite, and leaves H as it is
        otherwise.
      skip: "absolute" keeps it if yᵀs > κ (PyTorch, with κ = 1e-10).
      has_aux: whether `value_fn` gives (loss, aux).

    What stands in front, a hook, acts on the gradient that d is made of, not on the loss that the search measures: let
    decay be a part of both, or of the loss alone. A parameter without a gradient keeps its rows, and the others are
    taken without it; H stays positive definite.

    Memory: 2 m + 2 slots (3 with a search), 88 (92) bytes per float32 parameter.

    Raises:
      ValueError: `memory_size` is less than 1, a choice is unknown, or a learning rate or `has_aux` stands beside a
        search that has its own.
      TypeError: `linesearch` is no rule; in `update`, as `strong_wolfe`.

    Differs from Optax, which keeps every pair, of whatever curvature, and whose default search is its zoom; from
    PyTorch, which shortens the first step alone, not those after it that have no pair either, and takes s from η d, not
    from the parameters. The strong Wolfe search is PyTorch's.
    """
    direction = lbfgs_direction(memory_size, scale_init_precond, first=first, min_curvature=min_curvature, skip=skip)
    rate = 1.0 if learning_rate is None else learning_rate
    if linesearch is None:
        return chain(direction, step(rate))
    if linesearch == "strong_wolfe":
        return chain(direction, strong_wolfe(rate, has_aux=has_aux))
    if linesearch == "backtracking":
        return chain(direction, backtracking(increase_factor=np.inf, max_learning_rate=rate, has_aux=has_aux))
    if isinstance(linesearch, str):
        raise ValueError(f'lbfgs: linesearch is "strong_wolfe", "backtracking", a rule, or None, not {linesearch!r}')
    search = as_rule(linesearch, "lbfgs")
    if definition_of(search).place != "end" and not has_aux:
        return chain(direction, step(rate), search)
    if learning_rate is not None or has_aux:
        raise ValueError("lbfgs: this line search has a first length and has_aux of its own; give them to it")
    return chain(direction, search)
