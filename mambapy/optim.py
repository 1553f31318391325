"""AdamW with parameter groups by role: what a parameter is decides whether it decays.

The role comes from the parameter's name, never from its shape: A_log is two-dimensional and must
not decay all the same.
"""

import re
from typing import Any

from torch import nn
from torch.optim import AdamW

from mambapy.errors import ConfigError

# role -> (pattern of the name's end, does weight decay apply?); the first match decides. A tied
# head has no name of its own and so counts as the embedding; an untied one is a matrix.
ROLES: dict[str, tuple[str, bool]] = {
    "A_log": (r"A(_b)?_log", False),
    "D": (r"D(_b)?", False),
    "dt_bias": (r"dt_bias(_b)?|dt_proj(_b)?\.bias", False),
    "BC_bias": (r"[BC]_bias", False),
    "mimo": (r"mimo_[xzo]", False),
    "init_states": (r"init_states", False),
    "norm": (r"([BC]_)?norm(2|_f)?\.(weight|bias)|(dt|b|c)_layernorm\.weight", False),
    "bias": (r"bias", False),
    "embedding": (r"embedding\.weight|pos_embed|cls_token", False),
    "conv": (r"conv1d(_b)?\.weight|patch_embed\.weight", True),
    "experts": (r"mlp\.fc[12]", True),
    "matrix": (
        r"(in_proj|x_proj(_b)?|dt_proj(_b)?|out_proj|fc1|fc2|lm_head|head|router)\.weight",
        True,
    ),
}

_FUSED_DEVICES = {"cpu", "cuda", "mps"}


def role(name: str) -> str:
    """The role of a parameter, a key of `ROLES`, from its dotted name.

    Raises:
        ConfigError: no pattern fits.
    """
    for key, (pattern, _) in ROLES.items():
        if re.search(rf"(^|\.)(?:{pattern})$", name):
            return key
    raise ConfigError(f"parameter {name!r} has no role; add it to mambapy.optim.ROLES: {[*ROLES]}")


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for the optimiser: the decayed parameters and the others.

    Each trainable parameter is in exactly one group, a shared one once.

    Args:
        model: its parameters' names must each have a role.
        weight_decay: decay of the first group, per step and relative to the learning rate, >= 0.

    Returns:
        `[{"params": [...], "weight_decay": weight_decay}, {"params": [...], "weight_decay": 0.0}]`

    Raises:
        ConfigError: a parameter has no role; the message names it.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            _, decays = ROLES[role(name)]
            groups[decays].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def make_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
) -> AdamW:
    """AdamW over `param_groups`, fused where the device has a fused step.

    Keep the parameters in float32 and use autocast for speed: in bfloat16 a relative update below
    2^-9 is rounded away, and training stalls or diverges.

    Args:
        model: the parameters to train, all on one device.
        lr: peak learning rate, > 0.
        weight_decay: decay of the matrices, >= 0.
        betas: decay of the running mean and of the running square, each in [0, 1).
        eps: added to the denominator, > 0.

    Raises:
        ConfigError: a parameter has no role.

    Source: Loshchilov & Hutter 2019 (arXiv 1711.05101).
    """
    groups = param_groups(model, weight_decay)
    devices = {p.device.type for group in groups for p in group["params"]}
    fused = len(devices) == 1 and devices <= _FUSED_DEVICES
    return AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)
