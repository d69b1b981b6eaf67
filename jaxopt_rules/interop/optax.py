"""Optax, both ways: rules as gradient transformations, and gradient transformations as rules.

    from jaxopt_rules.interop.optax import from_optax, to_optax

    nnx.Optimizer(model, to_optax(freeze(adamw(3e-4), "embed/**")), wrt=nnx.Param)
    chain(clip_by_global_norm(1.0), from_optax(optax.contrib.muon(1e-2)))

A rule is a pair of functions as Optax knows them, and a transformation of theirs can be a member of `chain` as it is.
Each side then keeps its own habits. What they are, and what these two functions do about them:

    a raw rule under Optax            gives updates in float32 or wider, `None` for a frozen parameter, and gets no
                                      extra arguments from `optax.chain` and the other wrappers
    to_optax(rule)                    gives updates in the parameters' dtype, −0 for a frozen one, gets them
    a raw transformation under ours   sees parameters and gradients as they are: its memory has their precision, and it
                                      takes no missing gradients
    from_optax(tx)                    computes in float32 or wider, and takes missing gradients
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxopt_rules import trees
from jaxopt_rules.families import Family, per_parameter
from jaxopt_rules.interop import needed
from jaxopt_rules.lift import matched
from jaxopt_rules.numerics import is_inexact, widened
from jaxopt_rules.rule import Definition, Place, Rule, as_rule, constructor, definition_of, extra_for

if TYPE_CHECKING:
    import optax
else:
    optax = needed("optax", "optax")


# ---------------------------------------------------------------------------------------------------------------------
# Ours as theirs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Function:
    rule: Rule

    def __repr__(self) -> str:
        return f"to_optax({self.rule!r}).{type(self).__name__.lower()}"


class Init(_Function):
    """`to_optax(rule).init`."""

    def __call__(self, params: Any) -> Any:
        return self.rule.init(params)


class Update(_Function):
    """`to_optax(rule).update`."""

    def __call__(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        new, state = self.rule.update(updates, state, params, **extra_for(self.rule, extra))
        gs, treedef = trees.flatten(updates)
        models = gs if params is None else trees.align(treedef, params, "the parameters")
        new = [_cast(u, g, p) for u, g, p in zip(treedef.flatten_up_to(new), gs, models, strict=True)]
        return jax.tree.unflatten(treedef, new), state


def _cast(u: Any, g: Any, p: Any) -> Any:
    """An update as clients of Optax take it, from that of a rule."""
    if u is not None:
        return u.astype(p.dtype) if is_inexact(p) else u
    if g is None or not _addable(p):
        return None
    zeros = jnp.zeros_like(p)
    return -zeros if is_inexact(p) else zeros


def _addable(p: Any) -> bool:
    """Whether optax.apply_updates and equinox.apply_updates add to it: an array of numbers."""
    return hasattr(p, "dtype") and (is_inexact(p) or jnp.issubdtype(p.dtype, jnp.integer) or p.dtype == bool)


def to_optax(rule: Rule) -> "optax.GradientTransformationExtraArgs":
    """A rule as a gradient transformation, for everything that takes one of Optax's.

        tx = to_optax(chain(clip_by_global_norm(1.0), freeze(adamw(3e-4), "embed/**")))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    It has the state of the rule and its numbers, and differs from the pair itself in this:

    * Each update has the dtype of its parameter (without parameters that of its gradient), as clients that add it
      without a cast need it, and wrappers that choose between an update and none (`optax.apply_if_finite`): with
      `equinox.apply_updates` a bfloat16 model stays one. The sum of the two is then
      rounded once more than in `apply_updates`; it is the outermost that is to be wrapped, and not a member of a chain.
    * Where there is a gradient and the rule gives no update (`freeze`, a leaf of integers), the update is −0, whose sum
      with any number is that number: `optax.apply_updates` and `nnx.Optimizer` take no `None`. Where there is no
      gradient, `None` stays.
    * Extra arguments reach the rule through Optax's wrappers, which hand each member those of all: what the rule does
      not accept is ignored, a misspelt name, too.

    Two of equal rules are equal, have equal hashes, and can be pickled.

    Raises:
      TypeError: `rule` is no rule.
    """
    rule = as_rule(rule, "to_optax")
    return optax.GradientTransformationExtraArgs(Init(rule), Update(rule))


# ---------------------------------------------------------------------------------------------------------------------
# Theirs as ours
# ---------------------------------------------------------------------------------------------------------------------


class _View:
    """What a transformation sees of one update: trees like the parameters, complete, in float32 or wider.

    Zeros hold the place of a missing gradient; what is no inexact array is `None`.
    """

    def __init__(self, grads: Any, params: Any) -> None:
        at = matched(grads, params)
        self.treedef, self.given = at.treedef, params is not None
        self.ps, self.structure = trees.flatten(params) if self.given else (at.gs, at.treedef)
        # One `None` among the gradients may stand for a part of the model.
        self.sizes = [len(trees.flatten(p)[0]) if self.given else 1 for p in at.ps]
        self.gs, self.present = self._spread(at.gs), self._spread(at.present)

    def _spread(self, column: Sequence[Any]) -> list[Any]:
        return [x for x, n in zip(column, self.sizes, strict=True) for _ in range(n)]

    @property
    def grads(self) -> Any:
        return self._inward(self.gs)

    @property
    def params(self) -> Any:
        return self._inward(self.ps) if self.given else None

    def extra(self, value: Any) -> Any:
        """An extra argument: what is like the gradients or the parameters in it is seen as these are.

        A function of parameters, such as `value_fn`, is called with parameters as the caller knows them.
        """
        if self._like(value) is None and callable(value) and self.given:
            return lambda *args, **kwargs: self._each(
                self._inward, value(*self._each(self._outward, args), **self._each(self._outward, kwargs))
            )
        return self._each(self._inward, value)

    def updates(self, updates: Any) -> Any:
        """Updates as the caller knows them: like the gradients, `None` for what takes no part."""
        us = trees.align(self.structure, updates, "the updates", "the parameters")
        rows = zip(us, self.ps, self.present, strict=True)
        kept = [jnp.asarray(u, widened(p.dtype)) if present and u is not None else None for u, p, present in rows]
        starts = itertools.accumulate(self.sizes, initial=0)
        firsts = [kept[k] if n else None for k, n in zip(starts, self.sizes, strict=False)]
        return jax.tree.unflatten(self.treedef, firsts)

    def _each(self, function: Callable[[list[Any]], Any], tree: Any) -> Any:
        """A tree with `function(leaves)` for each part of it that is like the parameters."""

        def changed(part: Any) -> Any:
            leaves = self._like(part)
            return part if leaves is None else function(leaves)

        return jax.tree.map(changed, tree, is_leaf=lambda part: self._like(part) is not None)

    def _like(self, tree: Any) -> list[Any] | None:
        """The leaves of a tree that is like the gradients or the parameters, one for each parameter."""
        leaves, treedef = trees.flatten(tree)
        if treedef not in (self.treedef, self.structure) or not any(map(is_inexact, leaves)):
            return None
        leaves = leaves if treedef == self.structure else self._spread(leaves)
        pairs = zip(leaves, self.ps, strict=True)
        fits = all(x is None or not is_inexact(p) or (is_inexact(x) and x.shape == p.shape) for x, p in pairs)
        return leaves if fits else None

    def _inward(self, leaves: Sequence[Any]) -> Any:
        return jax.tree.unflatten(self.structure, [_seen(x, p) for x, p in zip(leaves, self.ps, strict=True)])

    def _outward(self, leaves: Sequence[Any]) -> Any:
        pairs = zip(leaves, self.ps, strict=True)
        return jax.tree.unflatten(self.structure, [x.astype(p.dtype) if is_inexact(p) else p for x, p in pairs])


def _seen(x: Any, p: Any) -> Any:
    """An array in the precision of the arithmetic on its parameter, or the zeros that hold its place."""
    if not is_inexact(p):
        return None
    wide = widened(p.dtype)
    if is_inexact(x) and not isinstance(x, jax.ShapeDtypeStruct):
        return jnp.asarray(x, wide)
    return jnp.zeros_like(p, dtype=wide)


def _as_before(old: Any, new: Any) -> Any:
    return new if trees.is_key(new) else jnp.asarray(new, jnp.result_type(old))


@dataclass(frozen=True, eq=False)
class _FromOptax(Definition):
    theirs: Rule
    stands: Place

    @property
    def place(self) -> Place:
        return self.stands

    @property
    def accepts(self) -> frozenset[str] | None:
        return definition_of(self.theirs).accepts

    def init(self, params: Any) -> Any:
        leaves, structure = trees.flatten(params)
        state = self.theirs.init(jax.tree.unflatten(structure, [_seen(p, p) for p in leaves]))
        state, treedef = jax.tree.flatten(jax.tree.map(trees.own, state))
        # What is like a parameter was born where that is.
        free = {k: x for k, x in enumerate(state) if not isinstance(x, Tracer) and not x.committed}
        placed = trees.placed_with(leaves, free)
        return jax.tree.unflatten(treedef, [placed.get(k, x) for k, x in enumerate(state)])

    def update(self, grads: Any, state: Any, params: Any, extra: Mapping[str, Any]) -> tuple[Any, Any]:
        view = _View(grads, params)
        seen = view.grads, view.params
        handed = {name: view.extra(value) for name, value in extra_for(self.theirs, extra).items()}
        updates, new = self.theirs.update(seen[0], state, seen[1], **handed)
        new = jax.tree.map(_as_before, state, new)
        if not all(view.present):
            new = self._with_absent_of(state, new, view)
        return view.updates(updates), trees.unshared(new, (grads, params, seen, updates))

    def _with_absent_of(self, old: Any, new: Any, view: _View) -> Any:
        """A new state, with the memory of parameters that take no part as it was."""
        structure, present = view.structure, view.present
        treedef = jax.tree.structure(new)
        if structure == jax.tree.structure(0):
            # Of one array, no structure tells what is its own; inside a tuple it does.
            structure = jax.tree.structure((0,))
            marked = jax.tree.structure(jax.eval_shape(self.theirs.init, (_seen(view.ps[0], view.ps[0]),)))
            old, new = (jax.tree.unflatten(marked, jax.tree.leaves(state)) for state in (old, new))

        def slots(x: Any) -> list[Any] | None:
            return per_parameter(structure, Family((), x), x)

        def kept(old: Any, new: Any) -> Any:
            before = slots(old)
            if before is None:
                return new
            columns = zip(present, before, structure.flatten_up_to(new), strict=True)
            return jax.tree.unflatten(structure, [y if takes_part else x for takes_part, x, y in columns])

        new = jax.tree.map(kept, old, new, is_leaf=lambda x: slots(x) is not None)
        return jax.tree.unflatten(treedef, jax.tree.leaves(new))


@constructor
def from_optax(tx: "optax.GradientTransformation", *, place: Place = None) -> Definition:
    """A gradient transformation of Optax, or any pair of functions that keeps to its protocol, as a rule.

        chain(clip_by_global_norm(1.0), from_optax(optax.contrib.muon(1e-2), place="end"))
        partition({"table": from_optax(optax.adafactor(1e-2)), "rest": adamw(3e-4)}, {"table": "embed/**"})

    The state is that of the transformation, so that `optax.tree.get` and `find(state, optax.ScaleByAdamState)` work as
    they do on theirs, and it is brought under the laws of rules:

    * It sees parameters and gradients in float32 or wider, so that its memory and arithmetic have this precision (but
      for what it was told to keep narrower), and updates come out in it. State comes out in the dtypes it went in with.
    * A missing gradient (`None`) is a zero gradient to it; the update is `None`, and its memory of this parameter stays
      as it was. What is no inexact array it does not see.
    * Its state shares no buffer with parameters and gradients, is born where the parameters are, and can be born
      abstractly.
    * Functions among the extra arguments (`value_fn`) get parameters in their own dtypes, with the rest of the model.

    What it computes of all parameters together remains its own matter, as do its hyperparameters: those that
    `optax.inject_hyperparams` put into the state are set with `optax.tree.set`. A transformation that is a member of
    `chain` as it is keeps its own habits in all of this.

    Memory: that of the transformation. While it runs, gradients and parameters narrower than float32 in that, and
    zeros for what is missing, which XLA mostly need not keep.

    Args:
      tx: the transformation.
      place: where in a chain it stands, which it does not tell itself: "front" for what gives gradients or directions
        (`optax.clip`, `optax.scale_by_adam`), "end" for what gives updates (`optax.adam`), "behind" for what works on
        updates (`optax.keep_params_nonnegative`), "anywhere". With it, `chain` refuses a wrong order.

    Raises:
      TypeError: `tx` has no `init` and `update`.
      ValueError: `place` is none.
    """
    if place not in (None, "front", "end", "behind", "anywhere"):
        raise ValueError(f'from_optax: place is "front", "end", "behind", "anywhere" or None, not {place!r}')
    return _FromOptax(as_rule(tx, "from_optax"), place)
