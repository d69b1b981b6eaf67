"""Sharpness-aware minimization: the gradient is taken where the loss is worst nearby. Tree-level: a wrapper."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxopt_rules import trees
from jaxopt_rules.compose import Wrapper, giving_updates
from jaxopt_rules.hyperparameters import check
from jaxopt_rules.lift import advanced
from jaxopt_rules.numerics import abs2, global_norm, is_inexact, scale, sqrt, widened
from jaxopt_rules.rule import Definition, Rule, constructor, definition_of, extra_for
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.trees import Structure


class SamState(NamedTuple):
    count: Array  # ()  int32, calls
    hyper: dict[str, Any]  # rho
    metrics: dict[str, Array]  # perturbed_norm: ‖g‖, or ‖|θ| g‖ with `adaptive`, by which ε̂ is divided
    inner: Any  # of the rule


@dataclass(frozen=True, eq=False)
class _Sam(Wrapper):
    adaptive: bool
    has_aux: bool

    @property
    def gate(self) -> bool:
        return definition_of(self.rule).gate

    @property
    def uses(self) -> frozenset[str]:
        return frozenset({"value_fn", "grad_fn"})

    def init(self, params: Any) -> Any:
        leaves, _ = trees.flatten(params)
        own = self.born(metrics={"perturbed_norm": jnp.zeros((), jnp.result_type(float))})
        return self.State(**trees.placed_with(leaves, own), inner=self.rule.init(params))

    def update(self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        grads, state, handed = self._sharp(grads, state, params, extra)
        updates, inner = self.rule.update(grads, state.inner, params, **handed)
        return updates, state._replace(inner=inner)

    def apply(self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        grads, state, handed = self._sharp(grads, state, params, extra)
        params, inner = self.rule.apply(grads, state.inner, params, **handed)
        return params, state._replace(inner=inner)

    def _sharp(
        self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]
    ) -> tuple[Any, Any, Mapping[str, Any]]:
        """For the rule inside, the gradients at θ + ε̂ and the extra arguments; and the new state but for `inner`."""
        self.check_state(state)
        if params is None and grads is not None:
            raise TypeError(f"{self.name} needs the parameters: update(grads, state, params, value_fn=...)")
        if not self.uses & extra.keys():
            raise TypeError(
                f"{self.name} needs value_fn, from parameters to the loss, or grad_fn, from parameters to gradients: "
                "update(grads, state, params, value_fn=...)"
            )
        gs, treedef = trees.flatten(grads)
        ps = trees.align(treedef, params, "the parameters")
        for k, (g, p) in enumerate(zip(gs, ps, strict=True)):
            trees.check_gradient(lambda k=k: trees.paths(grads)[k], g, p)
        present = [k for k, (g, p) in enumerate(zip(gs, ps, strict=True)) if is_inexact(g) and is_inexact(p)]
        values, hyper = self.values(state)
        perturbation, norm = self._perturbation([gs[k] for k in present], [ps[k] for k in present], values["rho"])
        moved = trees.apply_updates(params, _spread(treedef, present, perturbation))
        grads = _spread(treedef, present, self._gradients(treedef, present, moved, extra))
        handed = extra_for(self.rule, {**extra, "grad": grads} if "grad" in extra else extra)
        metrics = {"perturbed_norm": jnp.array(norm, state.metrics["perturbed_norm"].dtype)}
        return grads, SamState(advanced(state.count), hyper, metrics, state.inner), handed

    def _perturbation(self, gs: list[Any], ps: list[Any], rho: Array) -> tuple[list[Array], Array]:
        """ε̂ = ρ T g' / ‖g'‖ with g' = T g, where T is 1 or |θ|; and ‖g'‖."""
        if not self.adaptive:
            norm = global_norm(gs)
            return [scale(_over(rho, norm), g) for g in gs], norm
        sizes = [sqrt(abs2(p.astype(widened(p.dtype)))) for p in ps]
        scaled = [size * g for size, g in zip(sizes, gs, strict=True)]
        norm = global_norm(scaled)
        return [scale(_over(rho, norm), size * g) for size, g in zip(sizes, scaled, strict=True)], norm

    def _gradients(self, treedef: Structure, present: list[int], params: Any, extra: Mapping[str, Any]) -> list[Any]:
        """Those of the leaves that are present, at `params`."""
        if "grad_fn" in extra:
            grads = extra["grad_fn"](params)
            gs = trees.align(treedef, grads[0] if self.has_aux else grads, "what grad_fn gives")
            return [gs[k] for k in present]
        leaves = trees.align(treedef, params, "the parameters")

        def value(arrays: list[Array]) -> Any:
            whole = list(leaves)
            for k, x in zip(present, arrays, strict=True):
                whole[k] = x
            return extra["value_fn"](jax.tree.unflatten(treedef, whole))

        found: Any = jax.grad(value, has_aux=self.has_aux)([leaves[k] for k in present])
        # Of a complex x, JAX gives the conjugate of the direction in which the loss rises.
        return [jnp.conj(g) if jnp.iscomplexobj(g) else g for g in (found[0] if self.has_aux else found)]


def _over(rho: Array, norm: Array) -> Array:
    return rho.astype(norm.dtype) / (norm + 1e-12)


def _spread(treedef: Structure, places: list[int], leaves: list[Any]) -> Any:
    whole: list[Any] = [None] * treedef.num_leaves
    for k, x in zip(places, leaves, strict=True):
        whole[k] = x
    return jax.tree.unflatten(treedef, whole)


@constructor
def sam(rule: Rule, rho: float | Schedule = 0.05, *, adaptive: bool = False, has_aux: bool = False) -> Definition:
    """Sharpness-aware minimization (Foret et al. 2021, arXiv:2010.01412, Algorithm 1) around any optimizer.

        SAM                 ε̂ = ρ g / (‖g‖ + 10⁻¹²)
        ASAM, `adaptive`    ε̂ = ρ |θ|² g / (‖|θ| g‖ + 10⁻¹²)          Kwon et al. 2021, arXiv:2102.11600, without η

        g ← ∇L(θ + ε̂)          the rule acts at θ, on this gradient

    The gradients that `update` is given are those at θ; the second ones are taken here, of the function that it is
    given besides, in the same call of the same batch:

        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        params, state = rule.apply(grads, state, params, value_fn=lambda params: loss_fn(params, batch))

    A hook in front, chain(clip, sam(rule)), acts on the first gradient, and so on ε̂ alone; inside, sam(chain(clip,
    rule)), on the second. The rule inside is handed `value` as it is, the loss at θ, and as `grad` the second gradient.
    A parameter without gradient (`None`) is neither perturbed nor trained, and is in no norm.

    Args:
      rule: the optimizer; a gate, too: sam(accumulate(rule, k)) takes the mean of k second gradients, while
        accumulate(sam(rule), k) knows the function of the k-th call alone.
      rho: ρ, live. ASAM's is about ten times that of SAM.
      has_aux: whether the function returns a pair whose second part is something else, as that of `jax.grad`.

    `update` takes value_fn, from the parameters to the loss, or grad_fn, from the parameters to the gradients, which
    goes first. Both get the whole tree that `update` was given, so that inside `partition` or `freeze`, where leaves of
    others are `None`, and in an `Optimizer`, which holds arrays by name, the function must be made for that; put sam
    around these, and step by `rule.apply`. Under `jax.jit` the function may hold traced arrays.

    Memory: that of the rule; in a step, besides, one copy of the parameters, θ + ε̂, and a second gradient. ε̂ is small:
    added to a parameter narrower than float32, most of it is lost in rounding.

    Raises:
      TypeError: `rule` is no rule; in `update`, there is neither function, or there are no parameters.
      ValueError: the rule gives directions, or ρ is below 0.

    Differs from Optax's `contrib.sam`, where the two gradients are two calls, but for its opaque mode, and which takes
    the perturbing rule as `adv_optimizer` in place of `rho`; from the paper in the 10⁻¹², which is that of the usual
    PyTorch form (davda54/sam).
    """
    member = giving_updates(rule, "sam")
    check("rho", rho)
    return _Sam(State=SamState, hyper={"rho": rho}, rule=member, adaptive=adaptive, has_aux=has_aux)
