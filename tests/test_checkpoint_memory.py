"""Loading needs the model's memory and one tensor more; where nothing is cast, hardly any."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mambapy.lm import LM, MambaConfig

# Pages that are not a file's, sampled while a checkpoint is loaded.
LOAD = """
import json, sys, threading, time
import torch
from mambapy.lm import from_pretrained

PAGE = __import__("resource").getpagesize()

def private():
    resident, shared = open("/proc/self/statm").read().split()[1:3]
    return (int(resident) - int(shared)) * PAGE

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], private())
        time.sleep(0.0005)

small, folder, dtype = sys.argv[1:]
dtype = getattr(torch, dtype)
from_pretrained(small, dtype=dtype)
done, peak, before = threading.Event(), [0], private()
thread = threading.Thread(target=watch)
thread.start()
model = from_pretrained(folder, dtype=dtype)
done.set()
thread.join()
tensors = {id(P): P for P in model.parameters()}.values()
print(json.dumps({
    "peak": max(peak[0], private()) - before,
    "model": sum(P.nbytes for P in tensors),
    "largest": max(P.numel() for P in tensors) * 4,
}))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny checkpoint, to load what Python loads the first time, and one of 120 MB."""
    root = tmp_path_factory.mktemp("memory")
    LM(MambaConfig(d_model=8, n_layers=1), 9).save_pretrained(root / "small")
    model = LM(MambaConfig(d_model=512, n_layers=8), 30000)
    for format in ("mambapy", "official"):
        model.save_pretrained(root / format, format=format)
    return root


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux for its pages")
@pytest.mark.parametrize("format", ["mambapy", "official"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_tensor_more_than_the_model(folders, format, dtype):
    done = subprocess.run(
        [sys.executable, "-c", LOAD, folders / "small", folders / format, dtype],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # What is cast is new; what is not stays in its file.
    needed = 0 if dtype == "float32" else found["model"]
    assert found["peak"] <= needed + 1.1 * found["largest"] * (dtype != "float32") + 8e6
    assert found["largest"] == 4 * 30000 * 512
