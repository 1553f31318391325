"""A whole optimiser step as one CUDA graph: the GPU goes from kernel to kernel by itself.

A step of a small model is thousands of kernels of some microseconds each, which Python cannot
launch as fast as the GPU runs them. Recorded once, all of them are one launch. What a graph reads
must stay where it is: tokens and learning rate are copied to fixed places, the gradients are the
graph's own, and AdamW counts its steps on the device.
"""

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from mambapy.errors import ConfigError
from mambapy.ops.gpu.record import recorded
from mambapy.train.config import TrainConfig
from mambapy.train.update import Update

# Steps before the recording: kernels are compiled, and AdamW makes its moments.
WARM_UP = 3


def refuses(update: Update) -> str | None:
    """Why a step cannot be recorded, or None."""
    if update.device.type != "cuda":
        return f"it needs a CUDA device, not {update.device.type}"
    if update.routed:
        return "experts read back how many tokens each of them has"
    if update.check is not None:
        return "every step is checked by the host"
    if not all(group.get("fused") for group in update.optimizer.param_groups):
        return "AdamW is not the fused one"
    if update.config.recompute != "none" and _is_random(update.model):
        return "what is recomputed has dropout in it, whose random numbers would be others"
    return None


def _is_random(model: torch.nn.Module) -> bool:
    """Whether any module draws random numbers in training."""
    kinds = torch.nn.modules.dropout._DropoutNd
    return any(
        (isinstance(module, kinds) and module.p > 0) or getattr(module, "drop_path", 0)
        for module in model.modules()
    )


class GraphedUpdate:
    """`Update`, recorded after some steps and played from then on; the numbers are the same.

    Args:
        update: the step. It must not be called by others any more.
        tell: is given the reason where the recording does not work; the steps are then called one
            by one.
    """

    def __init__(self, update: Update, tell: Callable[[str], None]) -> None:
        self.update, self._tell = update, tell
        self._failed = False
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream(update.device)
        self._windows: Tensor | None = None
        self._numbers: Tensor | None = None
        self._lr = torch.zeros((), device=update.device)
        update.set_lr(self._lr)

    def __call__(self, windows: Tensor, lr: float) -> Tensor:
        """Run one step on windows (accumulate b, l + 1) of the host, always of one shape."""
        self._lr.fill_(lr)
        windows = windows.pin_memory()
        if self._windows is None:
            self._windows = torch.empty_like(windows, device=self.update.device)
        self._windows.copy_(windows, non_blocking=True)
        self._steps += 1
        if not self._failed and self._graph is None and self._steps > WARM_UP:
            self._record(self._windows)
        if self._graph is None or self._numbers is None:
            return self._beside(self._windows)
        self._graph.replay()
        return self._numbers

    def _beside(self, windows: Tensor) -> Tensor:
        """A step as it is, on the stream that the recording will be on."""
        current = torch.cuda.current_stream(self.update.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            numbers = self.update.run(windows)
        current.wait_stream(self._stream)
        numbers.record_stream(current)
        return numbers

    def _record(self, windows: Tensor) -> None:
        """Record a step without running it."""
        self.update.optimizer.zero_grad(set_to_none=True)
        # The memory of the steps before would stay beside the graph's own.
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        groups = self.update.optimizer.param_groups
        try:
            for group in groups:
                group["capturable"] = True
            with recorded(graph, self._stream):
                self._numbers = self.update.run(windows)
        except RuntimeError as error:
            # Nothing has run, so nothing has changed.
            self._failed, self._numbers = True, None
            self.update.optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize(self.update.device)
            self._tell(str(error).split("\n")[0])
        else:
            self._graph = graph
        finally:
            for group in groups:
                group["capturable"] = False


def make_update(
    update: Update, config: TrainConfig, tell: Callable[[str], None]
) -> Update | GraphedUpdate:
    """The step as the configuration wants it; `tell` is given the reason where it is not recorded.

    Raises:
        ConfigError: it must be recorded and cannot.
    """
    must = config.cuda_graph == "always"
    if config.cuda_graph == "never" or not (must or update.device.type == "cuda"):
        return update
    reason = refuses(update)
    if reason is None:
        return GraphedUpdate(update, _must_not if must else tell)
    (_must_not if must else tell)(reason)
    return update


def _must_not(reason: str) -> None:
    """What happens to a recording that must be and cannot."""
    raise ConfigError(f"cuda_graph='always' cannot be: {reason}; 'auto' goes on without")
