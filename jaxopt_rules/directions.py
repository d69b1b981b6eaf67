"""Directions: rules from descent direction to descent direction, for the places between an algorithm and `step`."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxopt_rules import numerics, trees
from jaxopt_rules.hooks import StatelessState
from jaxopt_rules.hyperparameters import check
from jaxopt_rules.lift import Leafwise, leafwise, lift
from jaxopt_rules.numerics import is_inexact
from jaxopt_rules.rule import Definition, Rule, Share, constructor
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector, check_selector, label, select


class TrustRatioState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # coefficient, eps, min_norm; max_ratio where there is one


def _ratio(d: Array, *, p: Array, coefficient: Array, eps: Array, min_norm: Array) -> Array:
    p_norm = jnp.maximum(numerics.norm(p), min_norm)
    d_norm = jnp.maximum(numerics.norm(d), min_norm)
    ratio = numerics.quotient(coefficient * p_norm, jnp.where(d_norm == 0, 0, d_norm + eps), otherwise=1)
    return jnp.where(p_norm == 0, 1, ratio)


def _trust_ratio(d: Array, *, ratio: Array, max_ratio: Array | None = None) -> Array:
    return (ratio if max_ratio is None else jnp.minimum(ratio, max_ratio)) * d


@constructor
def trust_ratio(
    coefficient: float | Schedule = 1.0,
    eps: float | Schedule = 0.0,
    min_norm: float | Schedule = 0.0,
    max_ratio: float | Schedule | None = None,
) -> Rule:
    """Gives each direction the norm of its parameters (LARS, arXiv:1708.03888; LAMB, arXiv:1904.00962, Algorithm 2).

        r = τ ‖θ‖ / (‖d‖ + ε), and 1 where ‖θ‖ or ‖d‖ is 0          d ← r d, or min(r, r_max) d

        chain(adam_direction(eps=1e-6), weight_decay(0.01), trust_ratio(), step(1e-3))                 # LAMB
        chain(weight_decay(1e-4), trust_ratio(1e-3), momentum_direction(0.9), step(10.0))              # LARS

    Every array has a ratio of its own (You et al. 2017 and 2019, the latter with φ(z) = z).

    Args:
      coefficient: τ.
      eps: ε.
      min_norm: the least value that both norms are taken to have.
      max_ratio: r_max, if there is one; 1 in the variant called LAMBC, `trust_clip` in timm.

    Memory: none.

    Differs from the LARS of the paper in the denominator, ‖∇L‖ + λ ‖θ‖ there, ‖∇L + λ θ‖ here; from timm in that
    every array has a ratio, also one without decay: `masked(trust_ratio(), where)` leaves out biases and norms.
    """
    return leafwise(
        _trust_ratio,
        TrustRatioState,
        sums={"ratio": _ratio},
        coefficient=coefficient,
        eps=eps,
        min_norm=min_norm,
        max_ratio=max_ratio,
    )


def _sign(d: Array) -> Array:
    return jnp.sign(d)


@constructor
def sign() -> Rule:
    """The sign of each element (Bernstein et al. 2018, arXiv:1802.04434, Algorithm 1).

        d ← sign(d)          sign(0) = 0; of complex numbers d / |d|

        chain(momentum_direction(0.9), sign(), step(1e-4))                                             # Signum

    Memory: none.
    """
    return leafwise(_sign, StatelessState)


class NormalizeState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # eps


def _over_norm(ds: Any, *, eps: Array) -> Array:
    return numerics.quotient(1, numerics.global_norm(ds) + eps, otherwise=0)


def _normalize(d: Array, *, factor: Array) -> Array:
    return factor * d


@constructor
def normalize(eps: float | Schedule = 0.0) -> Rule:
    """Gives the direction norm 1, taken over all arrays; a direction of 0 stays 0.

        d ← d / (√(Σ |d|²) + ε)

    As a hook in front of `step` it is normalized gradient descent. The norm is summed in float32 or wider.

    Memory: none.
    """
    return leafwise(_normalize, NormalizeState, measures={"factor": _over_norm}, eps=eps)


class ScaleByLeafRmsState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # min_rms


def _scale_by_leaf_rms(d: Array, *, p: Array, min_rms: Array) -> Array:
    return jnp.maximum(numerics.rms(p), min_rms) * d


@constructor
def scale_by_leaf_rms(min_rms: float | Schedule = 1e-3) -> Rule:
    """Steps relative to the size of the parameters (Shazeer & Stern 2018, arXiv:1804.04235, section 8).

        d ← max(rms(θ), ε₂) d          rms(θ) = √(mean |θ|²), for each array

    ε₂ is `min_rms`. In the paper it follows `clip_by_block_rms(1.0)`.

    Memory: none.

    Differs from Optax in name alone: `scale_by_param_block_rms(min_scale)`.
    """
    return leafwise(_scale_by_leaf_rms, ScaleByLeafRmsState, min_rms=min_rms)


# ---------------------------------------------------------------------------------------------------------------------
# Multipliers per parameter
# ---------------------------------------------------------------------------------------------------------------------


def _at_birth(value: Any) -> Any:
    return value(0) if callable(value) else value


class ScaleByPathState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # factor[pattern], for each pattern


def _scale_by_path(g: Array, **factors: Array | None) -> Array:
    """Of the factors all are `None` but that of the pattern that matches."""
    matched = [factor for factor in factors.values() if factor is not None]
    return matched[0] * g if matched else g


class _ScaleByPath(Leafwise):
    def _matched(self, paths: Sequence[str], leaves: Sequence[Any]) -> list[str | None]:
        """For each leaf, the factor that it is multiplied by.

        Raises:
          ValueError: two patterns match one leaf, or one matches nothing.
        """
        hits = {name: select(pattern, paths, leaves) for name, pattern in self.where.items()}
        matched = [[name for name, hit in hits.items() if hit[k]] for k in range(len(leaves))]
        for path, names, leaf in zip(paths, matched, leaves, strict=True):
            if len(names) > 1 and is_inexact(leaf):
                patterns = " and ".join(name.removeprefix("factor") for name in names)
                raise ValueError(f"scale_by_path: {patterns} match {trees.quoted(path)}; one factor belongs to a leaf")
        return [names[0] if names else None for names in matched]

    def init(self, params: Any) -> Any:
        self._matched(trees.paths(params), trees.flatten(params)[0])
        return super().init(params)

    def _per_leaf(self, at: Any, model: Any) -> Callable[[int], dict[str, Any]]:
        self._matched(trees.paths(model), trees.flatten(model)[0])
        return super()._per_leaf(at, model)

    def shares(self, paths: Sequence[str], leaves: Sequence[Any]) -> list[Share]:
        names = self._matched(paths, leaves)
        return [Share() if name is None else Share(rate=_at_birth(self.hyper[name])) for name in names]


def _written(pattern: str | re.Pattern[str]) -> str:
    return pattern.pattern if isinstance(pattern, re.Pattern) else pattern


@constructor
def scale_by_path(factors: Mapping[str | re.Pattern[str], float | Schedule]) -> Rule | Definition:
    """Multiplies each array by the factor of the pattern that its path matches.

        g ← f g

        chain(adam(1e-3), scale_by_path({"embed/**": 0.1, "**/bias": 2.0}))

    Behind the terminal, as here, factors multiply the learning rate of each parameter, decay included; in front of
    it, gradient or direction. An array that no pattern matches passes unchanged. The factor of a pattern is the
    hyperparameter `factor[pattern]`: `set_hyperparams(state, **{"factor[embed/**]": 0.2})`.

    Memory: none.

    Raises:
      TypeError: a pattern is neither a glob pattern nor a regular expression, or a factor no number.
      ValueError: in `init` or `update`, two patterns match one array, or a pattern matches nothing.
    """
    if not isinstance(factors, Mapping) or not all(isinstance(pattern, str | re.Pattern) for pattern in factors):
        raise TypeError(f"scale_by_path takes a mapping from patterns like 'embed/**' to factors, not {factors!r}")
    # Not the bare pattern: a parameter may be called `b1`, and its factor is no decay rate.
    names = {f"factor[{_written(pattern)}]": pattern for pattern in factors}
    if len(names) < len(factors):
        raise ValueError(f"scale_by_path: a pattern and a regular expression are written alike in {factors!r}")
    for name, pattern in names.items():
        check(name, factors[pattern])
    # The names are no identifiers, so that no signature could list them, and `leafwise` could not check it.
    return _ScaleByPath(
        function=_scale_by_path,
        State=ScaleByPathState,
        hyper={name: factors[pattern] for name, pattern in names.items()},
        births={},
        shared={},
        key=None,
        where=names,
        given={},
        static={},
        measures={},
        sums={},
        metrics=(),
        wants=frozenset(names),
        stands="anywhere",
        ordered=False,
        extra=frozenset(),
    )


class LayerwiseDecayState(NamedTuple):
    count: Array  # ()  int32, finished updates
    hyper: dict[str, Any]  # layer_decay


def _layerwise_decay(g: Array, *, layer_decay: Array, above: Array) -> Array:
    return layer_decay**above * g


class _LayerwiseDecay(Leafwise):
    def shares(self, paths: Sequence[str], leaves: Sequence[Any]) -> list[Share]:
        decay = _at_birth(self.hyper["layer_decay"])
        above = self.given["above"](paths, leaves)
        return [Share() if n is None else Share(rate=decay**n) for n in above]


Layers = Sequence[Selector] | Callable[[str, Any], int]


@constructor
def layerwise_decay(decay: float | Schedule, layers: Layers, depth: int | None = None) -> Rule | Definition:
    """Smaller rates for layers nearer the input (ELECTRA, arXiv:2003.10555; BEiT, arXiv:2106.08254), for fine-tuning.

        u ← δ^(L − 1 − i) u          for the arrays of layer i = 0 ... L − 1, from the input to the output

        chain(
            adamw(1e-3),
            layerwise_decay(0.75, ["embed/**", *(f"blocks/{i}/**" for i in range(12)), ["norm/**", "head/**"]]),
        )

    Behind the terminal, as here, it multiplies the learning rate of each parameter, decay included.

    Args:
      decay: δ, the hyperparameter `layer_decay`.
      layers: a selector for each layer, from the input to the output; or a function (path, array) -> layer number.
      depth: the number of layers L, where `layers` is a function.

    Memory: none.

    Raises:
      TypeError: `layers` is nothing of that, or a function without `depth`.
      ValueError: in `init` or `update`, an array is in two layers or in none, or a selector matches nothing.
    """
    return lift(
        _LayerwiseDecay,
        _layerwise_decay,
        LayerwiseDecayState,
        {"layer_decay": decay},
        given={"above": _layers_above(layers, depth)},
        place="anywhere",
    )


def _layers_above(layers: Layers, depth: int | None) -> Callable[[Sequence[str], Sequence[Any]], list[int | None]]:
    """The number of layers between each leaf's and the last."""
    if callable(layers):
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise TypeError(f"layerwise_decay: a function of (path, array) comes with depth, an integer, not {depth!r}")
        return lambda paths, leaves: [
            depth - 1 - _numbered(layers, depth, path, leaf) if is_inexact(leaf) else None
            for path, leaf in zip(paths, leaves, strict=True)
        ]
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers:
        raise TypeError(
            "layerwise_decay: layers are a sequence of selectors, from the input to the output, or a function "
            f"(path, array) -> number, not {layers!r}"
        )
    if depth not in (None, len(layers)):
        raise TypeError(f"layerwise_decay: depth={depth}, and {len(layers)} layers")
    for layer in layers:
        check_selector(layer, "layerwise_decay")
    selectors = {f"layer {i}": layer for i, layer in enumerate(layers)}
    number = {name: len(layers) - 1 - i for i, name in enumerate(selectors)}

    def above(paths: Sequence[str], leaves: Sequence[Any]) -> list[int | None]:
        owners = label(selectors, paths, leaves, tuple(selectors))
        return [None if owner is None else number[owner] for owner in owners]

    return above


def _numbered(layers: Callable[[str, Any], int], depth: int, path: str, leaf: Any) -> int:
    layer = layers(path, leaf)
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < depth:
        raise ValueError(
            f"layerwise_decay: the layer of {trees.quoted(path)} is {layer!r}, not an integer from 0 to {depth - 1}"
        )
    return layer
