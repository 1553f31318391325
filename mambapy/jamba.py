"""Jamba: a stack of Mamba with attention and experts at regular distances, (b, l, d) -> (b, l, d).

    Jamba               block i:    x = x + mixer(norm(x)),    x = x + feed_forward(norm2(x))
      mixer             attention where i % attn_layer_period == attn_layer_offset, else Mamba
      feed_forward      experts where i % expert_layer_period == expert_layer_offset, else one MLP

Nothing in it is its own: mixers are those of mamba.py (or mamba2.py, mamba3.py) and attention.py,
experts are in experts.py, and the stack is that of every hybrid. Attention has no positions: the
recurrent layers know what came first. Mamba has norms on dt, B and C, which keep large models from
diverging.

Source: Lieber et al. 2024 (arXiv 2403.19887).
"""

from mambapy.config import JambaConfig
from mambapy.hybrid import Hybrid

__all__ = ["Jamba", "JambaConfig"]


class Jamba(Hybrid):
    """A stack of Jamba's blocks; see `Stack` for what it can do.

    Args:
        config: the architecture.
    """

    config: JambaConfig

    def __init__(self, config: JambaConfig) -> None:
        super().__init__(config)
