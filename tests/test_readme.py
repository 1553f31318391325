"""README's Python blocks run as printed, one after the other; its commands exist."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from mambapy.cli import _parser

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = blocks("python")
    assert len(found) >= 4
    namespace = {}
    for number, block in enumerate(found):
        exec(compile(block, f"README block {number}", "exec"), namespace)
    # What the original project's README promised.
    assert namespace["x"].shape == (16, 64)
    assert namespace["logits"].shape == (16, 64, 32000)
    assert namespace["output"].startswith("Mamba is a type of")


def commands():
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line.split("#")[0].strip() for line in lines if line.startswith("mambapy ")]


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command):
    _parser().parse_args(shlex.split(command)[1:])


def test_make_targets_exist():
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w+)", TEXT, flags=re.MULTILINE)
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_demo_figures_are_the_recorded_ones():
    record = json.loads((README.parent / "benchmarks/results/demo.json").read_text())["result"]
    assert f"**{record['final_bpb']:.3f} bits for a byte**" in TEXT
    assert f"needs {record['xz_bpb']:.3f}" in TEXT
    assert f"{record['parameters'] / 1e6:.2f} million parameters" in TEXT
    assert f"{record['tokens'] / 1e6:.1f} MB" in TEXT


def test_files_it_links_to_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        if "://" not in link:
            assert (README.parent / link).exists(), link


def test_speeds_are_the_recorded_ones():
    path = README.parent / "benchmarks/readme.py"
    spec = importlib.util.spec_from_file_location("readme_figures", path)
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    assert figures.fill(TEXT) == TEXT
    for name, make in figures.PARTS.items():
        assert make() in TEXT, name
