"""Writing files so that a crash, a kill or a full disk never costs the file that was there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mambapy.errors import CheckpointError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write to, then put that file in the place of `path` at once.

    The temporary file is in the same folder, is flushed to the disk before it is renamed, and is
    removed if anything fails; `path` is then as it was.

    Args:
        path: the file to write or replace; its folder is made if it is missing.

    Yields:
        The temporary path.

    Raises:
        CheckpointError: the file could not be written; the message has the system's reason.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Some writers make private files; this one keeps what the user's umask says.
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn the system's errors into one that names the file."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
