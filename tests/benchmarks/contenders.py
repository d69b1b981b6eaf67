"""Those that run against each other: one optimizer as each library writes it, as a call that makes one step.

What is compiled is `jax.jit(step, donate_argnums=(0, 1))` for us and for Optax, with the same trees and the same
donation; PyTorch runs its fused kernel in place. `built` lets everyone make two steps first, and compares.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from processes import Settings

import jaxopt_rules as jr

AGREE = 1e-5  # how far parameters of order 1 may be apart behind two steps

Step = Callable[[Any, Any, Any], tuple[Any, Any]]


@dataclass(frozen=True)
class Workload:
    """Parameters as equal leaves."""

    leaves: int
    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        return self.leaves * int(np.prod(self.shape))

    def __str__(self) -> str:
        return f"{self.parameters / 1e6:.1f}M: {self.leaves} × {'×'.join(map(str, self.shape))}"

    def arrays(self, seed: int, scale: float) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(seed)
        return {f"{i:04}": scale * rng.standard_normal(self.shape, np.float32) for i in range(self.leaves)}

    def structs(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {f"{i:04}": jax.ShapeDtypeStruct(self.shape, jnp.float32) for i in range(self.leaves)}


@dataclass(frozen=True)
class Recipe:
    """One optimizer in three libraries, and the bytes that a step must move for a float32 parameter.

    Each array that is read is 4 bytes per parameter, each that is written 4 more: of AdamW g; m, v and θ in and out.
    """

    ours: Callable[[], jr.Rule]
    optax: Callable[[Any], Any]  # of the module
    torch: Callable[[Any, list[Any]], Callable[[], object]] | None = None  # of the module and the parameters
    bytes_each: int | None = None  # None: depends on the shapes


def _torch_clipped(torch: Any, params: list[Any]) -> Callable[[], object]:
    step = _torch_adamw(torch, params)

    def clipped() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        step()

    return clipped


def _torch_adamw(torch: Any, params: list[Any]) -> Callable[[], object]:
    return torch.optim.AdamW(params, 1e-3, weight_decay=0.01, fused=True).step


def _torch_momentum(torch: Any, params: list[Any]) -> Callable[[], object]:
    return torch.optim.SGD(params, 1e-3, momentum=0.9, fused=True).step


ADAMW = Recipe(
    ours=lambda: jr.adamw(1e-3, weight_decay=0.01),
    optax=lambda optax: optax.adamw(1e-3, weight_decay=0.01),
    torch=_torch_adamw,
    bytes_each=28,
)
CLIPPED_ADAMW = Recipe(
    ours=lambda: jr.chain(jr.clip_by_global_norm(1.0), jr.adamw(1e-3, weight_decay=0.01)),
    optax=lambda optax: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.01)),
    torch=_torch_clipped,
    bytes_each=32,  # the norm must be known before the first parameter changes: g is read twice
)
RECIPES = {
    "clip + AdamW": CLIPPED_ADAMW,
    "AdamW": ADAMW,
    "momentum": Recipe(
        ours=lambda: jr.sgd(1e-3, 0.9),
        optax=lambda optax: optax.sgd(1e-3, 0.9),
        torch=_torch_momentum,
        bytes_each=20,
    ),
    "Lion": Recipe(
        ours=lambda: jr.lion(1e-4, weight_decay=0.01),
        optax=lambda optax: optax.lion(1e-4, weight_decay=0.01),
        bytes_each=20,
    ),
    # PyTorch's is another algorithm: another rate, other axes.
    "Adafactor": Recipe(
        ours=lambda: jr.adafactor(1e-3),
        optax=lambda optax: optax.adafactor(1e-3),
    ),
}


def our_step(rule: jr.Rule) -> Step:
    return lambda params, state, grads: rule.apply(grads, state, params)


def optax_step(optax: Any, transformation: Any) -> Step:
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = transformation.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


class Jitted:
    """A compiled step that donates its parameters and state, and goes on from what it returned."""

    def __init__(self, step: Step, init: Callable[[Any], Any], params: Mapping[str, np.ndarray], grads: Any) -> None:
        self.step = jax.jit(step, donate_argnums=(0, 1))
        self.params = {name: jnp.array(x) for name, x in params.items()}
        self.state = init(self.params)
        self.grads = grads

    def __call__(self) -> None:
        self.params, self.state = self.step(self.params, self.state, self.grads)
        # All that one program returns is there at the same moment.
        jax.block_until_ready(self.params)

    def result(self) -> np.ndarray:
        return np.asarray(next(iter(self.params.values())))


class Torch:
    """A step of PyTorch's, in place."""

    def __init__(
        self, torch: Any, make: Callable[..., Any], params: Mapping[str, np.ndarray], grads: Mapping[str, np.ndarray]
    ) -> None:
        self.params = [torch.nn.Parameter(torch.from_numpy(x.copy())) for x in params.values()]
        for parameter, grad in zip(self.params, grads.values(), strict=True):
            # Clipping writes to it.
            parameter.grad = torch.from_numpy(grad.copy())
        self.step = make(torch, self.params)

    def __call__(self) -> None:
        self.step()

    def result(self) -> np.ndarray:
        return self.params[0].detach().numpy()


def built(
    recipe: Recipe, workload: Workload, settings: Settings, libraries: Sequence[str] = ("optax", "torch")
) -> dict[str, Jitted | Torch]:
    """The contenders of one recipe, ours first; each has made two steps, to the same parameters.

    Raises:
      AssertionError: they are not the same: what would be compared is not the same work.
    """
    params, grads = workload.arrays(seed=0, scale=1.0), workload.arrays(seed=1, scale=0.01)
    arrays = {name: jnp.array(x) for name, x in grads.items()}
    rule = recipe.ours()
    contenders: dict[str, Jitted | Torch] = {"ours": Jitted(our_step(rule), rule.init, params, arrays)}
    if "optax" in libraries and (optax := settings.peer("optax")):
        transformation = recipe.optax(optax)
        contenders["optax"] = Jitted(optax_step(optax, transformation), transformation.init, params, arrays)
    if "torch" in libraries and recipe.torch and (torch := settings.peer("torch")):
        contenders["torch"] = Torch(torch, recipe.torch, params, grads)
    for contender in contenders.values():
        contender()
        contender()
    for name, contender in contenders.items():
        np.testing.assert_allclose(
            contender.result(), contenders["ours"].result(), rtol=0, atol=AGREE, err_msg=f"{name}, {workload}"
        )
    return contenders
