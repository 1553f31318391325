"""Compiling: what is said, and what happens where nothing can be cached."""

import itertools

import numpy as np
import torch
from numba import njit, types

from mambapy.ops.cpu import simd, threads


def build(F, size, stamp):
    """A kernel that writes 7."""

    def kernel(args):
        stamp  # noqa: B018
        args[0] = 7

    return kernel


def fresh():
    """The kernel, compiled anew."""
    return threads._compile.__wrapped__(build, torch.float32)


def test_compiles_where_nothing_can_be_cached(monkeypatch):
    real, asked = threads.cfunc, []

    def no_place(*args, cache=False, **options):
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return real(*args, **options)

    monkeypatch.setattr(threads, "cfunc", no_place)
    args = np.zeros(1, np.int64)
    fresh()(args.ctypes.data)
    assert args[0] == 7
    assert asked == [True, False]


def test_long_compilations_are_announced_once(monkeypatch, capsys):
    clock = itertools.count(step=3.0)
    monkeypatch.setattr(threads.time, "perf_counter", lambda: next(clock))
    real = threads.cfunc
    monkeypatch.setattr(threads, "cfunc", lambda *a, cache=False, **o: real(*a, **o))
    threads._announce.cache_clear()
    fresh()
    fresh()
    error = capsys.readouterr().err
    assert error == "mambapy: compiling kernels for this CPU, seconds each; kept on disk\n"


def test_a_short_one_is_not(monkeypatch, capsys):
    monkeypatch.setattr(threads.time, "perf_counter", lambda: 1.0)
    fresh()
    assert capsys.readouterr().err == ""


def test_a_helper_is_compiled_once_whatever_constants_it_is_called_with():
    @simd.inner
    def add(args, which, number):
        args[which] += number

    def several(args):
        add(args, 0, 3)
        add(args, 1, 4)
        add(args, which=1, number=args[0])

    kernel = njit([types.void(types.CPointer(types.int64))])(several)
    assert len(kernel.overloads) == 1
    assert [*add.overloads] == [(types.CPointer(types.int64), types.int64, types.int64)]
