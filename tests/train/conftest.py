import random
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 small files of repetitive text, 30 KB in all."""
    folder = tmp_path_factory.mktemp("corpus")
    words = ["def", "return", "state", "mamba", "scan", "(x)", "= 1\n", "+ y\n", "été"]
    generator = random.Random(0)
    for i in range(40):
        text = " ".join(generator.choice(words) for _ in range(150))
        (folder / f"file_{i:02}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def tiny(corpus: Path, tmp_path: Path) -> dict[str, Any]:
    """Settings of a run that takes a second."""
    return {
        "data": str(corpus),
        "out": str(tmp_path / "run"),
        "d_model": 16,
        "n_layers": 2,
        "d_state": 4,
        "batch_size": 4,
        "length": 32,
        "steps": 12,
        "warmup": 2,
        "lr": 1e-2,
        "eval_interval": 4,
        "eval_tokens": 512,
        "samples": 1,
        "sample_tokens": 8,
        "plot": "never",
        "device": "cpu",
    }
