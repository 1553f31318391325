"""The configurations of the models: frozen, keyword-only, checked when they are made.

A configuration says what the architecture is and how it is initialised. It imports no torch, so
that a tool can read and check one cheaply.

    StackConfig                        what every stack of blocks has
      MambaConfig      Mamba2Config    Mamba3Config    AttentionConfig: one kind of mixer
      HybridConfig                     a list that names the mixer of each block
      JambaConfig                      attention and experts at regular distances
"""

from mambapy.config.hybrid import HybridConfig
from mambapy.config.jamba import JambaConfig
from mambapy.config.mixers import (
    AttentionConfig,
    HeadsConfig,
    Mamba2Config,
    Mamba3Config,
    MambaConfig,
)
from mambapy.config.stack import BACKENDS, RECOMPUTE, StackConfig
from mambapy.config.vim import VimConfig

# What our config.json calls each kind of stack.
MODEL_TYPES: dict[str, type[StackConfig]] = {
    "mamba": MambaConfig,
    "mamba2": Mamba2Config,
    "mamba3": Mamba3Config,
    "hybrid": HybridConfig,
    "jamba": JambaConfig,
}

__all__ = [
    "BACKENDS",
    "MODEL_TYPES",
    "RECOMPUTE",
    "AttentionConfig",
    "HeadsConfig",
    "HybridConfig",
    "JambaConfig",
    "Mamba2Config",
    "Mamba3Config",
    "MambaConfig",
    "StackConfig",
    "VimConfig",
]
