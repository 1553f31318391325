"""A checkpoint as a whole: opened, checked against a model's tensors, read, written.

open_checkpoint   folder -> Checkpoint: its architecture, and its tensors not yet read
Checkpoint.read   -> our tensors, each one straight to its dtype and device
save              our tensors -> a folder in one of the formats
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambapy.checkpoints import tensors as files
from mambapy.checkpoints.architecture import Architecture
from mambapy.checkpoints.files import atomic_write
from mambapy.checkpoints.formats import CONFIG, Format, Keys, recognise, to_write
from mambapy.errors import CheckpointError, ConfigError

# What belongs to the tokenizer and comes along where a checkpoint is converted.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.byte",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
HEAD, EMBEDDING = "lm_head.", "embedding."


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been opened and not yet read.

    Args:
        directory: where it is.
        format: how it is written.
        architecture: what model it is of.
        tensors: what reads each of the file's, by its name as the format's table has it.
        shapes: theirs.
        token_ids: which tokens begin, end and pad texts, where config.json says so.
    """

    directory: Path
    format: Format
    architecture: Architecture
    tensors: Mapping[str, Callable[[], Tensor]]
    shapes: Mapping[str, tuple[int, ...]]
    token_ids: Mapping[str, Any]

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Compare with a model's tensors.

        Args:
            expected: the shape of each; of a tied head, only the embedding's.

        Raises:
            CheckpointError: a tensor is missing, unexpected or of another shape, or a head that
                config.json calls tied is another matrix than the embedding.
        """
        needed = {}
        for name, shape in expected.items():
            for part in self.format.parts(name, self.architecture):
                # A part is rows of ours, which has all but its last dimension as rows.
                rows = shape if part.rows is None else (part.rows, *shape[1:][-1:])
                needed[part.name] = rows
        found = dict(self.shapes)
        if self.architecture.tie_embeddings:
            for name in set(found) - set(needed):
                if self._is_tied_head(name):
                    del found[name]
        files.check_shapes(self.directory, found, needed)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One of our tensors, in the file's dtype: mapped, or put together from its parts."""
        parts = self.format.parts(name, self.architecture)
        tensors = [self.tensors[part.name]() for part in parts]
        if len(tensors) == 1 and parts[0].rows is None:
            return tensors[0]
        return torch.cat(tensors).view(shape)

    def _is_tied_head(self, name: str) -> bool:
        """Whether a tensor of the file is the head of a tied model, and is the embedding."""
        for leaf in ("weight", "scale"):
            head, embedding = (
                self.format.parts(f"{top}{leaf}", self.architecture)[0].name
                for top in (HEAD, EMBEDDING)
            )
            if name == head and embedding in self.tensors:
                if torch.equal(self.tensors[head](), self.tensors[embedding]()):
                    return True
                raise CheckpointError(
                    f"{self.directory}: config.json ties the head to the embedding, but {head} "
                    f"and {embedding} differ"
                )
        return False


def open_checkpoint(directory: Path) -> Checkpoint:
    """Recognise a folder's format, translate its configuration, and look at its tensors' names.

    Raises:
        CheckpointError: it holds no checkpoint, a damaged one, or one that no model here fits.
    """
    form, values = recognise(directory)
    token_ids = {name: values[name] for name in TOKEN_IDS if values.get(name) is not None}
    try:
        architecture = form.read(Keys(values, f"{directory / CONFIG}"))
    except (ConfigError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{directory / CONFIG} does not fit: {error}") from error
    found = files.TensorFiles(directory, form.stems)
    canonical = {form.canonical(name): name for name in found}
    form = form.fit(canonical)
    names = {n: canonical[c] for n, c in form.settle(canonical, architecture).items()}
    return Checkpoint(
        directory,
        form,
        architecture,
        {ours: partial(found.__getitem__, theirs) for ours, theirs in names.items()},
        {ours: found.shape(theirs) for ours, theirs in names.items()},
        token_ids,
    )


def save(
    directory: str | Path,
    architecture: Architecture,
    weights: Mapping[str, Tensor],
    format: str = "mambapy",
    *,
    token_ids: Mapping[str, Any] | None = None,
    shard_bytes: int = files.SHARD_BYTES,
) -> None:
    """Write the weights, then config.json, each file in one piece or not at all.

    Args:
        directory: made if it is missing. Weights of an earlier save in the same format are
            replaced.
        architecture: what model they are of.
        weights: by our names, without the head where it is tied.
        format: "mambapy", "official" or "hf".
        token_ids: for config.json, in transformers' format.
        shard_bytes: about how many bytes a file of weights may have. The official code reads one
            file only, so that format has one.

    Raises:
        CheckpointError: the format cannot express the model, the folder holds a checkpoint of
            another format, or a file could not be written; the earlier one is then still there.
    """
    directory = Path(directory)
    form = to_write(format, architecture.model_type, architecture.config.to_dict())
    config = {**form.write(architecture), **(token_ids or {} if format == "hf" else {})}
    stem = form.stems[0]
    _refuse_another(directory, form)
    whole = form.container == "bin"
    translated = _Translated(architecture, weights, form)
    written = files.write(directory, stem, translated, None if whole else shard_bytes)
    with atomic_write(directory / CONFIG) as path:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for stale in files.weight_files(directory, stem) - written:
        (directory / stale).unlink()


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy a tokenizer's files from one checkpoint to another; their names."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        if (source / name).resolve() != (target / name).resolve():
            with atomic_write(target / name) as path:
                shutil.copyfile(source / name, path)
    return names


class _Translated(Mapping[str, Tensor]):
    """Our weights by a format's names; rows of one that is several there are views."""

    def __init__(
        self, architecture: Architecture, weights: Mapping[str, Tensor], form: Format
    ) -> None:
        self._weights = weights
        self._place: dict[str, tuple[str, int, int | None]] = {}
        for name in weights:
            row = 0
            for part in form.parts(name, architecture):
                self._place[part.name] = (name, row, part.rows)
                row += part.rows or 0
        if form.writes_tied_head and architecture.tie_embeddings:
            head = form.parts(f"{HEAD}weight", architecture)[0].name
            self._place[head] = (f"{EMBEDDING}weight", 0, None)

    def __getitem__(self, name: str) -> Tensor:
        ours, row, rows = self._place[name]
        T = self._weights[ours]
        return T if rows is None else T.flatten(0, -2)[row : row + rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)


def _refuse_another(directory: Path, form: Format) -> None:
    """Raise if a folder holds a checkpoint of another format, whose weights would stay."""
    try:
        found, _ = recognise(directory)
    except CheckpointError:
        return
    if found.name != form.name:
        raise CheckpointError(
            f"{directory} holds a checkpoint in the format {found.name!r}; "
            f"save the one in {form.name!r} to another folder"
        )
