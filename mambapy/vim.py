"""Vision Mamba: an image as a sequence of patches, through blocks that look both ways.

From the outside in:

    VisionMamba        patches -> class token -> positions -> VMamba -> norm -> head
      VMamba           the bare stack, (b, l, d) -> (b, l, d): x = x + mixer(norm(x)), each block
        BiMambaBlock   one mixer, see bidirectional.py

Letters: b batch, c channels, H x W image, l patches (and the class token), d embed_dim.

Source: Zhu et al. 2024 (arXiv 2401.09417), and its code.
"""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mambapy import checkpoints
from mambapy.bidirectional import BiMamba2Block, BiMambaBlock
from mambapy.config import Mamba2Config, MambaConfig, VimConfig
from mambapy.errors import ConfigError, ShapeError
from mambapy.layers import RMSNorm, wide, wide_names
from mambapy.ragged import Ragged
from mambapy.stack import Stack

__all__ = [
    "Mamba2Config",
    "MambaConfig",
    "VMamba",
    "VimConfig",
    "VisionMamba",
    "from_pretrained",
    "vim_base",
    "vim_small",
    "vim_tiny",
]


class VMamba(Stack):
    """A stack of bidirectional blocks, (b, l, d) -> (b, l, d); `forward` is what it has of `Stack`.

    A mask may be given: each row's padding stays padding, in both directions.

    Args:
        config: a MambaConfig or Mamba2Config.
        drop_path_rate: see `VimConfig`.
    """

    can_plan = False

    def __init__(self, config: MambaConfig | Mamba2Config, drop_path_rate: float = 0.0) -> None:
        kinds: dict[type, Any] = {MambaConfig: BiMambaBlock, Mamba2Config: BiMamba2Block}
        if type(config) not in kinds:
            raise ConfigError(
                f"config must be a MambaConfig or Mamba2Config, got {type(config).__name__}"
            )
        super().__init__(config, (kinds[type(config)](config) for _ in range(config.n_layers)))
        for i, layer in enumerate(self.layers):
            rate = drop_path_rate * i / max(1, config.n_layers - 1)
            layer.drop_path = rate


