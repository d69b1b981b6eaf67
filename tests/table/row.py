"""What a row of the table of rules says, and what references are built with."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from reference import core as ref

import jaxopt_rules as jr


@dataclass(frozen=True)
class Row:
    name: str
    make: Callable[[], jr.Rule]
    reference: Callable[[], ref.Reference]
    live: str | None  # the hyperparameter that the laws about live values change
    rate: float | None = None  # of a rule that gives updates; None: it gives gradients or directions
    leafwise: bool = True
    every: int = 1  # the rule inside acts in every k-th call
    extra: Mapping[str, Any] = field(default_factory=dict)  # passed to all calls
    aligned: bool = True  # whether updates follow the gradient so closely that law 1 holds
    single: float = 1e-6  # how far a float32 run may be from the reference, over the largest value so far or 1
    double: float = 1e-12  # how far a float64 run may be
    complex: bool = True  # whether it takes complex gradients, or refuses them
    laws: bool = True  # not of a variant whose formula alone differs from that of another row
    thorough: bool = False  # whether its laws are left to the thorough run, since another row is like it


def each(make: Callable[..., ref.Reference], *args, **kwargs) -> Callable[[], ref.Reference]:
    return partial(ref.each, partial(make, *args, **kwargs))


def pointwise(formula: Callable, *values) -> Callable[[], ref.Reference]:
    return each(ref.pointwise, formula, *values)


def chained(*makes: Callable[[], ref.Reference]) -> Callable[[], ref.Reference]:
    return lambda: ref.chain(*(make() for make in makes))


def warmup_cosine(count: int) -> float:
    """Up to 0.01 over 5 updates, then half a cosine down to 0 over 40."""
    return 0.01 * count / 5 if count < 5 else 0.005 * (1 + math.cos(math.pi * min(count - 5, 40) / 40))


WARMUP_COSINE = jr.Warmup(jr.Cosine(0.01, 40), 5)
ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
