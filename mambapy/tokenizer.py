"""Text to token ids and back: bytes, offline; or any `tokenizer.json` of the tokenizers library.

Both have the part of transformers' call interface that this library uses, so a tokenizer of
transformers works wherever one of these does: `tokenizer(text)["input_ids"]`, `decode`,
`eos_token_id`, `len`.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from mambapy.errors import DataError, MissingExtraError

BYTE_FILE, JSON_FILE = "tokenizer.byte", "tokenizer.json"


class Tokenizer(Protocol):
    """What generation and training ask of a tokenizer."""

    eos_token_id: int | None

    def __call__(self, text: str) -> Any:
        """A mapping whose "input_ids" are the text's token ids."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some token ids."""
        ...

    def __len__(self) -> int:
        """How many ids there are."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as tokens: ids 0 to 255 are bytes, 256 ends a text. It needs no file."""

    eos_token_id: int | None = 256
    pad_token_id = 256

    def __call__(self, text: str | list[str], **options: Any) -> dict[str, Any]:
        """Token ids and mask of one text, or lists of them for several.

        Args:
            text: what to encode; no end-of-text token is added.
            **options: `padding=True` makes several texts equally long, on the right.

        Raises:
            DataError: another option was given, or the text has lone surrogates.
        """
        padding = options.pop("padding", False)
        if options:
            raise DataError(f"ByteTokenizer takes no {', '.join(sorted(options))}")
        if isinstance(text, str):
            ids = self._bytes(text)
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        rows = [self._bytes(each) for each in text]
        longest = max(map(len, rows), default=0) if padding else 0
        gaps = [max(0, longest - len(row)) for row in rows]
        return {
            "input_ids": [r + [self.pad_token_id] * g for r, g in zip(rows, gaps, strict=True)],
            "attention_mask": [[1] * len(r) + [0] * g for r, g in zip(rows, gaps, strict=True)],
        }

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        end = "" if skip_special_tokens else "<|endoftext|>"
        parts, run = [], bytearray()
        for token in ids:
            if int(token) < 256:
                run.append(int(token))
            else:
                parts += [run.decode("utf-8", errors="replace"), end]
                run = bytearray()
        return "".join([*parts, run.decode("utf-8", errors="replace")])

    def __len__(self) -> int:
        """256 bytes and the end of text."""
        return 257

    def save(self, directory: str | Path) -> None:
        """Leave a mark that says a model was trained on bytes."""
        text = "Token ids 0 to 255 are bytes, 256 ends a text.\n"
        (Path(directory) / BYTE_FILE).write_text(text, encoding="utf-8")

    @staticmethod
    def _bytes(text: str) -> list[int]:
        """The UTF-8 bytes of a text."""
        try:
            return list(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise DataError(f"the text is no valid Unicode: {error}") from error


class FileTokenizer:
    """A `tokenizer.json`, as the tokenizers library writes it.

    Args:
        path: the file.
        eos: the token that ends a text; looked for among the usual names without it.

    Raises:
        DataError: the file is missing, is no tokenizer, or has no such token.
        MissingExtraError: the tokenizers library is not installed.
    """

    USUAL_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")

    def __init__(self, path: str | Path, eos: str | None = None) -> None:
        try:
            from tokenizers import Tokenizer as Reader
        except ImportError as error:
            raise MissingExtraError("tokenizers", "hub") from error
        self.path = Path(path)
        if not self.path.is_file():
            raise DataError(f"there is no tokenizer file {path}")
        try:
            self.reader = Reader.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path} is no tokenizer.json: {error}") from error
        found = (self.reader.token_to_id(name) for name in ((eos,) if eos else self.USUAL_EOS))
        self.eos_token_id: int | None = next((i for i in found if i is not None), None)
        if eos is not None and self.eos_token_id is None:
            raise DataError(f"{path} has no token {eos!r}")

    def __call__(self, text: str | list[str], **options: Any) -> dict[str, Any]:
        """Token ids and mask of one text, or lists of them for several.

        Raises:
            DataError: an option was given.
        """
        if options:
            raise DataError(f"this tokenizer takes no {', '.join(sorted(options))}")
        if isinstance(text, str):
            ids = self.reader.encode(text, add_special_tokens=False).ids
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        rows = [e.ids for e in self.reader.encode_batch(text, add_special_tokens=False)]
        return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        return self.reader.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def __len__(self) -> int:
        """How many ids there are, added tokens included."""
        return self.reader.get_vocab_size()

    def save(self, directory: str | Path) -> None:
        """Copy the file to a folder."""
        target = Path(directory) / JSON_FILE
        if target.resolve() != self.path.resolve():
            shutil.copyfile(self.path, target)


def load_tokenizer(name: str | Path) -> ByteTokenizer | FileTokenizer:
    """The tokenizer of a name, a file, or a folder that `save` wrote to.

    Args:
        name: "byte", a `tokenizer.json`, or a folder with one of the two.

    Raises:
        DataError: there is none.
        MissingExtraError: it needs the tokenizers library, which is not installed.
    """
    if name == "byte" or (Path(name) / BYTE_FILE).is_file():
        return ByteTokenizer()
    path = Path(name)
    if path.is_dir():
        if not (path / JSON_FILE).is_file():
            raise DataError(f"{path} holds neither {BYTE_FILE} nor {JSON_FILE}")
        path = path / JSON_FILE
    return FileTokenizer(path)
