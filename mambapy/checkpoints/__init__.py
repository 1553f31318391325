"""Files of trained models: find them, read them into (config, weights), write them safely.

Nothing here builds a model. Every key that does not match is an error.
"""

from mambapy.checkpoints.files import atomic_write
from mambapy.checkpoints.native import Checkpoint, check_names, load, save

__all__ = ["Checkpoint", "atomic_write", "check_names", "load", "save"]