class VisionMamba(nn.Module):
    """An image classifier, (b, c, H, W) -> (b, num_classes), with timm's methods.

    Args:
        config: the architecture.
    """

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.config = config
        self.num_classes, self.num_features, d = (
            config.num_classes,
            config.embed_dim,
            config.embed_dim,
        )
        self.grid = config.grid_of(*config.sizes("img_size"))
        patches = self.grid[0] * self.grid[1]
        self.patch_embed = nn.Conv2d(
            config.in_chans, d, config.sizes("patch_size"), config.sizes("stride")
        )
        has_token = config.class_token != "none"
        self.cls_token = nn.Parameter(torch.empty(1, 1, d)) if has_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, patches + has_token, d))
        self.backbone = VMamba(config.stack(), config.drop_path_rate)
        # What timm asks for: each block's channels, and pixels for one step of its maps.
        self.feature_info = [
            {"module": f"backbone.layers.{i}", "num_chs": d, "reduction": config.sizes("stride")[0]}
            for i in range(config.depth)
        ]
        self.norm_f: Any = RMSNorm(d, self.backbone.config.rms_norm_eps)
        self.head: nn.Module = nn.Identity()
        self.reset_classifier(config.num_classes)
        self._reset_own_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter anew, as the constructor does."""
        self.patch_embed.reset_parameters()
        self.backbone.reset_parameters()
        self.norm_f.reset_parameters()
        self.reset_classifier(self.num_classes)
        self._reset_own_parameters()

    def _reset_own_parameters(self) -> None:
        """Positions and class token: normal, 0.02, cut off at two deviations."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        # As LeCun has it: the variance of a patch's pixels is kept.
        fan_in = self.patch_embed.weight[0].numel()
        nn.init.trunc_normal_(self.patch_embed.weight, std=fan_in**-0.5)
        if self.patch_embed.bias is not None:
            nn.init.zeros_(self.patch_embed.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the classes, or features where there is no head.

        Args:
            images: (b, c, H, W) floating point; H and W may differ from img_size.

        Returns:
            (b, num_classes), or (b, embed_dim) where num_classes is 0.

        Raises:
            ShapeError: the images do not fit.
        """
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """All tokens after the last norm, the class token in its place: (b, l, embed_dim)."""
        return self.norm_f(self.backbone.run(self._tokens(images)[0], Ragged()))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """From `forward_features` to logits; with pre_logits, what the head would see."""
        l = features.shape[1]
        pooled = features.mean(dim=1) if self.cls_token is None else features[:, self._place(l - 1)]
        return pooled if pre_logits else self.head(pooled)

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """What blocks give on the way: maps for detection, segmentation and other uses.

        Args:
            images: (b, c, H, W).
            indices: which blocks, negative ones from the last; an int n for the last n; None for
                all.
            norm: whether the last norm is applied to each.
            output_fmt: "NCHW" for maps (b, embed_dim, rows, columns), "NLC" for (b, patches,
                embed_dim); the class token is left out.
            intermediates_only: return the list alone.

        Returns:
            The features of `forward_features`, and the list.

        Raises:
            ConfigError: a block does not exist, or the format is unknown.
        """
        wanted = self._chosen(indices)
        if output_fmt not in ("NCHW", "NLC"):
            raise ConfigError(f"output_fmt={output_fmt!r} must be NCHW or NLC")
        x, grid = self._tokens(images)
        dtype = x.dtype
        # As `Stack.run` has it: the residual stream in its own dtype.
        x = self.backbone.to_residual(x)
        found = {}
        for i, layer in enumerate(self.backbone.layers):
            x = layer(x, Ragged())
            if i in wanted:
                patches = self._patches(self.norm_f(x) if norm else x.to(dtype))
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).unflatten(2, grid)  # (b, d, rows, columns)
                found[i] = patches
        maps = [found[i] for i in wanted]
        return maps if intermediates_only else (self.norm_f(x.to(dtype)), maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Take away the blocks behind the last wanted one, and the head: timm's `features_only`.

        Returns:
            The wanted blocks, counted from 0.
        """
        wanted = self._chosen(indices)
        layers: Any = self.backbone.layers
        del layers[max(wanted) + 1 :]
        if prune_head:
            self.reset_classifier(0)
        if prune_norm:
            self.norm_f = nn.Identity()
        return wanted

    def _chosen(self, indices: int | Sequence[int] | None) -> list[int]:
        """Which blocks are meant, counted from 0."""
        depth = len(self.backbone.layers)
        if indices is None:
            indices = range(depth)
        elif isinstance(indices, int):
            indices = range(depth - indices, depth)
        if wrong := [i for i in indices if not -depth <= i < depth]:
            raise ConfigError(f"indices: there is no block {wrong[0]} of {depth}")
        return [i % depth for i in indices]

    def save_pretrained(self, directory: str | Path) -> None:
        """Write model.safetensors and config.json to a folder.

        Raises:
            CheckpointError: the head is another than the configuration's number of classes says,
                or a file could not be written; the earlier one is then still there.
        """
        config = dataclasses.replace(self.config, num_classes=self.num_classes)
        checkpoints.save_vision(directory, config, self.state_dict())

    @classmethod
    def from_pretrained(
        cls,
        file_or_dir: str | Path,
        *,
        class_token: str = "middle",
        img_size: int = 224,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
    ) -> "VisionMamba":
        """A trained model, in eval mode, every tensor as in the file.

        Args:
            file_or_dir: what `save_pretrained` wrote; a .pth file of hustvl/Vim, or a folder with
                one; or a name on the Hugging Face hub ("hustvl/Vim-tiny-midclstok").
            class_token: where it stands, which such a file does not say: "middle" in all published.
            img_size: what such a file was trained on.
            dtype: of the weights; the file's without it. A_log, D and dt's bias stay in float32.
            device: where to put them; the CPU without it.
            revision: a branch, tag or commit on the hub.

        Raises:
            CheckpointError: the checkpoint is nowhere, damaged or of something else, or a tensor is
                missing, unexpected or of another shape.
        """
        path = Path(file_or_dir)
        path = path if path.is_file() else checkpoints.find(file_or_dir, revision)
        config, weights = checkpoints.open_vision(path, class_token, img_size)
        with torch.device("meta"):
            model = cls(config)
        shapes = [{n: tuple(T.shape) for n, T in W.items()} for W in (weights, model.state_dict())]
        checkpoints.check_shapes(path, *shapes)
        kept_wide = wide_names(model)
        for name, T in weights.items():
            wanted = T.dtype if dtype is None else dtype
            weights[name] = T.to(device, wide(wanted) if name in kept_wide else wanted)
        model.load_state_dict(weights, assign=True)
        return model.eval()

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for that many classes; 0 for none."""
        self.num_classes = num_classes
        like = self.pos_embed
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.config.embed_dim, num_classes).to(like.device, like.dtype)
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def no_weight_decay(self) -> set[str]:
        """The names of parameters that timm's optimisers must not decay."""
        names = ("A_log", "A_b_log", "D", "D_b", "dt_bias", "dt_bias_b")
        return {
            name
            for name, _ in self.named_parameters()
            if name in ("pos_embed", "cls_token")
            or name.rpartition(".")[2] in names
            or name.endswith(("dt_proj.bias", "dt_proj_b.bias"))
        }

    def _tokens(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Patches (b, l, d) with class token and positions, and their rows and columns."""
        config = self.config
        if not isinstance(images, Tensor) or images.dim() != 4:
            got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ShapeError(f"images must be (b, c, H, W), got {got}")
        if images.shape[1] != config.in_chans:
            raise ShapeError(
                f"images have {images.shape[1]} channels, the model is for {config.in_chans}"
            )
        if not images.is_floating_point():
            raise ShapeError(f"images must be floating point, got {images.dtype}")
        try:
            grid = config.grid_of(*images.shape[2:])
        except ConfigError as error:
            raise ShapeError(str(error)) from error
        x = self.patch_embed(images).flatten(2).transpose(1, 2)  # (b, patches, d)
        if self.cls_token is not None:
            place = self._place(x.shape[1])
            token = self.cls_token.expand(len(x), -1, -1)
            x = torch.cat((x[:, :place], token, x[:, place:]), dim=1)  # (b, patches + 1, d)
        return x + self._positions(grid).to(x.dtype), grid

    def _place(self, patches: int) -> int:
        """Before which patch the class token stands."""
        return patches // 2 if self.config.class_token == "middle" else 0

    def _patches(self, x: Tensor) -> Tensor:
        """x (b, l, d) without the class token."""
        if self.cls_token is None:
            return x
        place = self._place(x.shape[1] - 1)
        return torch.cat((x[:, :place], x[:, place + 1 :]), dim=1)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """The position table (1, l, d) for that many rows and columns, interpolated if need be."""
        if grid == self.grid:
            return self.pos_embed
        table = self._patches(self.pos_embed).transpose(1, 2).unflatten(2, self.grid)
        table = F.interpolate(table.float(), grid, mode="bicubic", antialias=True)
        table = table.flatten(2).transpose(1, 2).to(self.pos_embed.dtype)
        if self.cls_token is None:
            return table
        old, new = self._place(self.pos_embed.shape[1] - 1), self._place(table.shape[1])
        own = self.pos_embed[:, old : old + 1]
        return torch.cat((table[:, :new], own, table[:, new:]), dim=1)


def vim_tiny(**options: Any) -> VisionMamba:
    """Vim-Ti: d 192, 24 blocks; options are those of `VimConfig`."""
    return VisionMamba(VimConfig(**{"embed_dim": 192, **options}))


def vim_small(**options: Any) -> VisionMamba:
    """Vim-S: d 384, 24 blocks; options are those of `VimConfig`."""
    return VisionMamba(VimConfig(**{"embed_dim": 384, **options}))


def vim_base(**options: Any) -> VisionMamba:
    """Vim-B: d 768, 24 blocks; options are those of `VimConfig`."""
    return VisionMamba(VimConfig(**{"embed_dim": 768, **options}))


def from_pretrained(file_or_dir: str | Path, **options: Any) -> VisionMamba:
    """A trained Vision Mamba; see `VisionMamba.from_pretrained`."""
    return VisionMamba.from_pretrained(file_or_dir, **options)


def _register_with_timm() -> None:
    """Make the presets known to timm, where it is installed and can be imported."""
    if importlib.util.find_spec("timm") is not None:
        # timm needs torchvision, which may be missing or of another torch; then there is no timm.
        with contextlib.suppress(ImportError):
            importlib.import_module("mambapy.timm_models")


_register_with_timm()
