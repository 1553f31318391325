"""One optimiser step: forward and backward passes, clipping, and the update if all is finite."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from mambapy.experts import LoadBalance, load_balancing_loss, router_z_loss
from mambapy.lm import LM
from mambapy.train.config import TrainConfig


class Update:
    """A step of the optimiser on a batch; the numbers it gives are still on the device.

    They are (n,): the loss, the gradient's norm, and where there are experts, their balance's loss
    and each layer's load of each expert.

    Args:
        model: the model.
        optimizer: its optimiser.
        config: of the run.
        check: is given the loss and the norm before the weights change, and raises where they are
            not finite. None leaves that to the device: the weights stay as they are from the first
            step on that is not finite, and the host learns of it when it reads the numbers.
    """

    def __init__(
        self,
        model: LM,
        optimizer: torch.optim.AdamW,
        config: TrainConfig,
        check: Callable[[float, float], None] | None,
    ) -> None:
        self.model, self.optimizer, self.config, self.check = model, optimizer, config, check
        self.device = next(model.parameters()).device
        self.routed = "moe" in model.config.feed_forwards
        self.loss: Callable[..., Any] = model.routed_loss if self.routed else model.loss
        if config.compile:
            self.loss = torch.compile(self.loss)
        # 1 from the first step on whose loss or gradient is not finite.
        self.spoilt = torch.zeros((), device=self.device)

    def __call__(self, windows: Tensor, lr: float) -> Tensor:
        """Run one step on windows (accumulate b, l + 1) of the host."""
        if self.device.type == "cuda":
            # A graph reads it from the device, where it is a float32: so it is one without, too.
            lr = float(np.float32(lr))
            # From memory that the system cannot move the copy needs no waiting.
            windows = windows.pin_memory()
        self.set_lr(lr)
        return self.run(windows.to(self.device, non_blocking=True))

    def set_lr(self, lr: float | Tensor) -> None:
        """The learning rate of the steps to come."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def run(self, windows: Tensor) -> Tensor:
        """The step itself, on the device, without waiting for it where `check` is None."""
        self.optimizer.zero_grad(set_to_none=True)
        numbers = self._gradients(windows)
        if self.check is not None:
            self.check(*numbers[:2].tolist())
            self.optimizer.step()
        else:
            self._update_if_finite(numbers)
        return numbers

    def _gradients(self, windows: Tensor) -> Tensor:
        """The gradients of all passes, clipped; returns the numbers."""
        config = self.config
        losses: list[Tensor] = []
        balances: list[LoadBalance] = []
        for tokens in torch.split(windows, config.batch_size):  # (b, l + 1)
            with autocast(config.dtype, self.device):
                found = self.loss(tokens[:, :-1], tokens[:, 1:])
            part, routing = found if self.routed else (found, [])
            penalty, balance = self._routing(routing)
            torch.autograd.backward((part + penalty) / config.accumulate)
            losses.append(part.detach())
            balances += [] if balance is None else [balance]
        norm = clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        # Apple's GPUs have no float64.
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        loss = sum(part.to(wide) / config.accumulate for part in losses)
        numbers = [torch.as_tensor(loss), norm]
        if balances:
            numbers.append(torch.stack([balance.total.detach() for balance in balances]).mean())
            numbers.append(torch.stack([balance.load for balance in balances]).mean(0))
        return torch.cat([number.to(wide).flatten() for number in numbers])

    def _routing(self, router_logits: list[Tensor]) -> tuple[Tensor | float, LoadBalance | None]:
        """What is added to the loss for routers that are one-sided or loud; what they do."""
        if not router_logits:
            return 0.0, None
        model: Any = self.model.config
        balance = load_balancing_loss(router_logits, model.top_k)
        penalty = self.config.aux_loss * balance.total
        if self.config.router_z_loss:
            penalty = penalty + self.config.router_z_loss * router_z_loss(router_logits)
        return penalty, balance

    def _update_if_finite(self, numbers: Tensor) -> None:
        """Let the fused AdamW look at `spoilt`, as it does for torch's GradScaler."""
        finite = numbers[:2].isfinite().all()
        self.spoilt.copy_(torch.maximum(self.spoilt, (~finite).to(self.spoilt.dtype)))
        optimizer: Any = self.optimizer
        optimizer.grad_scale, optimizer.found_inf = None, self.spoilt
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf


def autocast(dtype: str, device: torch.device) -> AbstractContextManager[Any]:
    """The precision context of a forward pass."""
    if dtype == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))
