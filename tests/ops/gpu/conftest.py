"""Where there is no GPU, Triton's interpreter runs the kernels on the CPU.

It must be asked for before anything imports Triton, so `test_interpreter.py` runs the files
`test_gpu_*.py` in a process of their own; in that one, and where there is a GPU, they run directly.
"""

import os

import pytest
import torch

DIRECT = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = ["test_interpreter.py" if DIRECT else "test_gpu_*.py"]


@pytest.fixture(scope="session")
def device():
    if not DIRECT:
        pytest.skip("there is no GPU: set TRITON_INTERPRET=1")
    return "cuda" if torch.cuda.is_available() else "cpu"
