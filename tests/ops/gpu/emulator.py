"""Runs the package's CUDA C++ kernels on the CPU, one thread after the other.

`launch` stands in for `mambapy.ops.gpu.cuda.launch`. The kernels are compiled as they are, with
machine.h in place of kernels/machine.cuh.
"""

import ctypes
import hashlib
import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch

from mambapy.ops.gpu import cuda

# What torch says of a card, as far as kernels ask.
H100 = SimpleNamespace(
    name="none",
    major=9,
    multi_processor_count=132,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
)
MACHINE = Path(__file__).with_name("machine.h")
WRAPPER = """
static long long* args_;
static void thread_() {{
    {call};
    wait_at(END);
}}
extern "C" void run(long long* args, int blocks, int layers, int threads, int shared) {{
    if (shared > (int)sizeof(memory)) fail("more shared memory than a block can have");
    args_ = args;
    gridDim = {{(unsigned)blocks, (unsigned)layers}};
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++) run_block(threads, thread_);
}}
"""


def launch(kernel: cuda.Kernel, grid, args, device: torch.device) -> None:
    """Run a kernel to its end; tensors are on the CPU."""
    run = _library(source(kernel, len(args))).run
    run((ctypes.c_longlong * len(args))(*args), *grid, kernel.threads, kernel.shared)


def source(call: cuda.Kernel, arguments: int) -> str:
    """The kernel as a C++ file."""
    machine = (cuda.SOURCES / "machine.cuh").read_text()
    text = cuda.source_of(call.name, call.settings).removeprefix(machine)
    text = text.replace("extern __shared__ uint4 memory[];", "")
    signature = re.search(rf"{call.name}\((.*?)\) \{{", text, re.DOTALL)
    assert signature is not None
    types = [part.rsplit(maxsplit=1)[0] for part in signature[1].replace("*", "* ").split(",")]
    assert len(types) == arguments
    values = ", ".join(f"({kind})args_[{i}]" for i, kind in enumerate(types))
    return MACHINE.read_text() + text + WRAPPER.format(call=f"{call.name}({values})")


@cache
def _library(text: str) -> ctypes.CDLL:
    """Compile a file, once for all processes that run at the same time."""
    folder = Path(tempfile.gettempdir()) / "mambapy-emulator"
    folder.mkdir(exist_ok=True)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            code, made = Path(scratch, "kernel.cpp"), Path(scratch, "kernel.so")
            code.write_text(text)
            flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC"]
            subprocess.run(["g++", *flags, "-o", made, code], check=True)
            made.replace(path)
    return ctypes.CDLL(str(path))
