"""Vision Mamba's configuration."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from mambapy.config.mixers import Mamba2Config, MambaConfig
from mambapy.config.stack import StackConfig, check_choice, check_int
from mambapy.errors import ConfigError

MIXERS: dict[str, type[StackConfig]] = {"mamba": MambaConfig, "mamba2": Mamba2Config}


@dataclass(frozen=True, kw_only=True)
class VimConfig:
    """A Vision Mamba: patches of an image through bidirectional blocks.

    Args:
        img_size: (height, width) of the images, or one number for both. The position table is made
            for it; other sizes are interpolated.
        patch_size: (height, width) of a patch, or one number for both.
        stride: from one patch to the next, (vertical, horizontal) or one number; None for
            patch_size: patches side by side.
        in_chans: channels of an image.
        num_classes: classes of the head; 0 for none.
        embed_dim: d, width of the residual stream.
        depth: number of blocks.
        class_token: where the class token stands among the patches, "middle" or "head"; "none" for
            none: the head then sees the mean of all patches.
        mixer: "mamba" or "mamba2".
        mixer_options: options of the mixer, by the names of its own configuration.
        drop_path_rate: probability, of the last block, that a training image skips it; it grows
            linearly from 0 at the first.
        backend: which implementation of the ops runs; it is not saved.

    Raises:
        ConfigError: a value breaks its rule; the message has the field, the value and the rule.

    Source: Zhu et al. 2024 (arXiv 2401.09417), and its code.
    """

    img_size: int | tuple[int, int] = 224
    patch_size: int | tuple[int, int] = 16
    stride: int | tuple[int, int] | None = None
    in_chans: int = 3
    num_classes: int = 1000
    embed_dim: int = 192
    depth: int = 24
    class_token: Literal["middle", "head", "none"] = "middle"
    mixer: Literal["mamba", "mamba2"] = "mamba"
    mixer_options: Mapping[str, Any] = field(default_factory=dict)
    drop_path_rate: float = 0.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        """Check every field, and the mixer's by making its configuration."""
        for name in ("img_size", "patch_size", "stride"):
            value = getattr(self, name)
            if value is None and name == "stride":
                value = self.patch_size
            pair = (value, value) if isinstance(value, int) else value
            whole = isinstance(pair, list | tuple) and len(pair) == 2
            if not whole or not all(type(size) is int and size >= 1 for size in pair):
                raise ConfigError(f"{name}={value!r} must be an integer >= 1, or two of them")
            object.__setattr__(self, name, tuple(pair))
        for name in ("in_chans", "embed_dim", "depth"):
            check_int(self, name, 1)
        check_int(self, "num_classes", 0)
        check_choice(self, "class_token", ("middle", "head", "none"))
        check_choice(self, "mixer", tuple(MIXERS))
        rate = self.drop_path_rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
            raise ConfigError(f"drop_path_rate={rate!r} must be at least 0 and below 1")
        object.__setattr__(self, "mixer_options", dict(self.mixer_options))
        self.grid_of(*self.sizes("img_size"))
        self.stack()

    def sizes(self, name: str) -> tuple[int, int]:
        """(vertical, horizontal) of img_size, patch_size or stride."""
        pair: tuple[int, int] = getattr(self, name)
        return pair

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in an image of that size.

        Raises:
            ConfigError: the patches do not fit the image.
        """
        grid = []
        patches = zip((height, width), self.sizes("patch_size"), self.sizes("stride"), strict=True)
        for size, patch, stride in patches:
            if size < patch or (size - patch) % stride:
                raise ConfigError(
                    f"an image of {height} x {width} is not covered by patches of "
                    f"{'{} x {}'.format(*self.sizes('patch_size'))} every "
                    f"{'{} x {}'.format(*self.sizes('stride'))}: {size} - {patch} must be a "
                    f"multiple of {stride}, and not negative"
                )
            grid.append((size - patch) // stride + 1)
        return grid[0], grid[1]

    def stack(self) -> Any:
        """The configuration of the stack of blocks."""
        shared = {"d_model": self.embed_dim, "n_layers": self.depth, "backend": self.backend}
        return MIXERS[self.mixer].from_dict({**shared, **self.mixer_options})

    def to_dict(self) -> dict[str, Any]:
        """The architecture as plain values for JSON; `from_dict` is the inverse."""
        values = asdict(self)
        del values["backend"]
        plain = self.stack().to_dict()
        values["mixer_options"] = {name: plain[name] for name in self.mixer_options}
        return {n: [*v] if isinstance(v, tuple) else v for n, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "VimConfig":
        """A configuration from `to_dict`'s values.

        Raises:
            ConfigError: a key is unknown, or a value is impossible.
        """
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConfigError(f"unknown keys {unknown} for VimConfig; known: {sorted(known)}")
        return cls(**values)
