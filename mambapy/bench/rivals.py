"""Who is measured, from which files, and with what they need; the versions of all of them.

mamba.py is on PyPI under this package's own name. So it is installed into a folder by itself,

    pip install --no-deps --target DIR mambapy==1.2.0

and `--mamba-py DIR` names that folder. The same Python and the same torch then run both, which is
fairer than a second virtual environment with a torch of its own; only the process is another, with
DIR in front of everything else that Python looks for packages in. `make bench` makes the folder.
"""

import importlib.metadata
import importlib.util
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import mambapy
from mambapy.errors import ConfigError

OURS = "mambapy"
MAMBA_PY = "mamba.py"
INSTALL = "pip install --no-deps --target DIR mambapy==1.2.0"


@dataclass(frozen=True)
class Who:
    """One contestant.

    Args:
        file: of contestants/, where it is made.
        options: what the file needs to know beside the sizes.
        library: whose `mambapy` the process has, `OURS` or `MAMBA_PY`.
        package: the Python package that must be installed.
        copies: how many tensors (batch, length, d_inner, d_state) of float32 it was seen to hold
            at most in a block's forward pass, in its training, and for each block from its forward
            to its backward pass.
    """

    file: str
    options: Mapping[str, str] = field(default_factory=dict)
    library: str = OURS
    package: str = "torch"
    copies: tuple[int, int, int] = (0, 0, 0)


WHO = {
    "floor": Who("floor.py"),
    "mambapy": Who("ours.py", {"backend": "auto"}),
    **{
        f"mambapy {weights}": Who("ours.py", {"weights": weights})
        for weights in ("float32", "bfloat16", "int8")
    },
    **{name: Who("ours.py", {"backend": name}) for name in ("auto", "cpu", "chunked")},
    "deterministic": Who("ours.py", {"backend": "auto", "deterministic": "yes"}),
    "pscan": Who("ours.py", {"backend": "pscan"}, copies=(4, 7, 4)),
    "reference": Who("ours.py", {"backend": "reference"}, copies=(0, 6, 5)),
    MAMBA_PY: Who("mamba_py.py", library=MAMBA_PY, copies=(7, 10, 5)),
    "transformers": Who("hf.py", package="transformers", copies=(4, 13, 6)),
    "official": Who("official.py", package="mamba_ssm"),
    **{
        f"mambapy {level}": Who("ours.py", {"recompute": level})
        for level in ("conv", "scan", "block")
    },
    "mambapy eager": Who("ours.py", {"cuda_graph": "never"}),
    "mamba2": Who("ours.py", {"model": "mamba2"}),
    "mamba3": Who("ours.py", {"model": "mamba3"}),
    "transformers mamba2": Who("hf.py", package="transformers"),
    "dense": Who("ours.py", {"model": "dense"}),
    "vit": Who("ours.py", {"model": "vit"}),
    "transformers loop": Who("hf.py", {"experts": "eager"}, package="transformers"),
    "transformers grouped": Who("hf.py", {"experts": "grouped_mm"}, package="transformers"),
}


@dataclass(frozen=True)
class Libraries:
    """The folders that each `mambapy` is in, their versions, and why contestants are missing."""

    folders: Mapping[str, Path]
    versions: Mapping[str, str]
    missing: Mapping[str, str]


def find(mamba_py: str | None = None) -> Libraries:
    """Look for everything that can be measured.

    Args:
        mamba_py: the folder that mamba.py was installed into, if any.

    Raises:
        ConfigError: that folder does not hold mamba.py.
    """
    folders = {OURS: Path(mambapy.__file__).resolve().parent.parent}
    versions = {"python": platform.python_version(), OURS: mambapy.__version__}
    for package in ("torch", "numba", "triton", "transformers", "mamba_ssm"):
        if importlib.util.find_spec(package):
            versions[package] = importlib.metadata.version(package)
    if mamba_py is not None:
        folders[MAMBA_PY] = Path(mamba_py).resolve()
        versions[MAMBA_PY] = _version_in(mamba_py)
    missing = {}
    for name, who in WHO.items():
        if who.library not in folders:
            missing[name] = f"not given: {INSTALL}, then --mamba-py DIR"
        elif who.package not in versions:
            missing[name] = f"{who.package} is not installed"
    return Libraries(folders, versions, missing)


def expected_bytes(name: str, pass_: str, sizes: Mapping[str, int]) -> int:
    """About how much memory a pass of a contestant takes, where that grows with d_state."""
    forward, training, kept = WHO[name].copies
    copies = forward
    if pass_ in ("training", "step"):
        copies = training + kept * (sizes.get("n_layers", 1) - 1)
    e, n = sizes.get("d_inner") or 2 * sizes["d_model"], sizes.get("d_state", 0)
    return 4 * copies * sizes["batch"] * sizes["length"] * e * n


def _version_in(folder: str) -> str:
    """The version of the mamba.py in a folder."""
    if (Path(folder) / "mambapy" / "mamba.py").is_file():
        for found in importlib.metadata.distributions(name="mambapy", path=[folder]):
            if found.version.startswith("1."):
                return found.version
    raise ConfigError(f"--mamba-py {folder} does not hold mamba.py; {INSTALL} puts it there")
