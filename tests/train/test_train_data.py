import gzip
import lzma
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from mambapy.errors import DataError
from mambapy.tokenizer import ByteTokenizer
from mambapy.train import data as datasets
from mambapy.train.data import HELD_OUT_BYTES, Dataset, batch, prepare, split
from mambapy.train.text import Text, find_texts, open_source, read_text


def make(path: Path | str, cache: Path) -> Dataset:
    return prepare(open_source(str(path)), ByteTokenizer(), "byte", cache)


def plain(tokens: np.ndarray) -> bytes:
    """The bytes of tokens, without the ends of text."""
    return tokens[tokens < 256].astype(np.uint8).tobytes()


def test_folder_is_split_by_whole_files_and_nothing_is_lost(corpus: Path, tmp_path: Path) -> None:
    dataset = make(corpus, tmp_path)
    files = [path.read_bytes() for path in sorted(corpus.iterdir())]
    held_out = dataset.held_out_text()
    assert plain(dataset.held_out) == held_out
    chosen = [text for text in files if text in held_out]
    assert b"".join(chosen) == held_out
    assert plain(dataset.train) == b"".join(text for text in files if text not in chosen)
    assert (dataset.files, dataset.left_out) == (40, 0)
    # One end of text a file.
    assert (dataset.held_out == dataset.eos).sum() == len(chosen)
    assert (dataset.train == dataset.eos).sum() == 40 - len(chosen)
    total = sum(map(len, files))
    assert (dataset.train_bytes, dataset.held_out_bytes) == (total - len(held_out), len(held_out))
    assert 0.025 * total <= len(held_out) <= 0.05 * total


def test_python_library_is_the_default() -> None:
    source = open_source("")
    names = [path.relative_to(source.root).as_posix() for path in source.paths]
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert all(name.endswith(".py") for name in names)
    assert not any(part in ("test", "site-packages") for name in names for part in name.split("/"))


def test_held_out_text_is_capped_and_stable() -> None:
    texts = [Text(Path(f"/x/{i}"), str(i), 10_000) for i in range(2000)]
    parts = split(texts, "x")
    held_out = {p.text.relative for p in parts if p.train_bytes == 0}
    assert HELD_OUT_BYTES - 10_000 < 10_000 * len(held_out) <= HELD_OUT_BYTES
    # Another file changes at most one choice.
    more = split([*texts, Text(Path("/x/new"), "new", 10_000)], "x")
    assert len(held_out - {p.text.relative for p in more if p.train_bytes == 0}) <= 1


def test_one_big_file_among_small_ones_is_cut() -> None:
    texts = [Text(Path("/x/a"), "a", 10), Text(Path("/x/b"), "b", 1_000_000)]
    assert [p.train_bytes for p in split(texts, "x")] == [10, 1_000_010 - 50_000 - 10]


def test_single_file_holds_out_its_end_and_cuts_no_character(tmp_path: Path) -> None:
    text = ("é" * 1000).encode()
    for extra in range(4):
        file = tmp_path / f"{extra}.txt"
        file.write_bytes(b"x" * extra + text)
        dataset = make(file, tmp_path / "cache")
        assert plain(dataset.train) + dataset.held_out_text() == file.read_bytes()
        assert 80 <= len(dataset.held_out_text()) <= 101
        dataset.held_out_text().decode()


def test_text_larger_than_a_block_is_streamed_whole(tmp_path: Path) -> None:
    file = tmp_path / "big.txt"
    # Lines of odd lengths, so that blocks end inside lines and characters.
    file.write_text("".join(f"{i} äöü€\n" for i in range(200_000)), encoding="utf-8")
    assert file.stat().st_size > 2 << 20
    pieces = list(read_text(file))
    assert len(pieces) > 2
    assert all(piece.endswith("\n") for piece in pieces)
    assert "".join(pieces) == file.read_text(encoding="utf-8")
    dataset = make(file, tmp_path / "cache")
    assert plain(dataset.train) + plain(dataset.held_out) == file.read_bytes()
    assert isinstance(dataset.train, np.memmap)


