"""Files that are kept from one process to the next: machine code, measured choices."""

import hashlib
import os
import tempfile
from pathlib import Path


def folder() -> Path | None:
    """Where they are: MAMBAPY_CACHE, or the user's cache directory, if there is one."""
    given = os.environ.get("MAMBAPY_CACHE") or os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(given) if given else Path.home() / ".cache") / "mambapy"
    except RuntimeError:
        return None


def read(name: str) -> bytes | None:
    """What was kept, if that can be read and is whole: its digest stands behind it."""
    place = folder()
    try:
        kept = b"" if place is None else (place / name).read_bytes()
    except OSError:
        return None
    data, digest = kept[:-32], kept[-32:]
    return data if hashlib.sha256(data).digest() == digest else None


def write(name: str, data: bytes) -> None:
    """Keep something, if there is a place where that can be done."""
    place = folder()
    if place is None:
        return
    partial = None
    try:
        place.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=place)
        with os.fdopen(handle, "wb") as file:
            file.write(data + hashlib.sha256(data).digest())
        Path(partial).replace(place / name)
    except OSError:
        # A read-only home or a full disk: it is found out anew in each process.
        if partial is not None:
            Path(partial).unlink(missing_ok=True)
