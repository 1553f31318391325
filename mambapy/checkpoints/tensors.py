"""Files of tensors: safetensors and torch's .bin, whole or in shards.

Reading maps the files into memory: a tensor costs nothing until it is used. So a file must not be
changed in place while a model made from it lives; `write` replaces files and is safe.
"""

import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mambapy.checkpoints.files import atomic_write
from mambapy.errors import CheckpointError

INDEX = ".index.json"
SHARD_BYTES = 5_000_000_000


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of a folder by their names; each is read when it is asked for.

    Args:
        directory: the folder.
        stems: names of files of weights, the first one that is there counts, whole or in shards
            ("model.safetensors.index.json").

    Raises:
        CheckpointError: there is none, or a file is damaged.
    """

    def __init__(self, directory: Path, stems: tuple[str, ...]) -> None:
        self._files: dict[Path, Any] = {}
        self._place: dict[str, Path] = {}
        for stem in stems:
            if (directory / stem).is_file():
                self._place = dict.fromkeys(self._names(directory / stem), directory / stem)
                return
            if (directory / (stem + INDEX)).is_file():
                self._place = self._index(directory, stem + INDEX)
                return
        raise CheckpointError(f"{directory} has no {' or '.join(stems)}, whole or in shards")

    def __getitem__(self, name: str) -> Tensor:
        path = self._place[name]
        with _readable(path):
            file = self._open(path)
            return file[name] if isinstance(file, dict) else file.get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        path = self._place[name]
        with _readable(path):
            file = self._open(path)
            if isinstance(file, dict):
                return tuple(file[name].shape)
            return tuple(file.get_slice(name).get_shape())

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)

    def _index(self, directory: Path, name: str) -> dict[str, Path]:
        """Where each tensor is, from an index of shards."""
        try:
            table = json.loads((directory / name).read_text(encoding="utf-8"))["weight_map"]
            place = {key: directory / file for key, file in table.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{directory / name} is no index of shards: {error}") from error
        for path in sorted(set(place.values())):
            if not path.is_file():
                raise CheckpointError(f"{directory / name} names {path.name}, which is missing")
            # What a shard has beyond the index would otherwise be overlooked.
            for key in self._names(path):
                place.setdefault(key, path)
            if lost := [k for k, p in place.items() if p == path and k not in self._names(path)]:
                raise CheckpointError(f"{path} lacks {lost[0]}, which its index names")
        return place

    def _names(self, path: Path) -> list[str]:
        """The names of a file's tensors."""
        with _readable(path):
            return list(self._open(path).keys())

    def _open(self, path: Path) -> Any:
        """The opened file: a dict of tensors for .bin, else a safetensors handle."""
        if path not in self._files:
            if path.suffix == ".safetensors":
                self._files[path] = safe_open(path, "pt", device="cpu")
            else:
                self._files[path] = _load_bin(path)
        return self._files[path]


def write(
    directory: Path,
    stem: str,
    tensors: Mapping[str, Tensor],
    shard_bytes: int | None = SHARD_BYTES,
) -> set[str]:
    """Write tensors to one file, or to shards with an index, each in one piece or not at all.

    Args:
        directory: made if it is missing.
        stem: "model.safetensors" or "pytorch_model.bin".
        tensors: what to write; they are taken one shard at a time.
        shard_bytes: about how many bytes a file may have; None for one file.

    Returns:
        The names of the files that hold them now.

    Raises:
        CheckpointError: a file could not be written; the earlier one is still there.
    """
    shards = _shards(tensors, shard_bytes)
    if len(shards) == 1:
        _write_file(directory / stem, tensors, shards[0])
        return {stem}
    name, suffix = stem.split(".")
    files = [f"{name}-{i:05d}-of-{len(shards):05d}.{suffix}" for i in range(1, len(shards) + 1)]
    table: dict[str, str] = {}
    for file, names in zip(files, shards, strict=True):
        _write_file(directory / file, tensors, names)
        table |= dict.fromkeys(names, file)
    total = sum(tensors[n].numel() * tensors[n].element_size() for n in tensors)
    with atomic_write(directory / (stem + INDEX)) as path:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": table}, indent=2)
        path.write_text(text + "\n", encoding="utf-8")
    return {*files, stem + INDEX}


def check_shapes(
    source: str | Path,
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    """Compare the tensors of a file with those that are needed.

    Args:
        source: what to name in the message.
        found: the shape of each tensor in the file.
        expected: the shape of each that is needed.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    problems = [f"{n} {shape} is missing" for n, shape in expected.items() if n not in found]
    problems += [
        f"{name} is {found[name]} and should be {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    extra = sorted(set(found) - set(expected))
    problems += [f"{name} {found[name]} is unexpected" for name in extra]
    if problems:
        more = f", and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{source}: {'; '.join(problems[:8])}{more}")


def weight_files(directory: Path, stem: str) -> set[str]:
    """Every file of weights with that stem in a folder: whole, shards and index."""
    name, suffix = stem.split(".")
    found = {path.name for path in directory.glob(f"{name}-*-of-*.{suffix}")}
    return found | {n for n in (stem, stem + INDEX) if (directory / n).is_file()}


def _shards(tensors: Mapping[str, Tensor], limit: int | None) -> list[list[str]]:
    """The names of each shard, in order; a shard has at least one tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in tensors:
        T = tensors[name]
        more = T.numel() * T.element_size()
        if shards[-1] and limit is not None and size + more > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += more
    return shards


def _write_file(path: Path, tensors: Mapping[str, Tensor], names: list[str]) -> None:
    """Write one file."""
    chosen = {name: tensors[name].detach().cpu().contiguous() for name in names}
    with atomic_write(path) as temporary:
        if path.suffix == ".safetensors":
            try:
                save_file(chosen, temporary, metadata={"format": "pt"})
            except SafetensorError as error:
                # safetensors wraps the system's error, "No space left on device" for instance.
                raise CheckpointError(f"cannot write {path}: {error}") from error
            return
        # torch writes a view's whole storage, and a mapped tensor is a view of its file. One
        # tensor under two names, a tied head, is one storage in the file too.
        own: dict[int, Tensor] = {}
        for name, T in chosen.items():
            whole = T.untyped_storage().nbytes() == T.numel() * T.element_size()
            kept = own.setdefault(T.data_ptr() if T.numel() else id(T), T if whole else T.clone())
            chosen[name] = kept if kept.shape == T.shape else T.clone()
        try:
            torch.save(chosen, temporary)
        except RuntimeError as error:
            raise CheckpointError(f"cannot write {path}: {error}") from error


def _load_bin(path: Path) -> dict[str, Tensor]:
    """A torch file's tensors: mapped where it is of the newer, zipped kind; never its code."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not all(isinstance(T, Tensor) for T in found.values()):
        raise CheckpointError(f"{path} holds no dict of tensors")
    return found


class _readable:  # noqa: N801 (reads as a verb)
    """Turn whatever a damaged file raises into a CheckpointError that names it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, SafetensorError):
            raise CheckpointError(
                f"{self.path} is damaged or no safetensors file: {error}"
            ) from error
        if isinstance(error, OSError | RuntimeError | pickle.UnpicklingError | EOFError) and (
            not isinstance(error, CheckpointError)
        ):
            # Without weights_only's advice to run the file's code.
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{self.path} is damaged or no file of tensors: {reason}"
            ) from error
