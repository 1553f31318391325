"""How kernels are compiled, cached and spread over threads.

A kernel is a C function of one pointer (`rows.py`). Workers take tasks from a shared atomic counter
until none is left; what a task writes depends on its number only, so results are the same bits
however the tasks fall. (How work is cut into tasks may follow the number of threads.)

Threads come from OpenMP, by the very `GOMP_parallel` that torch's own loops and MKL use: after a
matrix product its threads spin for milliseconds waiting for more work, and a second pool (Numba's
or our own) would have to share the cores with that spinning. Numba's threading layers are not used
at all: its default one is not safe for calls from two Python threads. Where the process has no such
symbol (Windows, and macOS by its build), and in a child after `fork` (libgomp's threads do not
survive it), a plain pool of Python threads calls the same C function, which holds no GIL.
"""

import ctypes
import hashlib
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numba import cfunc, types

from mambapy.ops.cpu.rows import SCRATCH, SCRATCH_BYTES

_SIGNATURE = types.void(types.CPointer(types.int64))
_TYPES = {torch.float32: np.float32, torch.float64: np.float64}
# A thread is worth waking for that many multiplications: some tens of microseconds.
WORK_OF_A_THREAD = 50_000
# Of glibc's malloc.h; larger tensors than 32 MB, the most it allows, are always given back.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES, _HEAP_BYTES = 256 << 20, 32 << 20
_local = threading.local()
_compiling = threading.Lock()


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype that kernels calculate in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def _stamp() -> str:
    """A digest of this folder's sources; Numba itself would not see a change in an imported
    file."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@cache
def _compile(build: Callable, dtype: torch.dtype) -> Callable:
    """The C function of `build(F, size, stamp)`, compiled or taken from the cache on disk."""
    start = time.perf_counter()
    F = _TYPES[dtype]
    function = build(F, F().itemsize, _stamp())
    try:
        compiled = cfunc(_SIGNATURE, cache=True, error_model="numpy")(function)
    except RuntimeError:
        # Numba finds no place to write: neither the folder, nor the user's cache directory.
        compiled = cfunc(_SIGNATURE, error_model="numpy")(function)
    if time.perf_counter() - start > 2 and not compiled.cache_hits:
        _announce()
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)


@cache
def _announce() -> None:
    """Say, once a process, why the first calls take so long."""
    sys.stderr.write("mambapy: compiling kernels for this CPU, seconds each; kept on disk\n")


def compiled(build: Callable, dtype: torch.dtype) -> Callable:
    """The kernel of `build` for a dtype of `arithmetic`; safe to call from several threads."""
    with _compiling:
        _keep_freed_memory()
        return _compile(build, dtype)


@cache
def _keep_freed_memory() -> None:
    """Have the GNU C library keep up to `_KEPT_BYTES` that were freed, for the tensors to come.

    By default it gives the activations of each layer back to the system when they are freed, and
    takes them anew for the next: every 4 kB of them costs an interrupt and 4 kB of zeros, together
    up to half of the time of a forward pass. What a user has set in the environment stays.
    """
    chosen = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"}
    if platform.libc_ver()[0] != "glibc" or chosen & set(os.environ):
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    mallopt(_M_MMAP_THRESHOLD, _HEAP_BYTES)


@cache
def _openmp() -> Any:
    """GOMP_parallel of the OpenMP runtime that torch has loaded, or None."""
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


_forked = False
_pool: tuple[int, ThreadPoolExecutor] | None = None
_pool_lock = threading.Lock()


def _after_fork() -> None:
    """In a child only the forking thread lives on: forget every pool and lock."""
    global _forked, _pool, _pool_lock, _compiling
    _forked, _pool, _pool_lock, _compiling = True, None, threading.Lock(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _python_pool(workers: int) -> ThreadPoolExecutor:
    global _pool
    with _pool_lock:
        if _pool is None or _pool[0] < workers:
            _pool = workers, ThreadPoolExecutor(workers, thread_name_prefix="mambapy")
        return _pool[1]


def run(kernel: Callable, args: np.ndarray, tasks: int, scratch_bytes: int, work: int) -> None:
    """Run `kernel` until its `tasks` tasks are done, on at most torch.get_num_threads() threads.

    Args:
        kernel: from `compiled`.
        args: from `rows.pack`; the place and size of the scratch memory are filled in here.
        tasks: how many tasks the kernel will draw.
        scratch_bytes: local buffer of each worker.
        work: multiplications, about; little work does not wake every thread.
    """
    workers = max(1, min(tasks, work // WORK_OF_A_THREAD, torch.get_num_threads()))
    # Rounded to pages, so that no two workers share a cache line.
    scratch_bytes = -(-scratch_bytes // 4096) * 4096
    memory = getattr(_local, "memory", None)
    if memory is None or memory.nbytes < workers * scratch_bytes + 64:
        memory = _local.memory = np.empty(workers * scratch_bytes + 64, np.uint8)
    args[SCRATCH] = -(-memory.ctypes.data // 64) * 64
    args[SCRATCH_BYTES] = scratch_bytes
    address = args.ctypes.data
    if workers == 1:
        kernel(address)
        return
    openmp = None if _forked else _openmp()
    if openmp is not None:
        openmp(ctypes.cast(cast(Any, kernel), ctypes.c_void_p), address, workers, 0)
        return
    pool = _python_pool(workers - 1)
    futures = [pool.submit(kernel, address) for _ in range(workers - 1)]
    kernel(address)
    for future in futures:
        future.result()
