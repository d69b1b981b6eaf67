"""DoG: the distance moved so far over the gradients met so far as a learning rate. Tree-level: one rate for all arrays
(`dog`), besides the form with a rate for each (`ldog`)."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxopt_rules.apply import Decay
from jaxopt_rules.descend import descend
from jaxopt_rules.lift import copied, leafwise, treewise
from jaxopt_rules.numerics import abs2, quotient, read_wide, scale, sqrt, sum_of_squares
from jaxopt_rules.rule import Definition, Rule, constructor
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector


class DogState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # eps; reps_rel or init_eta
    start: Any  # like θ, float32 or wider: θ when `init` ran
    size: Any  # ()  per parameter, float32 or wider: ‖θ₀‖²
    distance: Array  # ()  the largest ‖θ − θ₀‖ so far
    squares: Array  # ()  Σ ‖g‖² over all updates
    metrics: dict[str, Array]  # eta: ()  the rate of the last update


class LdogState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # eps; reps_rel or init_eta
    start: Any  # like θ, float32 or wider: θ when `init` ran
    size: Any  # ()  per parameter, float32 or wider: ‖θ₀‖²
    distance: Any  # ()  per parameter, float32 or wider: the largest ‖θ − θ₀‖ so far
    squares: Any  # ()  per parameter, float32 or wider: Σ ‖g‖² over all updates


def _size(p: Any) -> Array:
    return jnp.sum(abs2(copied(p)))


def _nothing(p: Any) -> Array:
    return jnp.zeros_like(_size(p))


def _rate(
    distance: Array, squares: Array, size: Array, eps: Array, reps_rel: Array | None, init_eta: Array | None
) -> Array:
    """η from max ‖θ − θ₀‖, Σ ‖g‖² and ‖θ₀‖²."""
    if reps_rel is not None:
        distance = jnp.maximum(distance, reps_rel * (1 + sqrt(size)))
    eta = quotient(distance, sqrt(squares + eps), otherwise=0)
    return eta if init_eta is None else jnp.where(distance > 0, eta, init_eta)


def _dog(
    grads: Any,
    start: Any,
    size: Any,
    distance: Array,
    squares: Array,
    *,
    p: Any,
    eps: Array,
    reps_rel: Array | None = None,
    init_eta: Array | None = None,
) -> Any:
    moved = sum_of_squares(jax.tree.map(lambda p, x0: read_wide(p) - x0, p, start))
    distance = jnp.maximum(distance, sqrt(moved))
    squares = squares + sum_of_squares(grads)
    sizes: list[Array] = jax.tree.leaves(size)
    eta = _rate(distance, squares, sum(sizes, start=jnp.zeros(())), eps, reps_rel, init_eta)
    ds = jax.tree.map(lambda g, x0: scale(eta, g.astype(x0.dtype)), grads, start)
    return ds, (start, size, distance, squares), {"eta": eta}


def _ldog(
    g: Array,
    start: Array,
    size: Array,
    distance: Array,
    squares: Array,
    *,
    p: Array,
    eps: Array,
    reps_rel: Array | None = None,
    init_eta: Array | None = None,
) -> tuple[Array, tuple[Array, Array, Array, Array]]:
    distance = jnp.maximum(distance, sqrt(jnp.sum(abs2(p - start))))
    squares = squares + jnp.sum(abs2(g))
    return _rate(distance, squares, size, eps, reps_rel, init_eta) * g, (start, size, distance, squares)


def _first(reps_rel: Any, init_eta: Any) -> dict[str, Any]:
    return {"reps_rel": reps_rel} if init_eta is None else {"init_eta": init_eta}


@constructor
def dog_direction(
    *,
    reps_rel: float | Schedule = 1e-6,
    eps: float | Schedule = 1e-8,
    init_eta: float | Schedule | None = None,
) -> Rule | Definition:
    """The direction d = η g of `dog`, for chains of your own that end with `step(1.0)`."""
    return treewise(
        _dog,
        DogState,
        slots={"start": copied, "size": _size},
        shared={"distance": 0.0, "squares": 0.0},
        metrics=("eta",),
        eps=eps,
        **_first(reps_rel, init_eta),
    )


@constructor
def ldog_direction(
    *,
    reps_rel: float | Schedule = 1e-6,
    eps: float | Schedule = 1e-8,
    init_eta: float | Schedule | None = None,
) -> Rule | Definition:
    """The direction d = η g of `ldog`, for chains of your own that end with `step(1.0)`."""
    return leafwise(
        _ldog,
        LdogState,
        slots={"start": copied, "size": _size, "distance": _nothing, "squares": _nothing},
        eps=eps,
        **_first(reps_rel, init_eta),
    )


@constructor
def dog(
    learning_rate: float | Schedule = 1.0,
    *,
    reps_rel: float | Schedule = 1e-6,
    eps: float | Schedule = 1e-8,
    init_eta: float | Schedule | None = None,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    decay: Decay | Literal["l2"] = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule:
    """DoG, distance over gradients (Ivgi et al. 2023, arXiv:2302.12022).

        r ← max(r, ‖θ − θ₀‖)          from r_ε (1 + ‖θ₀‖)
        G ← G + ‖g‖²
        η = r / √(G + ε)

        θ ← θ − α (η g + λ θ)

    The norms run over all arrays that take part, in float32 or wider; each group of a `partition` has its own η, which
    is recorded as `eta` in `metrics(state)`. Leave α at 1. The authors evaluate an average of the parameters and count
    it as part of the method; theirs, of polynomial decay 8, is `average(dog(), lambda n: n / (n + 9), debias=False)`.

    Args:
      reps_rel: r_ε, the first distance relative to 1 + ‖θ₀‖; 1e-4 is for models with batch normalization. Parameters
        in bfloat16 may round the whole of so small a step away, and then none is ever larger: they need 1e-2 or so.
      init_eta: η as long as nothing has moved, in place of `reps_rel`.
      weight_decay: λ, of which η is no factor: at α = 1 an array shrinks by λ in every step. `decay` chooses another
        form, as `step` describes them; in "l2", g ← g + λ θ, G has the decay too.

    Memory: 1 slot, 4 bytes per float32 parameter, and a number per array; 2 slots, 8 bytes, with `decay="initial"`.

    Differs from the authors' code (`dog-optimizer`) and from Optax, whose decay is "l2"; from the former also where
    `init_eta` and α are both given: there the first step has no α. From Optax in keywords: `init_step` is `reps_rel`
    ("heuristic") or `init_eta` ("learning_rate"), and `mask` is `where`.
    """
    direction = dog_direction(reps_rel=reps_rel, eps=eps, init_eta=init_eta)
    return descend(direction, learning_rate, weight_decay, where, decay=decay, peak=peak)


@constructor
def ldog(
    learning_rate: float | Schedule = 1.0,
    *,
    reps_rel: float | Schedule = 1e-6,
    eps: float | Schedule = 1e-8,
    init_eta: float | Schedule | None = None,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    decay: Decay | Literal["l2"] = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule:
    """L-DoG, DoG with a rate for each array (Ivgi et al. 2023, arXiv:2302.12022).

        r ← max(r, ‖θ − θ₀‖)          from r_ε (1 + ‖θ₀‖)
        G ← G + ‖g‖²
        η = r / √(G + ε)              for each array

        θ ← θ − α (η g + λ θ)

    All as in `dog`, but that the norms are those of one array, and that η is not recorded.

    Memory: 1 slot, 4 bytes per float32 parameter, and 3 numbers per array; 2 slots, 8 bytes, with `decay="initial"`.

    Differs from the authors' code (`dog-optimizer`) as `dog` does.
    """
    direction = ldog_direction(reps_rel=reps_rel, eps=eps, init_eta=init_eta)
    return descend(direction, learning_rate, weight_decay, where, decay=decay, peak=peak)
