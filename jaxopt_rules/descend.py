"""From a direction to an optimizer, with weight decay in any of its forms."""

from typing import Literal

from jaxopt_rules.apply import Decay, step
from jaxopt_rules.compose import chain
from jaxopt_rules.hooks import weight_decay as l2
from jaxopt_rules.rule import Rule, constructor
from jaxopt_rules.schedules import Schedule
from jaxopt_rules.select import Selector


@constructor
def descend(
    direction: Rule,
    learning_rate: float | Schedule,
    weight_decay: float | Schedule | None = None,
    where: Selector | None = None,
    *,
    decay: Decay | Literal["l2"] = "decoupled",
    peak: float | Schedule | None = None,
) -> Rule:
    """The optimizer that follows a direction: θ ← θ − α d, with weight decay in any of its forms.

        descend(d, α, λ, where)                 = chain(d, step(α, λ, where))
        descend(d, α, λ, where, decay="l2")     = chain(weight_decay(λ, where), d, step(α))

    Every optimizer of this library that is a direction and a rate takes these keywords and hands them on to here;
    `step` tells what each form of decay does. Without `weight_decay` there is none, and no hyperparameter for it.

    Memory: that of the direction; one slot more, 4 bytes per float32 parameter, with `decay="initial"`.

    Raises:
      ValueError: as `step`, but that `decay="l2"` is known here; or `decay="l2"` has no `weight_decay`.
    """
    if decay != "l2":
        return chain(direction, step(learning_rate, weight_decay, where, decay=decay, peak=peak))
    if weight_decay is None:
        raise ValueError('descend: decay="l2" needs weight_decay=..., such as 0.1')
    return chain(l2(weight_decay, where), direction, step(learning_rate, peak=peak))
