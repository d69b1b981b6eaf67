"""What a rule does with each parameter of a model, before anything is allocated."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_rules import trees
from jaxopt_rules.compose import FROZEN
from jaxopt_rules.families import families
from jaxopt_rules.numerics import is_inexact
from jaxopt_rules.rule import Rule, as_rule, definition_of
from jaxopt_rules.tables import Table


def explain(rule: Rule, params: Any) -> Table:
    """A table of the leaves of `params`: group, what decays, rate multiplier, slots and their bytes.

        rule = partition({"matrix": sgd(0.02, momentum=0.95), "rest": adamw(3e-4)}, by={"matrix": "**/w"})
        print(explain(rule, params))

    It prints as text, shows as a table in Jupyter, and `pandas.DataFrame(explain(rule, params).rows)` takes it. The
    columns are

      leaf      its path
      shape     and dtype, or the type of what is no array
      group     the label of its group in `partition`; "frozen" where `freeze` keeps it from the rule; "absent" where
                it is no array of floating-point numbers
      decay     the weight decays that act on it and the rules that they are in
      rate      what its updates are multiplied by besides the learning rate (`scale_by_path`, `layerwise_decay`), at
                first where that is a schedule; 0 where it is frozen
      slots     the memory that the rule keeps for it, by name
      bytes     the size of that

    Nothing is allocated: `params` may be arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      TypeError: `rule` is no rule.
      ValueError: a pattern of the rule matches no leaf, or a leaf belongs to two groups or to none.
    """
    definition = definition_of(as_rule(rule, "explain"))
    leaves, treedef = trees.flatten(params)
    paths = trees.paths(params)
    slots: list[list[tuple[str, int]]] = [[] for _ in leaves]
    arrays = [k for k, p in enumerate(leaves) if is_inexact(p)]
    # Functions and other leaves that are no arrays are no arguments of `eval_shape`.
    shapes = [jax.ShapeDtypeStruct(leaves[k].shape, leaves[k].dtype) for k in arrays]

    def born(shapes: list[Any]) -> Any:
        whole: list[Any] = [None] * len(leaves)
        for k, shape in zip(arrays, shapes, strict=True):
            whole[k] = shape
        return rule.init(jax.tree.unflatten(treedef, whole))

    everything = list(families(jax.eval_shape(born, shapes)))
    # Memory that belongs to no parameter is there without parameters. Where the tree is one array, no structure tells.
    single = treedef == jax.tree.structure(0)
    without = list(families(jax.eval_shape(lambda: rule.init(None)))) if single else everything
    for family, bare in zip(everything, without, strict=True):
        for name in family.slots:
            try:
                parts = treedef.flatten_up_to(getattr(family.state, name))
            except (ValueError, TypeError):
                continue  # memory that belongs to no parameter
            if single and jax.tree.leaves(getattr(bare.state, name)):
                continue
            for k in arrays:
                if size := sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(parts[k])):
                    slots[k].append((f"{family.name}.{name}", size))
    rows = []
    for k, share in enumerate(definition.shares(paths, leaves)):
        p = leaves[k]
        if p is None:
            continue
        present, has_shape = is_inexact(p), hasattr(p, "shape") and hasattr(p, "dtype")
        # Whatever stands around `freeze`, nothing of it reaches the parameter.
        frozen = share.rate == FROZEN.rate and FROZEN.group in share.group.split("/")
        rows.append(
            (
                paths[k],
                str(tuple(p.shape)) if has_shape else "",
                str(p.dtype) if has_shape else type(p).__name__,
                share.group if present else "absent",
                ", ".join(() if frozen else share.decay),
                float(share.rate) if present else "",
                ", ".join(name for name, _ in slots[k]),
                sum(size for _, size in slots[k]),
            )
        )
    return Table(("leaf", "shape", "dtype", "group", "decay", "rate", "slots", "bytes"), tuple(rows))
