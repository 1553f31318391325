"""A stack whose blocks differ: recurrent mixers and attention, (b, l, d) -> (b, l, d)."""

from collections.abc import Callable
from typing import Any

from mambapy.attention import Attention
from mambapy.block import Mixer
from mambapy.config import HybridConfig, JambaConfig
from mambapy.mamba import MambaBlock
from mambapy.mamba2 import Mamba2Block
from mambapy.mamba3 import Mamba3Block
from mambapy.stack import Stack

__all__ = ["Hybrid", "HybridConfig"]

MIXERS: dict[str, Callable[[Any], Mixer[Any]]] = {
    "mamba": MambaBlock,
    "mamba2": Mamba2Block,
    "mamba3": Mamba3Block,
    "attention": Attention,
}


class Hybrid(Stack):
    """A stack of the mixers that a list names; see `Stack` for what it can do.

    Args:
        config: the architecture.
    """

    can_plan = False

    def __init__(self, config: HybridConfig | JambaConfig) -> None:
        configs = {kind: config.mixer_config(kind) for kind in config.mixers}
        super().__init__(config, (MIXERS[kind](configs[kind]) for kind in config.mixers))
