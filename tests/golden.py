"""The golden numbers of the documented mutating API, replayed on `Parameter`s and `Optimizer`s.

`golden/README.md` says where the numbers come from and how the files are laid out.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import jaxopt_rules as jr

FOLDER = Path(__file__).parent / "golden"


@cache
def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def array(stored: dict[str, Any]) -> np.ndarray:
    """{shape, data} as an array; numbers that are no JSON are strings such as "NaN"."""
    return np.array([float(x) for x in stored["data"]], float).reshape(stored["shape"])


def hooks(stored: list[dict[str, Any]]) -> list[jr.Rule]:
    kinds = {"WeightDecay": jr.weight_decay, "ClipGrad": jr.clip_grad}
    return [kinds[hook["type"]](float(hook["value"])) for hook in stored]


def optimizer(conf: dict[str, Any], hook: list[jr.Rule], **options: Any) -> jr.Optimizer:
    match conf["type"]:
        case "SGD":
            return jr.SGD(conf["learning_rate"], hook=hook, **options)
        case "Momentum":
            return jr.Momentum(conf["learning_rate"], conf["momentum"], hook=hook, **options)
        case "Adam":
            return jr.Adam(conf["alpha"], conf["beta1"], conf["beta2"], hook=hook, **options)
        case "AdamW":
            source = jr.Adam(conf["alpha"], conf["beta1"], conf["beta2"], hook=hook)
            return jr.AdamW(source, weight_decay=conf["weight_decay"], **options)
    raise ValueError(conf["type"])


class Bag:
    """A model that is nothing but its parameters."""

    def __init__(self, parameters: dict[str, jr.Parameter]) -> None:
        self.parameters = parameters

    def params(self) -> dict[str, jr.Parameter]:
        return self.parameters


def slots(opt: jr.Optimizer, model: Any, name: str) -> dict[str, np.ndarray]:
    """The slots of one parameter by their names in the golden files: m and v, or v."""
    return {key.split(".")[2]: value for key, value in opt.state_dict(model).items() if key.endswith(f".{name}")}


def count(opt: jr.Optimizer, model: Any) -> int:
    return int(next(value for key, value in opt.state_dict(model).items() if key.endswith(".count")))
