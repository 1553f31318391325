"""Where training text comes from: finding files, checking that they are text, streaming them."""

import codecs
import gzip
import lzma
import os
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from mambapy.errors import DataError

_BLOCK = 1 << 20
# What tells a run folder from others.
_RUN = "last.pt"

# Folders of the standard library that are not the library itself.
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Source:
    """Files to read: their common root, the paths in a fixed order, and a name for messages."""

    name: str
    root: Path
    paths: tuple[Path, ...]
    single: bool = False


@dataclass(frozen=True)
class Text:
    """A file that is text: where it is, its path from the root, and the text's size in bytes."""

    path: Path
    relative: str
    size: int


def open_source(data: str, exclude: Path | None = None) -> Source:
    """The files that `data` names: a file, a folder, or "" for Python's standard library.

    In a folder, hidden files and folders are left out, and so is `exclude` (the run folder).

    Raises:
        DataError: there is no such file or folder, or nothing in it.
    """
    if not data:
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = tuple(_walk(root, _NOT_LIBRARY, exclude, suffix=".py"))
        return Source("Python's standard library", root, paths)
    path = Path(data)
    if path.is_file():
        return Source(data, path.parent, (path,), single=True)
    if not path.is_dir():
        raise DataError(f"{data}: no such file or folder")
    paths = tuple(_walk(path, set(), exclude))
    if not paths:
        raise DataError(f"{data} has no files in it")
    return Source(data, path, paths)


def find_texts(source: Source) -> tuple[list[Text], int]:
    """Check every file of the source: the texts, and how many others were left out.

    Raises:
        DataError: the source is one file, and it is empty or not text; or no file is text.
    """
    texts: list[Text] = []
    left_out = 0
    for path in source.paths:
        try:
            size = sum(len(piece.encode()) for piece in read_text(path))
        except DataError:
            if source.single:
                raise
            left_out += 1
            continue
        if size:
            texts.append(Text(path, path.relative_to(source.root).as_posix(), size))
    if not texts:
        what = "is empty" if source.single else f"has no text in it ({left_out} files left out)"
        raise DataError(f"{source.name} {what}")
    return texts, left_out


def read_text(path: Path) -> Iterator[str]:
    """The text of a file in pieces of about a megabyte that end with a line where they can.

    Raises:
        DataError: the file cannot be read, or is not UTF-8 text; the message says why.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest = ""
    offset = 0
    try:
        with _open(path) as file:
            while block := file.read(_BLOCK):
                if (zero := block.find(0)) >= 0:
                    raise DataError(f"{path} is not text: byte {offset + zero} is NUL")
                piece = rest + decoder.decode(block)
                offset += len(block)
                cut = piece.rfind("\n") + 1 or len(piece)
                rest = piece[cut:]
                if cut:
                    yield piece[:cut]
        if rest := rest + decoder.decode(b"", final=True):
            yield rest
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason}") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _open(path: Path) -> BinaryIO:
    """The file's bytes, unpacked if its name says that it is packed."""
    if path.suffix == ".xz":
        return cast(BinaryIO, lzma.open(path, "rb"))
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    return path.open("rb")


def _walk(root: Path, skip: set[str], exclude: Path | None, suffix: str = "") -> Iterator[Path]:
    """The regular files under `root` in a fixed order."""
    barred = exclude.resolve() if exclude else None
    for folder, names, files in os.walk(root):
        # The folder of another run: its log, samples and held-out text are not data.
        if _RUN in files:
            names.clear()
            continue
        names[:] = sorted(
            name
            for name in names
            if name not in skip
            and not name.startswith(".")
            and (barred is None or (Path(folder) / name).resolve() != barred)
        )
        for name in sorted(files):
            path = Path(folder) / name
            if name.endswith(suffix) and not name.startswith(".") and path.is_file():
                yield path
