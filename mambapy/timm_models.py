"""Vision Mamba in timm: `timm.create_model("vim_tiny_patch16_224.mambapy")`.

Imported by mambapy.vim where timm is installed, and by nobody else. Trained weights come through
`mambapy.vim.from_pretrained`, not through timm.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from mambapy.config import VimConfig
from mambapy.vim import VisionMamba

default_cfgs = generate_default_cfgs(
    {
        f"{name}.mambapy": {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "interpolation": "bicubic",
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "first_conv": "patch_embed",
            "classifier": "head",
            "fixed_input_size": False,
        }
        for name in ("vim_tiny_patch16_224", "vim_small_patch16_224", "vim_base_patch16_224")
    }
)


def _model(**options: Any) -> VisionMamba:
    """A model from timm's names for its options."""
    return VisionMamba(VimConfig(**options))


def _create(variant: str, embed_dim: int, pretrained: bool, **options: Any) -> Any:
    """Through timm's builder, which also wraps it for `features_only`."""
    return build_model_with_cfg(
        _model,
        variant,
        pretrained,
        feature_cfg={"out_indices": (5, 11, 17, 23), "feature_cls": "getter"},
        **{"embed_dim": embed_dim, **options},
    )


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **options: Any) -> Any:
    """Vim-Ti."""
    return _create("vim_tiny_patch16_224", 192, pretrained, **options)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **options: Any) -> Any:
    """Vim-S."""
    return _create("vim_small_patch16_224", 384, pretrained, **options)


@register_model
def vim_base_patch16_224(pretrained: bool = False, **options: Any) -> Any:
    """Vim-B."""
    return _create("vim_base_patch16_224", 768, pretrained, **options)
