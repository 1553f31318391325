"""What a selective scan looks at: the matrix that it multiplies its input by.

Unrolled over time, a scan is y = M x, with one matrix for each channel (Mamba-1) or head (Mamba-2):

    M[t, s] = C_t^T exp((dt_{s+1} + ... + dt_t) A) dt_s B_s  (+ D where t = s),  0 for s after t

Like an attention matrix it says how much token t takes from token s; unlike one it has signs, and
its rows do not add up to one. Looking backward in time it is upper triangular.

    attention_matrix    mixer, x -> M, or its mean over channels
    patch_attention     VisionMamba, images -> how much the class token drew on each patch
    draw                image, weights -> a picture

Letters: b batch, l length, d d_model, m matrices (channels or heads), g groups, t and s tokens.

Source: Ali et al. 2024 (arXiv 2403.01590), The Hidden Attention of Mamba Models, section 3.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambapy import ops
from mambapy.bidirectional import BiMamba2Block, BiMambaBlock
from mambapy.checkpoints import atomic_write
from mambapy.errors import ConfigError, MissingExtraError, ShapeError
from mambapy.layers import DtProjection, taps, widen
from mambapy.mamba import MambaBlock
from mambapy.mamba2 import Mamba2Block
from mambapy.ops.dispatch import without_autocast
from mambapy.ops.reference import step_size
from mambapy.ops.running_sum import running_sum
from mambapy.ragged import Ragged
from mambapy.vim import VisionMamba

__all__ = ["attention_matrix", "draw", "patch_attention"]

# Numbers of M that are made at once: a few times this is all the memory beside the result.
AT_ONCE = 2**20


class Scan(NamedTuple):
    """What a scan takes but for its input, both kinds in one form, in the sequence's own order.

    There are j decays, each shared by q states. Mamba-1 has q = 1, Mamba-2 has j = 1.
    """

    dt: Tensor  # (b, l, m)
    A: Tensor  # (m, j)
    B: Tensor  # (b, l, g, j, q)
    C: Tensor  # (b, l, g, j, q)
    D: Tensor  # (m)
    backward: bool  # from the last token to the first


@torch.no_grad()
def attention_matrix(mixer: nn.Module, x: Tensor, reduce: str | None = None) -> Tensor:
    """The matrices that a mixer's scan multiplies its input by; see the equation above.

    They map what enters the scan, after the convolution, to what leaves it, before the gate. What a
    learned initial state adds comes from no token, and is left out. There is no gradient.

    Args:
        mixer: a MambaBlock, Mamba2Block, BiMambaBlock or BiMamba2Block.
        x: (b, l, d) the mixer's input, after the norm: `layer.norm(residual)`.
        reduce: None for each matrix, "mean_abs" for the mean of |M| over them, which never holds
            more than a few.

    Returns:
        (b, m, l, l) with M[..., t, s] as above, or (b, l, l) reduced; float32 or wider. m are the
        channels of Mamba-1, the heads of Mamba-2 (or its channels, where `D_has_hdim`). A
        bidirectional mixer has (2, ...): forward, lower triangular, and backward, upper triangular,
        both with t and s as x has them.

    Raises:
        ConfigError: the mixer has no such scan, or `reduce` is unknown.
        ShapeError: x does not fit.
    """
    if reduce not in (None, "mean_abs"):
        raise ConfigError(f"reduce={reduce!r} must be None or 'mean_abs'")
    scans = _scans(mixer, x)
    (b, l, m), rows = scans[0].dt.shape, torch.arange(x.shape[1], device=x.device)
    if reduce is not None:
        M = torch.stack([_mean_abs(scan, rows) for scan in scans])
    else:
        M = scans[0].dt.new_empty(len(scans), b, m, l, l)
        for out, scan in zip(M, scans, strict=True):
            for some, block in _blocks(scan, rows):
                out[:, some] = block
    return M if len(scans) > 1 else M[0]


@torch.no_grad()
def patch_attention(model: VisionMamba, images: Tensor, layer: int = -1) -> Tensor:
    """How much the class token drew on each patch in one block: its row of |M|.

    The mean over channels, summed over both directions, without the token's own entry. A model
    without a class token looks at the mean of all patches, so there it is the mean of all rows.

    Args:
        model: in evaluation mode, unless paths are to be dropped.
        images: (b, c, H, W), as the model takes them.
        layer: which block, negative ones from the last.

    Returns:
        (b, rows, columns) of patches, >= 0; float32 or wider.

    Raises:
        ConfigError: this is no VisionMamba, or it has no such block.
        ShapeError: the images do not fit.
    """
    if not isinstance(model, VisionMamba):
        raise ConfigError(f"model must be a VisionMamba, got {type(model).__name__}")
    layers = model.backbone.layers
    if type(layer) is not int or not -len(layers) <= layer < len(layers):
        raise ConfigError(f"layer={layer!r}: there is no such block of {len(layers)}")
    x, grid = model._tokens(images)
    x = model.backbone.to_residual(x)
    for before in layers[: layer % len(layers)]:
        x = before(x, Ragged())
    rows = torch.arange(x.shape[1], device=x.device)
    if model.cls_token is not None:
        # One row costs an l-th of the matrix.
        rows = rows[model._place(len(rows) - 1)][None]
    scans = _scans(layers[layer].mixer, layers[layer].norm(x))
    both = torch.stack([_mean_abs(scan, rows) for scan in scans])  # (2, b, rows, l)
    return model._patches(both.mean(dim=2).sum(dim=0)).unflatten(1, grid)


def draw(image: Tensor, weights: Tensor, path: str | Path) -> None:
    """Draw an image, and beside it the same with a map over it, as a PNG.

    Args:
        image: (c, H, W), c 1 or 3; its least number is drawn black, its greatest white.
        weights: (rows, columns), of `patch_attention` for instance; stretched to the image's size.
        path: of the PNG.

    Raises:
        ShapeError: a shape does not fit.
        MissingExtraError: matplotlib is not installed.
        CheckpointError: the picture cannot be written.
    """
    if image.dim() != 3 or image.shape[0] not in (1, 3) or 0 in image.shape:
        raise ShapeError(f"image must be (1 or 3, H, W), got {tuple(image.shape)}")
    if weights.dim() != 2 or 0 in weights.shape:
        raise ShapeError(f"weights must be (rows, columns), got {tuple(weights.shape)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "train") from error
    image, weights = (T.detach().float().cpu() for T in (image, weights))
    height, width = image.shape[1:]
    image = image.expand(3, -1, -1).permute(1, 2, 0) - image.min()  # (H, W, 3)
    heat = F.interpolate(weights[None, None], (height, width), mode="bilinear")[0, 0]
    figure = Figure(figsize=(8, 4 * height / width), dpi=100)
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.imshow((image / image.max().clamp(min=1e-12)).numpy())
        axes.set_axis_off()
    right.imshow(heat.numpy(), cmap="inferno", alpha=0.6)
    figure.subplots_adjust(0, 0, 1, 1, wspace=0.02)
    with atomic_write(Path(path)) as temporary:
        figure.savefig(temporary, format="png")


def _scans(mixer: nn.Module, x: Tensor) -> list[Scan]:
    """The scans of a mixer on its input x (b, l, d): forward, and backward where there is one."""
    if not isinstance(mixer, MambaBlock | Mamba2Block):
        raise ConfigError(
            "mixer must be a MambaBlock, Mamba2Block, BiMambaBlock or BiMamba2Block, whose scan is "
            f"y = M x, got {type(mixer).__name__}"
        )
    d = mixer.config.d_model
    if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[-1] != d or 0 in x.shape:
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ShapeError(f"x must be (b, l, d) with d = {d} and no size 0, got {got}")
    if not x.is_floating_point():
        raise ShapeError(f"x must be floating point, got {x.dtype}")
    ways = (False, True) if isinstance(mixer, BiMambaBlock | BiMamba2Block) else (False,)
    if isinstance(mixer, MambaBlock):
        u = mixer.in_proj(x).chunk(2, dim=-1)[0]  # (b, l, e)
        return [_scan(mixer, u, None, way) for way in ways]
    _, _, _, xBC, dt = mixer.in_proj(x).split(mixer.parts, dim=-1)
    return [_scan(mixer, xBC, dt, way) for way in ways]


def _scan(mixer: Any, x: Tensor, dt: Tensor | None, backward: bool) -> Scan:
    """One direction, from what enters the convolution, and Mamba-2's dt before its bias."""
    conv, A_log, D = (
        (mixer.conv1d_b, mixer.A_b_log, mixer.D_b)
        if backward
        else (mixer.conv1d, mixer.A_log, mixer.D)
    )
    x = ops.causal_conv1d(x, *taps(conv), activation="silu", reverse=backward)
    A, D = -torch.exp(widen(A_log)), widen(D)
    if dt is None:
        if backward:
            low, B, C = mixer.x_proj_b(x).split([mixer.config.rank, *2 * A.shape[1:]], dim=-1)
            dt, dt_bias = DtProjection.parts(mixer.dt_proj_b, low)
        else:
            dt, dt_bias, B, C = mixer._select(x)
        B, C = (widen(T)[:, :, None, :, None] for T in (B, C))  # (b, l, 1, n, 1)
        return Scan(step_size(widen(dt), dt_bias, True), A, B, C, D, backward)
    dt_bias = mixer.dt_bias_b if backward else mixer.dt_bias
    dt = F.softplus(widen(dt) + dt_bias).clamp(*mixer.config.dt_limit)  # (b, l, h)
    B, C = (widen(T).unsqueeze(3) for T in mixer._split(x)[1:])  # (b, l, g, 1, n)
    if D.dim() == 2:
        # A head's channels differ in D, and nothing else.
        A, dt = A.repeat_interleave(D.shape[1]), dt.repeat_interleave(D.shape[1], dim=2)
    return Scan(dt, A[:, None], B, C, D.flatten(), backward)


