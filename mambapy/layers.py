"""The small modules that every model here is built from: one copy of each."""

from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, ClassVar, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from mambapy import ops
from mambapy.errors import ConfigError
from mambapy.init import init_dt_bias, init_dt_weight
from mambapy.ops.dispatch import is_traced
from mambapy.ops.step_plan import Weights

M = TypeVar("M", bound="WideParameters")
K = TypeVar("K", bound=nn.Module)

# What weights can be stored as, for decoding.
QUANTIZED = ("int8", "bfloat16")


class WideParameters(nn.Module):
    """A module some of whose own parameters stay in float32 when it is cast to half precision.

    `model.to(torch.bfloat16)` rounds matrices, where a relative error of 0.4 % averages out. In
    A_log, D and dt_bias it would change how fast every state decays.
    """

    wide: ClassVar[tuple[str, ...]] = ()

    def _apply(self: M, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> M:
        kept = [self._parameters.get(name) for name in self.wide]
        ids = {id(T) for P in kept if P is not None for T in (P, P.grad)}

        def apply(T: Tensor) -> Tensor:
            moved = fn(T)
            if id(T) in ids and moved.dtype in (torch.float16, torch.bfloat16):
                return T.to(moved.device, torch.float32)
            return moved

        super()._apply(apply, recurse)  # type: ignore[no-untyped-call]
        return self


def wide_names(model: nn.Module) -> set[str]:
    """The names of all parameters that stay in float32 or wider."""
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if isinstance(module, WideParameters)
        for name in module.wide
    }


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def widen(T: Tensor) -> Tensor:
    """T in float32 or wider."""
    return T.to(wide(T.dtype))


def _autocast_to(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What autocast makes of a tensor of `dtype` on x's device before a product."""
    kind = x.device.type
    if dtype == torch.float64 or kind == "meta" or not torch.is_autocast_enabled(kind):
        return dtype
    return torch.get_autocast_dtype(kind)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learnable scale, calculated in float32 or wider.

    Args:
        d: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, d: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(d))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The scale starts at one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., d), in the weight's dtype or what autocast makes of it."""
        return ops.rms_norm(x, self.weight, self.eps, dtype=_autocast_to(x, self.weight.dtype))


