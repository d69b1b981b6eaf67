"""Rules without a direction of their own, and those that scale by sums and means of squares."""

import importlib
from functools import partial
from typing import Any

from jaxopt_rules.conformance.pairs import Pair, optax_transform, timm, torch_optimizer
from jaxopt_rules.rules.adadelta import adadelta
from jaxopt_rules.rules.adagrad import adagrad
from jaxopt_rules.rules.rmsprop import rmsprop
from jaxopt_rules.rules.rprop import rprop
from jaxopt_rules.rules.sgd import momentum, sgd
from jaxopt_rules.rules.sign import sign_sgd, signum


def _timm_rmsprop(**keywords: Any) -> Any:
    return torch_optimizer(lambda torch, p: timm("rmsprop_tf").RMSpropTF(p, 0.1, 0.9, 1e-4, **keywords))


def _optimi_sgd(**keywords: Any) -> Any:
    return torch_optimizer(lambda torch, p: importlib.import_module("optimi").SGD(p, 0.1, triton=False, **keywords))


def _halving(count: Any) -> Any:
    return 0.1 / 2 ** (count // 10)


def _inside(nesterov: bool) -> Any:
    """Optax's momentum behind its learning rate, which the velocity then contains."""
    return optax_transform(
        lambda optax: optax.chain(optax.scale_by_learning_rate(_halving), optax.trace(0.9, nesterov=nesterov))
    )


_outside = partial(rmsprop, eps_placement="outside", form="pytorch")

PAIRS = (
    Pair(
        "sgd dampening",
        lambda: sgd(0.1, 0.9, dampening=0.3, weight_decay=0.1, decay="l2"),
        "torch.optim.SGD",
        torch_optimizer(
            lambda torch, p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
        ),
        "first gradient not dampened, L2 decay",
    ),
    Pair(
        "sgd decoupled decay",
        lambda: sgd(0.1, 0.9, True, weight_decay=0.1),
        "timm.optim.SGDW",
        torch_optimizer(lambda torch, p: timm("sgdw").SGDW(p, 0.1, 0.9, weight_decay=0.1, nesterov=True)),
        "rate outside the velocity, decoupled decay",
    ),
    Pair(
        "sgd ema",
        lambda: sgd(0.1, 0.9, form="ema", weight_decay=0.1),
        "optimi.SGD",
        _optimi_sgd(momentum=0.9, dampening=True, decouple_wd=True, weight_decay=0.1),
        "the velocity is a running mean, decoupled decay",
    ),
    Pair("momentum", lambda: momentum(_halving), "optax.trace", _inside(nesterov=False), "rate inside the velocity"),
    Pair(
        "sgd tensorflow",
        lambda: sgd(_halving, 0.9, form="tensorflow"),
        "optax.trace",
        _inside(nesterov=False),
        "rate inside the velocity, which changes",
    ),
    Pair(
        "sgd tensorflow nesterov",
        lambda: sgd(_halving, 0.9, True, form="tensorflow"),
        "optax.trace",
        _inside(nesterov=True),
        "rate inside the velocity, which changes",
    ),
    Pair(
        "sign_sgd", lambda: sign_sgd(0.1), "optax.sign_sgd", optax_transform(lambda optax: optax.sign_sgd(0.1)), "plain"
    ),
    Pair(
        "signum",
        lambda: signum(0.1, 0.8),
        "optax.signum",
        optax_transform(lambda optax: optax.signum(0.1, 0.8)),
        "sign of the running mean",
    ),
    Pair(
        "signum decay",
        lambda: signum(0.1, 0.8, weight_decay=0.1),
        "pytorch_optimizer.SignSGD",
        torch_optimizer(
            lambda torch, p: importlib.import_module("pytorch_optimizer").SignSGD(p, 0.1, 0.8, weight_decay=0.1)
        ),
        "sign of the running mean, decoupled decay",
    ),
    Pair(
        "adagrad outside",
        lambda: adagrad(0.1, 0.2, 1e-4, eps_placement="outside", lr_decay=0.1, weight_decay=0.1, decay="l2"),
        "torch.optim.Adagrad",
        torch_optimizer(lambda torch, p: torch.optim.Adagrad(p, 0.1, 0.1, 0.1, 0.2, 1e-4)),
        "eps outside, falling rate, L2 decay",
    ),
    Pair(
        "adagrad outside from 0",
        lambda: adagrad(0.1, 0.0, 1e-10, eps_placement="outside"),
        "torch.optim.Adagrad",
        torch_optimizer(lambda torch, p: torch.optim.Adagrad(p, 0.1)),
        "eps outside",
    ),
    Pair(
        "adagrad",
        lambda: adagrad(0.1, 0.0, 1e-4),
        "optax.adagrad",
        optax_transform(lambda optax: optax.adagrad(0.1, 0.0, 1e-4)),
        "eps inside",
    ),
    Pair(
        "adagrad defaults",
        lambda: adagrad(0.1),
        "optax.adagrad",
        optax_transform(lambda optax: optax.adagrad(0.1)),
        "eps inside",
    ),
    Pair(
        "adadelta",
        lambda: adadelta(weight_decay=0.1, decay="l2"),
        "torch.optim.Adadelta",
        torch_optimizer(lambda torch, p: torch.optim.Adadelta(p, weight_decay=0.1)),
        "L2 decay",
    ),
    Pair(
        "adadelta",
        lambda: adadelta(0.5, 0.95, 1e-4),
        "optax.adadelta",
        optax_transform(lambda optax: optax.adadelta(0.5, 0.95, 1e-4)),
        "plain",
    ),
    Pair(
        "rmsprop outside",
        lambda: _outside(0.1, 0.99, 1e-4, weight_decay=0.1, decay="l2"),
        "torch.optim.RMSprop",
        torch_optimizer(lambda torch, p: torch.optim.RMSprop(p, 0.1, 0.99, 1e-4, weight_decay=0.1)),
        "eps outside, L2 decay",
    ),
    Pair(
        "rmsprop outside momentum",
        lambda: _outside(0.1, 0.99, momentum=0.9),
        "torch.optim.RMSprop",
        torch_optimizer(lambda torch, p: torch.optim.RMSprop(p, 0.1, momentum=0.9)),
        "eps outside, rate outside the velocity",
    ),
    Pair(
        "rmsprop outside centered",
        lambda: _outside(0.1, 0.9, 1e-4, centered=True, momentum=0.9),
        "torch.optim.RMSprop",
        torch_optimizer(lambda torch, p: torch.optim.RMSprop(p, 0.1, 0.9, 1e-4, momentum=0.9, centered=True)),
        "centered, eps outside, rate outside the velocity",
    ),
    Pair(
        "rmsprop tensorflow",
        lambda: rmsprop(0.1, 0.9, 1e-4, 1.0, momentum=0.9, weight_decay=0.1),
        "timm.optim.RMSpropTF",
        _timm_rmsprop(momentum=0.9, weight_decay=0.1, decoupled_decay=True),
        "v from 1, eps and rate inside, decoupled decay",
    ),
    Pair(
        "rmsprop tensorflow centered",
        lambda: rmsprop(0.1, 0.9, 1e-4, 1.0, centered=True, momentum=0.9, weight_decay=0.1, decay="l2"),
        "timm.optim.RMSpropTF",
        _timm_rmsprop(momentum=0.9, weight_decay=0.1, centered=True),
        "centered, v from 1, eps and rate inside, L2 decay",
    ),
    Pair(
        "rmsprop",
        lambda: rmsprop(_halving),
        "optax.rmsprop",
        optax_transform(lambda optax: optax.rmsprop(_halving)),
        "eps inside",
    ),
    Pair(
        "rmsprop nesterov",
        lambda: rmsprop(_halving, 0.9, 1e-4, 0.5, momentum=0.9, nesterov=True),
        "optax.rmsprop",
        optax_transform(lambda optax: optax.rmsprop(_halving, 0.9, 1e-4, 0.5, momentum=0.9, nesterov=True)),
        "v from 0.5, eps and rate inside, rate changes",
    ),
    Pair(
        "rmsprop centered",
        lambda: rmsprop(0.1, 0.9, 1e-4, eps_placement="outside", centered=True),
        "optax.rmsprop",
        optax_transform(lambda optax: optax.rmsprop(0.1, 0.9, 1e-4, eps_in_sqrt=False, centered=True)),
        "centered, eps outside",
    ),
    Pair(
        "rprop",
        lambda: rprop(0.1),
        "torch.optim.Rprop",
        torch_optimizer(lambda torch, p: torch.optim.Rprop(p, 0.1)),
        "plain",
    ),
    Pair(
        "rprop bounds",
        lambda: rprop(0.1, 0.6, 1.5, 0.05, 0.2),
        "torch.optim.Rprop",
        torch_optimizer(lambda torch, p: torch.optim.Rprop(p, 0.1, (0.6, 1.5), (0.05, 0.2))),
        "bounds that are met",
    ),
)
