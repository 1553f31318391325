"""mambapy: the Mamba family of models in Python, simple to read, exact, and fast.

Names are imported when they are first used, so `import mambapy` costs next to nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambapy.config import (
        HybridConfig,
        JambaConfig,
        Mamba2Config,
        Mamba3Config,
        MambaConfig,
        VimConfig,
    )
    from mambapy.heads import Regressor, SequenceClassifier, SeriesModel, TokenClassifier
    from mambapy.hybrid import Hybrid
    from mambapy.jamba import Jamba
    from mambapy.jamba_lm import JambaLM
    from mambapy.lm import LM, MambaLM, from_pretrained
    from mambapy.mamba import Mamba, MambaBlock
    from mambapy.mamba2 import Mamba2, Mamba2Block
    from mambapy.mamba3 import Mamba3, Mamba3Block
    from mambapy.tokenizer import ByteTokenizer
    from mambapy.vim import VisionMamba, VMamba

__version__ = "2.0.0.dev0"

__all__ = [
    "LM",
    "ByteTokenizer",
    "Hybrid",
    "HybridConfig",
    "Jamba",
    "JambaConfig",
    "JambaLM",
    "Mamba",
    "Mamba2",
    "Mamba2Block",
    "Mamba2Config",
    "Mamba3",
    "Mamba3Block",
    "Mamba3Config",
    "MambaBlock",
    "MambaConfig",
    "MambaLM",
    "Regressor",
    "SequenceClassifier",
    "SeriesModel",
    "TokenClassifier",
    "VMamba",
    "VimConfig",
    "VisionMamba",
    "__version__",
    "from_pretrained",
]

_HOMES = {
    "LM": "lm",
    "MambaLM": "lm",
    "from_pretrained": "lm",
    "Mamba": "mamba",
    "MambaBlock": "mamba",
    "MambaConfig": "config",
    "Mamba2": "mamba2",
    "Mamba2Block": "mamba2",
    "Mamba2Config": "config",
    "Mamba3": "mamba3",
    "Mamba3Block": "mamba3",
    "Mamba3Config": "config",
    "Hybrid": "hybrid",
    "Jamba": "jamba",
    "JambaConfig": "config",
    "JambaLM": "jamba_lm",
    "VMamba": "vim",
    "VimConfig": "config",
    "VisionMamba": "vim",
    "HybridConfig": "config",
    "Regressor": "heads",
    "SequenceClassifier": "heads",
    "SeriesModel": "heads",
    "TokenClassifier": "heads",
    "ByteTokenizer": "tokenizer",
}


def __getattr__(name: str) -> Any:
    """Import a public name from the module that has it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mambapy' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mambapy.{_HOMES[name]}"), name)
