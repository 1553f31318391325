"""What a format is: a translation of config.json, and a table of names."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from mambapy.checkpoints.architecture import Architecture
from mambapy.errors import CheckpointError

_REQUIRED = object()


@dataclass(frozen=True)
class Part:
    """A tensor of a file that is the next rows of one of ours.

    Args:
        name: in the file.
        rows: how many of our tensor's rows it has; None for all. Where ours has three dimensions,
            (n, r, d), its rows are n r of d.
    """

    name: str
    rows: int | None = None


class Format(ABC):
    """One format of checkpoints."""

    # What messages call it.
    name: ClassVar[str]
    # How it is written: "safetensors" or "bin".
    container: ClassVar[str] = "safetensors"
    # Which files hold the weights, without shards' numbers, the preferred first.
    stems: ClassVar[tuple[str, ...]] = ("model.safetensors", "pytorch_model.bin")
    # Whether a tied head has a name of its own in the file.
    writes_tied_head: ClassVar[bool] = False

    @abstractmethod
    def read(self, values: "Keys") -> Architecture:
        """Translate a config.json.

        Raises:
            CheckpointError: a key is missing, unknown, or asks for what no model here does.
        """

    @abstractmethod
    def write(self, architecture: Architecture) -> dict[str, Any]:
        """Translate to a config.json.

        Raises:
            CheckpointError: the format cannot express this architecture.
        """

    @abstractmethod
    def parts(self, name: str, architecture: Architecture) -> list[Part]:
        """The tensors of the file that make up one of ours, in the order of its rows."""

    def canonical(self, name: str) -> str:
        """A tensor's name in the file, as `parts` gives it; for spellings of other versions."""
        return name

    def fit(self, names: Iterable[str]) -> "Format":
        """The variant of this format that a file with these names, canonical ones, has."""
        return self

    def settle(self, names: Iterable[str], architecture: Architecture) -> dict[str, str]:
        """{as `parts` gives it: canonical name}; for spellings that the architecture decides."""
        return {name: name for name in names}


class Keys:
    """A config.json that is read key by key, so that none is overlooked.

    Args:
        values: the JSON object.
        source: what messages name.
    """

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.left, self.source = dict(values), source

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value of a key, or the default where there is none."""
        if name in self.left:
            return self.left.pop(name)
        if default is _REQUIRED:
            raise CheckpointError(f"{self.source} has no {name!r}")
        return default

    def given(self, **renamed: str) -> dict[str, Any]:
        """{ours: value} for the keys (ours=theirs) that are there."""
        return {ours: self.left.pop(name) for ours, name in renamed.items() if name in self.left}

    def must(self, name: str, *allowed: Any) -> None:
        """Raise unless a key is absent or has a value that the models here work with."""
        if name in self.left and (value := self.left.pop(name)) not in allowed:
            known = " or ".join(repr(each) for each in allowed)
            raise CheckpointError(f"{self.source}: {name}={value!r}, where only {known} works here")

    def ignore(self, *names: str) -> None:
        """Drop keys that change no result."""
        for name in names:
            self.left.pop(name, None)

    def section(self, name: str) -> "Keys":
        """The object below a key, empty where there is none."""
        values = self.take(name, None) or {}
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{self.source}: {name} must be an object, got {values!r}")
        return Keys(values, f"{self.source}, {name}")

    def finish(self) -> None:
        """Raise if a key is left that nobody has asked for."""
        if self.left:
            left = ", ".join(f"{name}={value!r}" for name, value in self.left.items())
            raise CheckpointError(
                f"{self.source} has keys that are not known here and may change the result: "
                f"{left}; remove those that do not"
            )


def unlike(architecture: Architecture, **wanted: Any) -> list[str]:
    """Which fields of the stack's configuration are not as wanted, "name=value" each."""
    values = {name: getattr(architecture.config, name) for name in wanted}
    return [f"{name}={values[name]!r}" for name in wanted if values[name] != wanted[name]]


def refuse(where: str, reasons: list[str]) -> None:
    """Raise if there are reasons why a format cannot express an architecture."""
    if reasons:
        raise CheckpointError(f"{where} cannot express {', '.join(reasons)}")
