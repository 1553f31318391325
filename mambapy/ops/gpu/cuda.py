"""CUDA C++ kernels, compiled on the user's machine when first needed, and their launch.

    compiled    kernels/NAME.cu and what it needs -> machine code, by NVRTC; kept on disk
    launch      loads it on the tensor's device and puts it on the current stream

NVRTC and cuda.bindings come with torch's CUDA builds on Linux: no toolkit, no compiler of the
system's. All arguments of a kernel are 64-bit: places of tensors and sizes.
"""

import ctypes
import hashlib
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambapy.errors import BackendError
from mambapy.ops.gpu import disk

SOURCES = Path(__file__).parent / "kernels"
Settings = Mapping[str, str | int]
_lock = threading.Lock()


class Kernel:
    """A kernel and how its blocks are made up.

    Args:
        name: of its file and of its function.
        settings: constants and types that it is compiled with.
        threads: of a block.
        shared: bytes of shared memory of a block.
    """

    def __init__(self, name: str, settings: Settings, threads: int, shared: int) -> None:
        self.name, self.settings = name, settings
        self.threads, self.shared = threads, shared
        # Device -> its handle there.
        self.loaded: dict[torch.device, Any] = {}


def pointer(T: Tensor | None) -> int:
    """Where a tensor's numbers are, or 0."""
    return 0 if T is None else T.data_ptr()


def launch(
    kernel: Kernel, grid: tuple[int, int], args: Sequence[int], device: torch.device
) -> None:
    """Put `grid` blocks of a kernel on the device's current stream."""
    from cuda.bindings import driver

    with torch.cuda.device(device):
        function = kernel.loaded.get(device)
        if function is None:
            function = kernel.loaded[device] = _load(kernel, device)
        if int(_check(driver.cuCtxGetCurrent())) == 0:
            # A thread's first work on a device: torch binds its context when it needs it itself.
            torch.zeros(1, device=device)
        values = (ctypes.c_int64 * len(args))(*args)
        first = ctypes.addressof(values)
        places = (ctypes.c_void_p * len(values))(*range(first, first + 8 * len(values), 8))
        stream = torch.cuda.current_stream(device).cuda_stream
        sizes = (*grid, 1, kernel.threads, 1, 1, kernel.shared)
        _check(driver.cuLaunchKernel(function, *sizes, stream, ctypes.addressof(places), 0))


def compiled(name: str, settings: Settings, arch: str) -> bytes:
    """The machine code of a kernel for an architecture ("sm_90"), from the cache where it is there.

    Raises:
        BackendError: NVRTC refuses the source; with its own words.
    """
    source = source_of(name, settings)
    options = [f"-arch={arch}", "-std=c++17"]
    digest = hashlib.sha256(
        "\n".join((source, *options, *map(str, _version()))).encode()
    ).hexdigest()
    name_on_disk = f"{name}-{arch}-{digest[:24]}.cubin"
    code = disk.read(name_on_disk)
    if code is None:
        code = _nvrtc(name, source, options)
        disk.write(name_on_disk, code)
    return code


def source_of(name: str, settings: Settings) -> str:
    """The whole text of a kernel: what all share, the settings, its file."""
    constants = "".join(
        f"using {key} = {value};\n" if key.endswith("_T") else f"constexpr int {key} = {value};\n"
        for key, value in sorted(settings.items())
    )
    files = ("machine.cuh", "common.cuh", "scan.cuh", f"{name}.cu")
    machine, common, scan, kernel = ((SOURCES / file).read_text() for file in files)
    return machine + common + constants + scan + kernel


def _load(kernel: Kernel, device: torch.device) -> Any:
    """A kernel on a device, ready to be launched."""
    from cuda.bindings import driver

    with _lock:
        major, minor = torch.cuda.get_device_capability(device)
        code = compiled(kernel.name, kernel.settings, f"sm_{major}{minor}")
        library = _check(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
        entry = _check(driver.cuLibraryGetKernel(library, kernel.name.encode()))
        function = _check(driver.cuKernelGetFunction(entry))
        most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(function, most, kernel.shared))
        return function


def _nvrtc(name: str, source: str, options: Sequence[str]) -> bytes:
    """Compile."""
    from cuda.bindings import nvrtc

    _announce()
    program = _check(nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], []))
    flags = [option.encode() for option in options]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytearray(_check(nvrtc.nvrtcGetProgramLogSize(program)))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise BackendError(f"NVRTC cannot compile {name}.cu: {log.decode(errors='replace')}")
    code = bytearray(_check(nvrtc.nvrtcGetCUBINSize(program)))
    _check(nvrtc.nvrtcGetCUBIN(program, code))
    _check(nvrtc.nvrtcDestroyProgram(program))
    return bytes(code)


@cache
def _version() -> tuple[int, int]:
    """NVRTC's version."""
    from cuda.bindings import nvrtc

    try:
        status, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as error:
        raise BackendError("NVRTC is not there: pip install nvidia-cuda-nvrtc") from error
    _check((status,))
    return major, minor


@cache
def _announce() -> None:
    """Say, once a process, why the first calls take so long."""
    sys.stderr.write("mambapy: compiling kernels for this GPU, seconds each; kept on disk\n")


def _check(result: tuple[Any, ...]) -> Any:
    """What a call of cuda.bindings has returned after its status; raise if that is an error."""
    status, *values = result
    if int(status) != 0:
        raise BackendError(f"CUDA: {status.name}")
    return values[0] if values else None