def _mean_abs(scan: Scan, rows: Tensor) -> Tensor:
    """The mean of |M| over the matrices: (b, r, l), of the rows (r) of M."""
    total = scan.dt.new_zeros(len(scan.dt), len(rows), scan.dt.shape[1])
    for _, block in _blocks(scan, rows):
        total += block.abs_().sum(dim=1)
    return total / len(scan.A)


def _blocks(scan: Scan, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Which matrices, and their rows (r) of M: (b, some of m, r, l), a few matrices at a time."""
    dt, A, B, C, D, backward = scan
    (b, l, m), g = dt.shape, B.shape[2]
    # Only differences are ever passed to exp, and they are never positive.
    total = running_sum(dt.flip(1)).flip(1) if backward else running_sum(dt)
    total, dt = total.transpose(1, 2), dt.transpose(1, 2)  # (b, m, l)
    group = torch.arange(m, device=dt.device) // (m // g)
    token = torch.arange(l, device=dt.device)
    unseen = token < rows[:, None] if backward else token > rows[:, None]  # (r, l)
    size = max(1, AT_ONCE // (b * len(rows) * l))
    for start in range(0, m, size):
        some = slice(start, start + size)
        gap = total[:, some, rows, None] - total[:, some, None]  # (b, some, r, l)
        gap = gap.clamp_(min=0).to(dt.dtype)
        M = torch.zeros_like(gap)
        for j in range(A.shape[1]):
            with without_autocast(dt):
                pairs = torch.einsum("brgq,bsgq->bgrs", C[:, rows, :, j], B[:, :, :, j])
            pairs = pairs if g == 1 else pairs[:, group[some]]
            M.addcmul_(torch.exp_(gap * A[some, j, None, None]), pairs)
        M.mul_(dt[:, some, None]).masked_fill_(unseen, 0)
        M[:, :, torch.arange(len(rows), device=dt.device), rows] += D[some, None]
        yield some, M
