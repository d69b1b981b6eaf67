"""What optimizers of PyTorch save: their param_groups and their memory of each parameter."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxopt_rules.families import Family
from jaxopt_rules.interop.torch.layout import as_tensor, dtype_name
from jaxopt_rules.state import Entry


class _Hyper(NamedTuple):
    """Where a hyperparameter of ours stands in a param_group."""

    key: str
    index: int | None = None  # in a pair
    sign: int = 1
    neutral: tuple[Any, ...] = ()  # with these a rule need not have it

    def read(self, group: Mapping[str, Any]) -> Any:
        value = group[self.key] if self.index is None else group[self.key][self.index]
        return None if value is None else self.sign * float(value)

    def write(self, group: dict[str, Any], value: float) -> None:
        new = self.sign * value
        old = group[self.key]
        if self.index is None:
            # A rate that PyTorch holds as a tensor, as under `capturable`, stays one.
            group[self.key] = as_tensor(np.asarray(new), old) if hasattr(old, "detach") else new
        else:
            pair = list(old)
            pair[self.index] = new
            group[self.key] = type(old)(pair)


@dataclass(frozen=True)
class Kind:
    """An optimizer of PyTorch: what its param_groups have, and what its state is here."""

    name: str
    here: str  # the constructor of its counterpart
    knows: Callable[[Mapping[str, Any]], bool]  # whether a param_group is one of its
    slots: Mapping[str, Mapping[str, str]]  # by family here: theirs by slot
    hyper: Mapping[str, _Hyper]  # by the public name here
    families: frozenset[str]  # besides those with slots, whose hyperparameters these are
    decay: str  # "decoupled", "l2" or, as the param_group says, "either"
    counts: bool = True  # whether it saves how many updates were finished

    def counts_for(self, family: Family) -> bool:
        """Whether what a formula here does goes by the number of updates that it saves for each parameter."""
        return self.counts and (family.name in self.slots or family.name in self.families - _ENDS)

    def owns(self, entry: Entry) -> bool:
        """Whether a hyperparameter here is one of this optimizer."""
        return entry.name in self.hyper and (entry.family.name in self.slots or entry.family.name in self.families)

    def decay_of(self, group: Mapping[str, Any]) -> str:
        """Where the decay acts: "l2" in the gradient, "decoupled" beside it, "either" where it is not said."""
        if self.decay != "either" or "decoupled_weight_decay" not in group:
            return self.decay
        return "decoupled" if group["decoupled_weight_decay"] else "l2"


_ADAM_HYPER = {
    "learning_rate": _Hyper("lr"),
    "b1": _Hyper("betas", 0),
    "b2": _Hyper("betas", 1),
    "eps": _Hyper("eps"),
    "weight_decay": _Hyper("weight_decay"),
}
_MOMENTS = {"m": "exp_avg", "v": "exp_avg_sq"}
_ENDS = frozenset({"step", "weight_decay"})

# By key of a param_group: why it cannot be on.
_REFUSED = {
    "maximize": "negate the loss instead",
    "caution": "the counterpart of timm's cautious optimizers is cautious(direction), which is not converted",
    "corrected_weight_decay": 'its counterpart is decay="corrected", which is not converted',
}

_KINDS = (
    Kind(
        "torch.optim.Muon",
        "muon_pytorch",
        lambda group: {"ns_coefficients", "ns_steps", "adjust_lr_fn", "momentum", "nesterov"} <= group.keys(),
        {"muon": {"m": "momentum_buffer"}},
        {
            "learning_rate": _Hyper("lr"),
            "beta": _Hyper("momentum"),
            "weight_decay": _Hyper("weight_decay"),
        },
        _ENDS,
        "decoupled",
        counts=False,
    ),
    Kind(
        "torch.optim.Adafactor",
        "adafactor_pytorch",
        lambda group: {"beta2_decay", "d", "eps"} <= group.keys(),
        {"adafactor": {"v": "variance"}},
        {
            "learning_rate": _Hyper("lr"),
            "decay_rate": _Hyper("beta2_decay", sign=-1),
            "eps": _Hyper("eps", 0),
            "min_rms": _Hyper("eps", 1),
            "clipping_threshold": _Hyper("d"),
            "weight_decay": _Hyper("weight_decay"),
        },
        frozenset({"adafactor_step"}),
        "decoupled",
    ),
    Kind(
        "transformers.Adafactor",
        "adafactor_transformers",
        lambda group: {"clip_threshold", "scale_parameter", "relative_step", "warmup_init", "beta1"} <= group.keys(),
        {"adafactor": {"v": "exp_avg_sq"}, "adafactor_momentum": {"m": "exp_avg"}},
        {
            "learning_rate": _Hyper("lr"),
            "decay_rate": _Hyper("decay_rate", sign=-1),
            "eps": _Hyper("eps", 0),
            "min_rms": _Hyper("eps", 1),
            "clipping_threshold": _Hyper("clip_threshold"),
            "momentum": _Hyper("beta1"),
            "weight_decay": _Hyper("weight_decay"),
        },
        frozenset({"adafactor_step"}),
        "decoupled",
    ),
    Kind(
        "torch.optim.Adam(amsgrad=True)",
        "amsgrad",
        lambda group: {"betas", "eps", "amsgrad"} <= group.keys() and group["amsgrad"],
        {"amsgrad": _MOMENTS | {"v_max": "max_exp_avg_sq"}},
        _ADAM_HYPER,
        _ENDS,
        "either",
    ),
    Kind(
        "torch.optim.Adam or AdamW",
        "adam",
        lambda group: {"betas", "eps", "amsgrad"} <= group.keys() and not group["amsgrad"],
        {"adam": _MOMENTS},
        _ADAM_HYPER,
        _ENDS,
        "either",
    ),
    Kind(
        "torch.optim.SGD",
        "sgd",
        lambda group: {"momentum", "dampening", "nesterov"} <= group.keys(),
        {"velocity": {"v": "momentum_buffer"}, "momentum": {"v": "momentum_buffer"}},
        {
            "learning_rate": _Hyper("lr"),
            "momentum": _Hyper("momentum", neutral=(0,)),
            "dampening": _Hyper("dampening", neutral=(0,)),
            "weight_decay": _Hyper("weight_decay"),
        },
        _ENDS,
        "l2",
        counts=False,
    ),
    Kind(
        "Lion",
        "lion",
        lambda group: {"betas", "weight_decay"} <= group.keys() and "eps" not in group,
        {"lion": {"m": "exp_avg"}},
        {name: _ADAM_HYPER[name] for name in ("learning_rate", "b1", "b2", "weight_decay")},
        _ENDS,
        "decoupled",
        counts=False,
    ),
)


def kind_of(group: Mapping[str, Any]) -> Kind:
    kind = next((kind for kind in _KINDS if kind.knows(group)), None)
    if kind is None:
        shown = ", ".join(key for key in group if key not in ("params", "param_names"))
        raise ValueError(f"the param_groups have {shown}, which is none of {', '.join(kind.name for kind in _KINDS)}")
    for key, instead in _REFUSED.items():
        if group.get(key):
            raise ValueError(f"{kind.name} has {key}={group[key]}; {instead}")
    return kind


class TorchEntry(NamedTuple):
    """A parameter in an optimizer of PyTorch."""

    name: str
    group: Mapping[str, Any]
    kind: Kind
    state: Mapping[str, Any]
    optimizer: int
    id: Any  # in `state` of that optimizer

    @property
    def memory(self) -> dict[str, Any]:
        """What it remembers, without its clock and what is recomputed."""
        return {key: x for key, x in self.state.items() if key not in ("step", "RMS") and x is not None}

    @property
    def step(self) -> int | None:
        return None if self.state.get("step") is None else int(self.state["step"])

    @property
    def counterpart(self) -> str:
        """A call that makes the rule for it here."""
        decay = self.hyper("weight_decay")
        keywords = ['maximum_of="uncorrected"'] if self.kind.here == "amsgrad" else []
        keywords += ["nesterov=True"] if self.kind.here == "sgd" and self.group["nesterov"] else []
        if decay:
            keywords.append(f"weight_decay={decay}")
            keywords += ['decay="l2"'] if self.kind.decay_of(self.group) == "l2" else []
        name = "adamw" if self.kind.here == "adam" and decay else self.kind.here
        return f"{name}({', '.join(['...', *keywords])})"

    def hyper(self, name: str) -> float | None:
        """A hyperparameter by its name here; `None` where it has none."""
        if name == "min_rms" and self.group.get("scale_parameter") is False:
            return None
        value = self.kind.hyper[name].read(self.group)
        if value is None and name == "eps" and self.memory:
            # By default PyTorch's Adafactor takes that of the parameters' dtype.
            return float(jnp.finfo(dtype_name(next(iter(self.memory.values())))).eps)
        return value


StateDicts = Mapping[str, Any] | Sequence[Mapping[str, Any]]
NamesThere = Sequence[str] | Sequence[Sequence[str]]


def read_entries(state_dicts: Sequence[Mapping[str, Any]], names: NamesThere | None) -> dict[str, TorchEntry]:
    """The parameters of optimizers by name."""
    single = names is None or len(names) == 0 or isinstance(names[0], str)
    columns: Any = [names] * len(state_dicts) if names is None else [names] if single else names
    if len(columns) != len(state_dicts):
        raise ValueError(f"names are {len(columns)} lists, and there are {len(state_dicts)} optimizers: one for each")
    entries: dict[str, TorchEntry] = {}
    for i, (saved, own) in enumerate(zip(state_dicts, columns, strict=True)):
        if not {"state", "param_groups"} <= saved.keys():
            raise ValueError("a state_dict of an optimizer has state and param_groups: optimizer.state_dict()")
        groups, kinds = saved["param_groups"], [kind_of(group) for group in saved["param_groups"]]
        total = sum(len(group["params"]) for group in groups)
        if own is None and not all("param_names" in group for group in groups):
            raise ValueError(
                "the optimizer was not made from named parameters, so its state_dict says nothing of names; give those "
                "of its parameters in their order: names=[name for name, _ in model.named_parameters()]"
            )
        if own is not None and len(own) != total:
            raise ValueError(f"names has {len(own)} names, and the optimizer has {total} parameters")
        rest = iter(own or ())
        for group, kind in zip(groups, kinds, strict=True):
            for j, id_ in enumerate(group["params"]):
                name = group["param_names"][j] if own is None else next(rest)
                if name in entries:
                    raise ValueError(f"two parameters of the optimizers are named {name!r}")
                entries[name] = TorchEntry(name, group, kind, saved["state"].get(id_) or {}, i, id_)
    return entries
