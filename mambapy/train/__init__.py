"""Training: `train(TrainConfig(...))` turns text into a run folder with a language model in it.

config (every setting), data (text -> token files -> batches), schedule (learning rate), plan (how
many steps fit into some minutes), state (save and exact resume), validation (bits per byte), loop
and trainer (the training itself), report (plot and samples).
"""

from typing import TYPE_CHECKING, Any

from mambapy.train.config import TrainConfig

if TYPE_CHECKING:
    from mambapy.train.loop import train

__all__ = ["TrainConfig", "train"]


def __getattr__(name: str) -> Any:
    """Import the loop, and torch with it, only when it is used."""
    if name == "train":
        from mambapy.train.loop import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