def add_and_norm(norm: nn.Module, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
    """s = x + added, (..., d), x itself where there is nothing to add: norm(s), and s."""
    if added is not None and is_plain(norm, RMSNorm):
        weight, eps = norm.weight, norm.eps
        return ops.add_rms_norm(added, x, weight, eps, dtype=_autocast_to(x, weight.dtype))
    s = x if added is None else x + added
    return norm(s), s


class UnscaledRMSNorm(nn.Module):
    """RMSNorm without a scale: it has no parameters."""

    weight = None

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def reset_parameters(self) -> None:
        """There is nothing to draw."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., d), in x's dtype."""
        return ops.rms_norm(x, None, self.eps).to(x.dtype)


class GatedRMSNorm(nn.Module):
    """A norm of each group of channels, with a gate silu(z) before or after it.

    Args:
        d: channels.
        n_groups: groups of d / n_groups channels, each normalised on its own.
        eps: added to the mean square.
        norm_before_gate: norm(y) silu(z), or else norm(y silu(z)).

    Source: Dao & Gu 2024 (arXiv 2405.21060), section 7.1.
    """

    def __init__(
        self, d: int, n_groups: int = 1, eps: float = 1e-5, *, norm_before_gate: bool = False
    ) -> None:
        super().__init__()
        self.n_groups, self.eps, self.norm_before_gate = n_groups, eps, norm_before_gate
        self.weight = nn.Parameter(torch.empty(d))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The scale starts at one."""
        nn.init.ones_(self.weight)

    def forward(self, y: Tensor, z: Tensor, *, overwrite: bool = False) -> Tensor:
        """Map y and z (..., d) to (..., d), in the weight's dtype; may `overwrite` y."""
        if not self.norm_before_gate:
            out = y if overwrite else None
            y = ops.gated_rms_norm(y, z, self.weight, self.n_groups, self.eps, out=out)
            return y.to(self.weight.dtype)
        groups = ops.rms_norm(widen(y).unflatten(-1, (self.n_groups, -1)), None, self.eps)
        y = groups.flatten(-2) * widen(self.weight) * F.silu(widen(z))
        return y.to(self.weight.dtype)


class DtProjection(WideParameters, nn.Linear):
    """The up-projection of dt, (b, l, R) -> (b, l, e); its bias is dt_bias and stays in float32.

    Called as a layer it adds the bias, in float32. A scan can add it on the way instead, which
    saves a pass over (b, l, e): see `parts`.
    """

    wide = ("bias",)

    def __init__(self, rank: int, d_inner: int, init: str, scale: float) -> None:
        # nn.Linear initialises itself, which needs these.
        self.init, self.scale = init, scale
        super().__init__(rank, d_inner)
        self.bias = nn.Parameter(widen(self.bias.detach()))

    def reset_parameters(self) -> None:
        """The weight; the bias belongs to the block, which knows the range of dt."""
        init_dt_weight(self.weight, self.init, self.scale)

    def reset_bias(self, dt_min: float, dt_max: float, floor: float) -> None:
        """softplus(bias) log-uniform in [dt_min, dt_max]."""
        init_dt_bias(self.bias, dt_min, dt_max, floor)

    def forward(self, x: Tensor) -> Tensor:
        """dt before softplus, bias included."""
        return F.linear(x, self.weight) + self.bias

    @staticmethod
    def parts(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """dt and the bias still to be added to it: None unless `layer` is a plain DtProjection."""
        if isinstance(layer, DtProjection) and is_plain(layer, DtProjection):
            return F.linear(x, layer.weight), layer.bias
        return layer(x), None


def is_plain(layer: nn.Module, kind: type[K]) -> TypeGuard[K]:
    """Whether reading a layer's weight gives what calling it would.

    Not so for a hooked, patched, adapted (LoRA), quantised or parametrised layer. Every fast path
    that reads weights asks here first.
    """
    if type(layer) is not kind or "forward" in layer.__dict__:
        return False
    # Libraries that bring kernels of their own put them in the class.
    is_own = getattr(kind.forward, "__qualname__", "") == f"{kind.__qualname__}.forward"
    return is_own and layer._compiled_call_impl is None and not any(hook_tables(layer))


def taps(conv: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight (e, k) and bias (e) of a depthwise convolution.

    Raises:
        ConfigError: it is wrapped, by an adapter for instance, which would not be called.
    """
    if not isinstance(conv, nn.Conv1d):
        raise ConfigError(
            f"the convolution is a {type(conv).__name__}, which is never called: its weights are "
            "read. Leave conv1d out, and adapt in_proj, x_proj, dt_proj or out_proj"
        )
    return conv.weight[:, 0], conv.bias


def hook_tables(layer: nn.Module) -> tuple[Sized, ...]:
    """Where torch keeps the hooks that a call of the layer runs."""
    return (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        layer._backward_hooks,
        layer._backward_pre_hooks,
        nn_module._global_forward_hooks,
        nn_module._global_forward_pre_hooks,
        nn_module._global_backward_hooks,
        nn_module._global_backward_pre_hooks,
    )


def product(layer: nn.Module) -> Weights | None:
    """What a fused step needs to know of a layer y = W x + bias, or None if it must be called."""
    if is_plain(layer, nn.Linear) or is_plain(layer, DtProjection):
        return Weights(layer.weight, layer.bias)
    if is_plain(layer, QuantizedLinear):
        return Weights(layer.weight, layer.bias, layer.scale)
    return None


def lookup(layer: nn.Module) -> Weights | None:
    """The table of an embedding, or None if it must be called."""
    if is_plain(layer, nn.Embedding) and layer.max_norm is None:
        return Weights(layer.weight)
    if is_plain(layer, QuantizedEmbedding):
        return Weights(layer.weight, None, layer.scale)
    return None


def may_overwrite(layer: nn.Module) -> bool:
    """Whether what `layer` returns is the caller's own: no gradient, no hook, nobody who watches.

    To take memory from the system is slow, about a tenth of a block's time. So results are written
    over what is no longer needed.
    """
    return not torch.is_grad_enabled() and not is_traced() and product(layer) is not None


class QuantizedLinear(WideParameters):
    """y = W x + bias with W in fewer bits, for decoding, which is bound by reading the weights.

    In int8, row i of W is scale[i] times integers from -127 to 127; in bfloat16 there is no scale.
    The product itself is calculated in x's dtype. There is no gradient for W.

    Args:
        linear: the layer to take the weights of.
        kind: "int8" or "bfloat16".
    """

    wide = ("bias", "scale")

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__()
        weight, scale = quantize(linear.weight, kind)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = None if scale is None else nn.Parameter(scale, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        y = F.linear(x, self.weight.to(x.dtype))
        if self.scale is not None:
            y = y * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class QuantizedEmbedding(WideParameters):
    """Rows of a quantised matrix, (...) integers -> (..., d) float32; shares it with a tied head.

    Args:
        embedding: the layer to take the weights of.
        kind: "int8" or "bfloat16".
    """

    wide = ("scale",)

    def __init__(self, embedding: nn.Embedding, kind: str) -> None:
        super().__init__()
        weight, scale = quantize(embedding.weight, kind)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = None if scale is None else nn.Parameter(scale, requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (...) to (..., d)."""
        x = self.weight[tokens].float()
        return x if self.scale is None else x * self.scale[tokens].unsqueeze(-1)


@torch.no_grad()
def quantize(weight: Tensor, kind: str) -> tuple[Tensor, Tensor | None]:
    """(W in `kind`, its scale for each row or None): symmetric rounding to nearest."""
    if kind == "bfloat16":
        return weight.to(torch.bfloat16), None
    scale = weight.float().abs().amax(dim=1) / 127
    # A row of zeros has any scale.
    scale = torch.where(scale > 0, scale, 1.0)
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without gradients, every module in evaluation mode; then each in the mode it was in."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
