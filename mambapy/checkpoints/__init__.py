"""Files of trained models: find them, read them into (architecture, weights), write them safely.

Nothing here builds a model. Every key of a config.json and every tensor that does not match is an
error.

    hub.py          find: a name -> a folder
    formats/        how each format's config.json and names translate to ours, and back
    tensors.py      files of tensors, whole or in shards
    checkpoint.py   open_checkpoint, save: all of it together
    vision.py       Vision Mamba's files
"""

from mambapy.checkpoints.architecture import Architecture
from mambapy.checkpoints.checkpoint import Checkpoint, copy_tokenizer, open_checkpoint, save
from mambapy.checkpoints.files import atomic_write
from mambapy.checkpoints.hub import find
from mambapy.checkpoints.tensors import check_shapes
from mambapy.checkpoints.vision import open_vision, save_vision

__all__ = [
    "Architecture",
    "Checkpoint",
    "atomic_write",
    "check_shapes",
    "copy_tokenizer",
    "find",
    "open_checkpoint",
    "open_vision",
    "save",
    "save_vision",
]
