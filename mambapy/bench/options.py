"""How a benchmark is run: its options, and the flags that set them."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from mambapy.errors import ConfigError

RESULTS, PLOTS = "benchmarks/results", "benchmarks/plots"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `bench`.

    Args:
        kind: "scan", "block", "heads", "experts", "vision", "train" or "decode".
        quick: tiny sizes and few rounds, for a first look; a file of its own.
        cases: only the cases whose name has this in it (* and ? stand for any characters); a file
            of its own.
        contestants: only those, names with commas between them; likewise.
        out: the folder for the results.
        threads: of torch; None for as many as it takes by itself.
        device: "cpu" or "cuda".
        mamba_py: the folder that mamba.py is installed in, see `rivals`.

    Raises:
        ConfigError: a value is out of its range.
    """

    kind: str
    quick: bool = False
    cases: str | None = None
    contestants: str | None = None
    out: str = RESULTS
    threads: int | None = None
    device: str = "cpu"
    mamba_py: str | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without torch."""
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"--threads {self.threads} must be at least 1")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"--device {self.device} must be cpu or cuda")

    @property
    def path(self) -> Path:
        """The file of the results. A part of the cases does not replace the record of all."""
        parts = [
            *([self.device] if self.device != "cpu" else []),
            self.kind,
            *(["quick"] if self.quick else []),
            *(["part"] if self.cases or self.contestants else []),
        ]
        return Path(self.out) / f"{'-'.join(parts)}.json"

    @property
    def command(self) -> str:
        """The command that runs this benchmark, without the folders of this machine."""
        words = ["mambapy", "bench", self.kind]
        words += ["--quick"] if self.quick else []
        words += ["--cases", f"'{self.cases}'"] if self.cases else []
        words += ["--contestants", f"'{self.contestants}'"] if self.contestants else []
        words += ["--threads", str(self.threads)] if self.threads else []
        words += ["--device", self.device] if self.device != "cpu" else []
        words += ["--mamba-py", "DIR"] if self.mamba_py else []
        return " ".join(words)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give `mambapy bench` its kinds, and each kind its flags."""
    kinds = parser.add_subparsers(
        required=True,
        metavar="scan | block | heads | experts | vision | train | decode | plot",
        dest="kind",
    )
    for kind, text in {
        "scan": "the selective scan on every backend",
        "block": "one block, against the floor of its matrix products",
        "heads": "Mamba-2 and Mamba-3: one block, and the 130m shape",
        "experts": "a mixture of experts, against the floor of its matrix products",
        "vision": "a Vision Mamba, against the floor of its matrix products",
        "train": "a training step of a small language model",
        "decode": "reading a prompt, and generating, with the 130m shape",
    }.items():
        _add_run_flags(kinds.add_parser(kind, help=text, allow_abbrev=False))
    plot = kinds.add_parser("plot", help="draw what the results hold", allow_abbrev=False)
    plot.add_argument(
        "--results", default=RESULTS, metavar="DIR", help=f"folder of the results [{RESULTS}]"
    )
    plot.add_argument("--out", default=PLOTS, metavar="DIR", help=f"folder for the plots [{PLOTS}]")
    plot.add_argument("--json", action="store_true", help="print the files as one JSON object")


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a kind that measures."""
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for a first look")
    parser.add_argument("--cases", metavar="PATTERN", help="only cases with this in their name")
    parser.add_argument("--contestants", metavar="NAMES", help="only those, with commas between")
    parser.add_argument(
        "--out", default=RESULTS, metavar="DIR", help=f"folder for the results [{RESULTS}]"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads of torch [its own choice]"
    )
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu or cuda [cpu]")
    parser.add_argument(
        "--mamba-py",
        metavar="DIR",
        help="folder with mamba.py, from pip install --no-deps --target DIR mambapy==1.2.0",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON, no table")
