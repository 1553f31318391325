import subprocess
import sys

import pytest

from mambapy.bench import memory

SCRIPT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("memory", sys.argv[1])
memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)
before = bytearray(b"x") * 100_000_000
meter = memory.Meter()
work = bytearray(b"x") * 200_000_000
del work
print(*meter.peak())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not say")
def test_peak_of_200_mb_is_200_mb():
    """In a process of its own; what was there before and what is freed again are told apart."""
    # The parent's memory would be inherited by ru_maxrss.
    ballast = bytearray(b"x") * 300_000_000
    command = [sys.executable, "-c", SCRIPT, memory.__file__]
    peak, process = map(int, subprocess.check_output(command, text=True).split())
    assert len(ballast) == 300_000_000
    assert 195e6 < peak < 215e6
    assert 300e6 < process < 400e6


def test_without_the_system_there_is_no_figure(monkeypatch, tmp_path):
    """As on Windows: no /proc, no module `resource`."""
    monkeypatch.setattr(memory, "STATUS", tmp_path / "gone")
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "gone" / "gone")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert memory.Meter().peak() == (None, None)


@pytest.mark.skipif(sys.platform == "win32", reason="needs the module resource")
def test_without_proc_it_is_by_how_much_the_mark_rose(monkeypatch, tmp_path):
    """As on macOS: nothing sets the mark back, so a second, smaller piece of work adds nothing."""
    monkeypatch.setattr(memory, "STATUS", tmp_path / "gone")
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "gone" / "gone")
    assert memory.high_water() > 0
    meter = memory.Meter()
    peak, process = meter.peak()
    assert peak == 0
    assert process == memory.high_water()
