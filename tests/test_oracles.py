"""Against PyTorch, in float64, step by step. Needs the dependency group `oracles`."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_rules as jr

pytestmark = [pytest.mark.oracle, pytest.mark.x64]

STEPS = 50

CASES = {
    "sgd": (jr.sgd(0.1), lambda torch, p: torch.optim.SGD(p, 0.1)),
    "velocity": (jr.sgd(0.1, 0.9), lambda torch, p: torch.optim.SGD(p, 0.1, momentum=0.9)),
    "nesterov": (jr.sgd(0.1, 0.9, True), lambda torch, p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True)),
    "l2": (
        jr.chain(jr.weight_decay(0.1), jr.sgd(0.1, 0.9)),
        lambda torch, p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    ),
    "adam": (jr.adam(0.1, 0.8, 0.99, 1e-6), lambda torch, p: torch.optim.Adam(p, 0.1, (0.8, 0.99), 1e-6)),
    "adam_l2": (
        jr.chain(jr.weight_decay(0.1), jr.adam(0.1)),
        lambda torch, p: torch.optim.Adam(p, 0.1, weight_decay=0.1),
    ),
    "adamw": (jr.adamw(0.1, weight_decay=0.1), lambda torch, p: torch.optim.AdamW(p, 0.1, weight_decay=0.1)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_pytorch(name, clip):
    torch = pytest.importorskip("torch")
    rule, make = CASES[name]
    if clip is not None:
        rule = jr.chain(jr.clip_by_global_norm(clip), rule)
    rng = np.random.default_rng(0)
    start = {"a": rng.normal(size=(4, 3)), "b": rng.normal(size=5)}
    theirs = {key: torch.nn.Parameter(torch.tensor(value)) for key, value in start.items()}
    optimizer = make(torch, list(theirs.values()))
    ours = {key: jnp.asarray(value) for key, value in start.items()}
    state = rule.init(ours)
    for _ in range(STEPS):
        grads = {key: value * 10 ** rng.uniform(-6, 2) for key, value in start.items()}
        for key, parameter in theirs.items():
            parameter.grad = torch.tensor(grads[key])
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(theirs.values(), clip)
        optimizer.step()
        ours, state = rule.apply({key: jnp.asarray(g) for key, g in grads.items()}, state, ours)
        for key, parameter in theirs.items():
            np.testing.assert_allclose(ours[key], parameter.detach().numpy(), rtol=1e-12, atol=1e-12)
