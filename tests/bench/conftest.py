from pathlib import Path
from typing import Any

import pytest

FAKE = """
import torch
from torch import nn

print("a library may print what it likes")


class MambaConfig:
    def __init__(self, d_model, d_state, n_layers):
        self.d_model = d_model


class MambaBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.d_model))

    def forward(self, x):
        return x * self.weight

    def selective_scan(self, x, dt, A, B, C, D):
        return x * dt + B.sum() + C.sum() + A.sum() + D
"""


@pytest.fixture(scope="session")
def mamba_py(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the one that mamba.py is installed into, with a stand-in for it."""
    folder = tmp_path_factory.mktemp("rivals")
    (folder / "mambapy").mkdir()
    (folder / "mambapy" / "__init__.py").touch()
    (folder / "mambapy" / "mamba.py").write_text(FAKE)
    about = folder / "mambapy-1.2.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mambapy\nVersion: 1.2.0\n")
    return folder


def result(kind: str, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """What a file of results holds."""
    return {
        "kind": kind,
        "command": f"mambapy bench {kind}",
        "date": "2026-11-23",
        "machine": {"cpu": "Abacus", "cores": 2, "threads": 2, "memory_bytes": 1, "gpu": None},
        "versions": {"torch": "2.13.0"},
        "left_out": [],
        "cases": cases,
    }


def figures(seconds: float, **more: Any) -> dict[str, Any]:
    """A contestant's figures."""
    return {
        "median_s": seconds,
        "q1_s": 0.9 * seconds,
        "q3_s": 1.2 * seconds,
        "rounds": 5,
        "peak_bytes": int(1e9 * seconds),
        "process_bytes": int(2e9 * seconds),
    } | more