@pytest.mark.parametrize("suffix", [".xz", ".gz"])
def test_packed_text_is_read_as_plain_text(tmp_path: Path, suffix: str) -> None:
    text = b"packed text\n" * 1000
    pack = {".xz": lzma.compress, ".gz": gzip.compress}[suffix]
    file = tmp_path / f"book.txt{suffix}"
    file.write_bytes(pack(text))
    dataset = make(file, tmp_path / "cache")
    assert plain(dataset.train) + plain(dataset.held_out) == text
    file.write_bytes(pack(text)[:-20])
    with pytest.raises(DataError, match=rf"book\.txt\{suffix} cannot be read"):
        find_texts(open_source(str(file)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"text\0text" * 100, "is not text: byte 4 is NUL"),
        (b"caf\xe9" * 100, "is not UTF-8 text"),
        (b"ends in half a character \xc3", "is not UTF-8 text: unexpected end of data"),
        (b"short", "is too short"),
    ],
)
def test_unusable_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    with pytest.raises(DataError) as error:
        make(file, tmp_path / "cache")
    assert "bad.txt" in str(error.value)
    assert message in str(error.value)
    assert not list((tmp_path / "cache").glob("*"))


def test_missing_and_empty_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone: no such file or folder"):
        open_source(str(tmp_path / "gone"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="folder has no files in it"):
        open_source(str(tmp_path / "folder"))
    (tmp_path / "folder" / "image").write_bytes(b"\0" * 10)
    with pytest.raises(DataError, match=r"folder has no text in it \(1 files left out\)"):
        make(tmp_path / "folder", tmp_path / "cache")


def test_folder_leaves_out_what_is_no_text(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(corpus, folder)
    (folder / "image.png").write_bytes(b"\x89PNG\0\0")
    (folder / "latin.txt").write_bytes(b"\xe9")
    (folder / "empty.txt").touch()
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    (folder / "run").mkdir()
    (folder / "run" / "log.jsonl").write_text("of the run itself")
    source = open_source(str(folder), exclude=folder / "run")
    dataset = prepare(source, ByteTokenizer(), "byte", tmp_path / "cache")
    assert (dataset.files, dataset.left_out) == (40, 2)
    assert np.array_equal(dataset.train, make(corpus, tmp_path / "cache").train)


def test_too_short_for_the_length(corpus: Path, tmp_path: Path) -> None:
    dataset = make(corpus, tmp_path)
    dataset.check_length(len(dataset.train) - 1, "book")
    with pytest.raises(DataError, match=r"book is too short: .* length="):
        dataset.check_length(len(dataset.train), "book")


def test_cache_is_used_and_follows_the_content(corpus: Path, tmp_path: Path) -> None:
    folder, cache = tmp_path / "text", tmp_path / "cache"
    shutil.copytree(corpus, folder)
    first = make(folder, cache)
    stamp = (first.folder / "train.bin").stat().st_mtime_ns
    again = make(folder, cache)
    assert again.fingerprint == first.fingerprint
    assert (again.folder / "train.bin").stat().st_mtime_ns == stamp
    file = folder / "file_00.txt"
    os.utime(file, ns=(1, 1))
    assert make(folder, cache).fingerprint != first.fingerprint
    # What was prepared half is not there at all.
    assert all((entry / "meta.json").is_file() for entry in cache.iterdir())


def test_unwritable_cache_is_named(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"prepared data cannot be written to .*file"):
        make(corpus, tmp_path / "file" / "cache")


def test_damaged_cache_is_named(corpus: Path, tmp_path: Path) -> None:
    dataset = make(corpus, tmp_path)
    (dataset.folder / "meta.json").write_text("{}")
    with pytest.raises(DataError, match="missing or damaged"):
        datasets.load(tmp_path, dataset.fingerprint)


def test_batches_are_a_function_of_seed_and_step() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    first = batch(tokens, rows=4, length=16, seed=1, step=5)
    assert first.shape == (4, 17)
    assert first.dtype == np.int64
    assert (np.diff(first) == 1).all()
    assert np.array_equal(first, batch(tokens, rows=4, length=16, seed=1, step=5))
    assert not np.array_equal(first, batch(tokens, rows=4, length=16, seed=1, step=6))
    assert not np.array_equal(first, batch(tokens, rows=4, length=16, seed=2, step=5))


def test_batches_reach_both_ends() -> None:
    tokens = np.arange(5)
    rows = batch(tokens, rows=200, length=3, seed=0, step=0)
    assert {tuple(row) for row in rows} == {(0, 1, 2, 3), (1, 2, 3, 4)}


def test_other_runs_are_no_data(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(corpus, folder)
    before = make(folder, tmp_path).files
    run = folder / "runs" / "one"
    (run / "data").mkdir(parents=True)
    for name in ("last.pt", "log.jsonl", "data/held_out.txt"):
        (run / name).write_text("text of another run\n" * 50)
    assert make(folder, tmp_path).files == before


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="the system refuses such names")
def test_a_file_name_that_is_no_unicode(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(corpus, folder)
    Path(os.fsdecode(os.fsencode(folder) + b"/bad\xff.txt")).write_text("some text\n" * 90)
    assert make(folder, tmp_path).files == 41
