"""From one format of checkpoints to another, tensor by tensor: nothing is rounded or drawn."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mambapy import checkpoints
from mambapy.lm import LM


def convert(
    source: str | Path, target: str | Path, format: str, *, revision: str | None = None
) -> list[Path]:
    """Write a checkpoint again in another format, with its tokenizer's files.

    Every tensor keeps its dtype and its bits. No model is made: tensors go from file to file, so
    that the memory it takes is about that of one shard, 5 GB at most.

    Args:
        source: a folder, or a name on the Hugging Face hub.
        target: the folder to write; made if it is missing.
        format: "mambapy", "official" or "hf".
        revision: a branch, tag or commit on the hub.

    Returns:
        The files of the new checkpoint.

    Raises:
        CheckpointError: the source is nowhere, damaged or unknown, the format cannot express it,
            or the target holds a checkpoint of another format or cannot be written.
    """
    found = checkpoints.open_checkpoint(checkpoints.find(source, revision))
    with torch.device("meta"):
        expected = LM.from_architecture(found.architecture).own_weights()
    shapes = {name: tuple(T.shape) for name, T in expected.items()}
    found.check(shapes)
    target = Path(target)
    weights = _Weights(found, shapes)
    checkpoints.save(target, found.architecture, weights, format, token_ids=found.token_ids)
    checkpoints.copy_tokenizer(found.directory, target)
    return sorted(path for path in target.iterdir() if path.is_file())


class _Weights(Mapping[str, Tensor]):
    """A checkpoint's tensors by our names, each read when it is asked for."""

    def __init__(
        self, source: checkpoints.Checkpoint, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._source, self._shapes = source, shapes

    def __getitem__(self, name: str) -> Tensor:
        return self._source.read(name, self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
