"""Text to token files, prepared once, and from them to batches that are a function of the step.

A file's tokens are followed by the end-of-text token. Training tokens and held-out tokens lie in
two memory-mapped files, so that the text may be larger than memory.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mambapy.errors import DataError
from mambapy.tokenizer import ByteTokenizer, Tokenizer
from mambapy.train.config import HELD_OUT_SHARE
from mambapy.train.text import Source, Text, find_texts, read_text

# At most this many bytes are held out, so that all of them are evaluated.
HELD_OUT_BYTES = 256 * 1024

_FORMAT = 1


@dataclass(frozen=True)
class Part:
    """One file and how many of its first bytes are for training; the others are held out."""

    text: Text
    train_bytes: int


@dataclass(frozen=True)
class Dataset:
    """Prepared tokens: `train` and `held_out` (1-D, memory-mapped) and what is known of them."""

    folder: Path
    fingerprint: str
    train: npt.NDArray[Any]
    held_out: npt.NDArray[Any]
    train_bytes: int
    held_out_bytes: int
    eos: int
    files: int
    left_out: int

    def held_out_text(self) -> bytes:
        """The held-out text itself, without end-of-text tokens."""
        return (self.folder / "held_out.txt").read_bytes()

    def check_length(self, length: int, name: str) -> None:
        """Raise DataError unless a window of `length` tokens and its targets fit."""
        if len(self.train) <= length:
            raise DataError(
                f"{name} is too short: {len(self.train)} training tokens, and length={length} "
                f"needs more than {length}"
            )


def fingerprint(source: Source, tokenizer_name: str, held_out: float) -> str:
    """Hash of the files' paths, sizes and times, the tokenizer and the split: the cache's key."""
    facts: list[Any] = [_FORMAT, held_out, HELD_OUT_BYTES, str(source.root)]
    for path in source.paths:
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        facts.append([str(path.relative_to(source.root)), stat.st_size, stat.st_mtime_ns])
    facts.append(_tokenizer_identity(tokenizer_name))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    tokenizer_name: str,
    cache: Path,
    held_out: float = HELD_OUT_SHARE,
) -> Dataset:
    """The dataset of a source, from the cache folder if it is there, otherwise made and put there.

    Args:
        source: the files.
        tokenizer: text to ids.
        tokenizer_name: its name or path.
        cache: the folder.
        held_out: share of the text to hold out, see `split`.

    Raises:
        DataError: the text is empty, too short or no text, or the cache cannot be written.
    """
    key = fingerprint(source, tokenizer_name, held_out)
    if (cache / key / "meta.json").is_file():
        return load(cache, key)
    texts, left_out = find_texts(source)
    parts = split(texts, source.name, held_out)
    temporary = cache / f".{key}-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        meta = _write(parts, tokenizer, temporary)
        meta |= {"files": len(texts), "left_out": left_out}
        (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
        # A folder that another process has made meanwhile holds the same.
        if not (cache / key).exists():
            temporary.rename(cache / key)
    except OSError as error:
        raise DataError(f"prepared data cannot be written to {cache}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return load(cache, key)


def load(cache: Path, key: str) -> Dataset:
    """The dataset that was prepared under this key.

    Raises:
        DataError: it is not there or is damaged.
    """
    folder = cache / key
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        dtype = np.dtype(meta.pop("dtype"))
        train = np.memmap(folder / "train.bin", dtype=dtype, mode="r")
        held_out = np.memmap(folder / "held_out.bin", dtype=dtype, mode="r")
        return Dataset(folder=folder, fingerprint=key, train=train, held_out=held_out, **meta)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"prepared data in {folder} is missing or damaged: {error}") from error


def split(texts: Sequence[Text], name: str, share: float = HELD_OUT_SHARE) -> list[Part]:
    """Which files are held out: whole ones in the order of a hash of their relative path.

    They are taken while they fit into that share of the text and `HELD_OUT_BYTES`. Where
    they do not fill half of that (a single file, for instance), the last part of the largest file
    is held out instead.

    Raises:
        DataError: there is no text at all.
    """
    total = sum(text.size for text in texts)
    if total == 0:
        raise DataError(f"{name} has no text in it")
    room = min(int(total * share), HELD_OUT_BYTES)
    held_out: set[str] = set()
    left = room
    for text in sorted(texts, key=lambda t: hashlib.sha256(os.fsencode(t.relative)).digest()):
        if text.size <= left:
            held_out.add(text.relative)
            left -= text.size
    if left > room / 2:
        largest = max(texts, key=lambda t: t.size)
        return [Part(t, t.size - room if t is largest else t.size) for t in texts]
    return [Part(t, 0 if t.relative in held_out else t.size) for t in texts]


def batch(
    tokens: npt.NDArray[Any], *, rows: int, length: int, seed: int, step: int
) -> npt.NDArray[np.int64]:
    """The windows of one step, (rows, length + 1): a pure function of seed and step.

    So a resumed run sees the data of an uninterrupted one with nothing stored, and a step over
    several accumulated passes sees what one over a single pass sees.
    """
    generator = np.random.default_rng([seed, step])
    starts = generator.integers(0, len(tokens) - length, size=rows)
    return np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64)


def _tokenizer_identity(name: str) -> str:
    """The content's hash for a tokenizer file, otherwise the name."""
    path = Path(name)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else name


def _write(parts: Sequence[Part], tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Stream the parts through the tokenizer into `folder`; returns what meta.json says."""
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32)
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError("the tokenizer has no end-of-text token, which must stand between files")
    end = np.array([eos], dtype).tobytes()
    sizes = {"train_bytes": 0, "held_out_bytes": 0}
    with (
        (folder / "train.bin").open("wb") as train,
        (folder / "held_out.bin").open("wb") as held_out,
        (folder / "held_out.txt").open("wb") as text,
    ):
        for part in parts:
            for piece, is_train in _pieces(part):
                data = piece.encode()
                ids = _encode(tokenizer, piece, data, dtype)
                (train if is_train else held_out).write(ids)
                if not is_train:
                    text.write(data)
                sizes["train_bytes" if is_train else "held_out_bytes"] += len(data)
            if part.train_bytes:
                train.write(end)
            if part.train_bytes < part.text.size:
                held_out.write(end)
    if not sizes["train_bytes"] or not sizes["held_out_bytes"]:
        total = sum(sizes.values())
        raise DataError(
            f"{parts[0].text.path} is too short: of its {total} bytes, "
            "a share must be held out and the others trained on"
        )
    return {"dtype": dtype.name, "eos": eos, **sizes}


def _pieces(part: Part) -> Iterator[tuple[str, bool]]:
    """The text of one file, piece by piece, each with whether it is for training."""
    done = 0
    for piece in read_text(part.text.path):
        data = piece.encode()
        cut = min(max(part.train_bytes - done, 0), len(data))
        # Never cut inside a character: its later bytes are 10xxxxxx.
        while 0 < cut < len(data) and data[cut] & 0xC0 == 0x80:
            cut += 1
        done += len(data)
        if cut:
            yield data[:cut].decode(), True
        if cut < len(data):
            yield data[cut:].decode(), False


def _encode(tokenizer: Tokenizer, piece: str, data: bytes, dtype: np.dtype[Any]) -> bytes:
    """The piece's token ids as the bytes of an array."""
    if isinstance(tokenizer, ByteTokenizer):
        return np.frombuffer(data, np.uint8).astype(dtype).tobytes()
    return np.asarray(tokenizer(piece)["input_ids"], dtype=dtype).tobytes()
