"""PyTorch: a run that began there goes on here, and back.

    from jaxopt_rules.interop.torch import FLAX, load_model_state, load_optimizer_state

    layout = FLAX.also(names={"conv": "features.0", "dense": "head"})
    params = load_model_state(model.state_dict(), params, layout)
    rule = adamw(3e-4, weight_decay=0.1)
    state = load_optimizer_state(optimizer.state_dict(), params, rule, layout)

and back, into a model and an optimizer that are built there as for a new run:

    model.load_state_dict(model_state_dict(params, layout, like=model.state_dict()))
    optimizer.load_state_dict(optimizer_state_dict(state, params, rule, layout, like=optimizer))

A `Layout` says what the parameters are called there and how their axes are ordered; both are rules that are written
down, never guessed from shapes. Which rule is whose counterpart:

    torch.optim.SGD                       sgd(lr, momentum, nesterov, dampening=..., weight_decay=..., decay="l2"),
                                          with a momentum also in the form "tensorflow" and, where the dampening is
                                          equal to the momentum, "ema"
    torch.optim.Adam                      adam(lr), adamw(lr, weight_decay=..., decay="l2")
    torch.optim.AdamW                     adamw(lr)
    either with amsgrad=True              amsgrad(lr, maximum_of="uncorrected")
    torch.optim.Adafactor                 adafactor_pytorch()
    transformers' Adafactor               adafactor_transformers()
    lion_pytorch's and timm's Lion        lion(lr, weight_decay=...)
    torch.optim.Muon                      muon_pytorch(lr, polar=NewtonSchulz(eps_placement="max", dtype="bfloat16"))

They may stand in chains, groups and wrappers. `polar` of Muon, and a form of decoupled decay other than PyTorch's, are
choices of the rule that are not looked into.
"""

from jaxopt_rules.interop.torch.layout import EQUINOX as EQUINOX
from jaxopt_rules.interop.torch.layout import FLAX as FLAX
from jaxopt_rules.interop.torch.layout import SAME as SAME
from jaxopt_rules.interop.torch.layout import Axes as Axes
from jaxopt_rules.interop.torch.layout import Layout as Layout
from jaxopt_rules.interop.torch.models import load_model_state as load_model_state
from jaxopt_rules.interop.torch.models import model_state_dict as model_state_dict
from jaxopt_rules.interop.torch.states import load_optimizer_state as load_optimizer_state
from jaxopt_rules.interop.torch.states import optimizer_state_dict as optimizer_state_dict
