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


def write_pretrained(root):
    """Small checkpoints and tokenizers where README's names are found first: in folders."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from mambapy import lm
    from mambapy.jamba_lm import JambaConfig, JambaLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    reader = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    reader.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reader.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=reader, eos_token="</s>")
    for name in ("TechxGenus/Mini-Jamba", "EleutherAI/gpt-neox-20b"):
        tokenizer.save_pretrained(root / name)
    sizes = {"d_model": 16, "n_layers": 2, "d_state": 4}
    jamba = JambaLM(
        JambaConfig(**sizes, d_intermediate=8, n_heads=2, n_kv_heads=1, n_experts=4), 257
    )
    jamba.save_pretrained(root / "TechxGenus/Mini-Jamba", format="hf")
    mamba = lm.LM(lm.MambaConfig(**sizes), 257)
    mamba.save_pretrained(root / "state-spaces/mamba-130m", format="official")


def test_python_blocks_run(tmp_path, monkeypatch):
    write_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = blocks("python")
    assert len(found) >= 4
    namespace, prompts = {}, []
    for number, block in enumerate(found):
        exec(compile(block, f"README block {number}", "exec"), namespace)
        if "vocab_size=32000" in block:
            assert namespace["logits"].shape == (16, 64, 32000)
        if 'output = model.generate(tokenizer, "' in block:
            prompt = block.split('output = model.generate(tokenizer, "')[1].split('"')[0]
            assert namespace["output"].startswith(prompt)
            prompts.append(prompt)
    # What the original project's README promised.
    assert namespace["x"].shape == (16, 64)
    assert prompts == ["Mamba is a type of", "def min(arr):"]


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
