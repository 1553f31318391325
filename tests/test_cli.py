import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import mambapy
from mambapy.cli import main
from mambapy.train.config import TrainConfig

TINY = [
    *("--d-model=16", "--n-layers=2", "--d-state=4", "--batch-size=4", "--length=32", "--steps=10"),
    *("--warmup=2", "--eval-tokens=256", "--samples=1", "--sample-tokens=8", "--plot=never"),
    "--device=cpu",
]


def start(*args: str, **options: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "mambapy.cli", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def fails(capsys: Any, *args: str) -> str:
    """The one line on stderr of a call that must exit with 2."""
    try:
        status = main(args)
    except SystemExit as error:
        status = error.code  # type: ignore[assignment]
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("mambapy")
    return captured.err


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "book.txt"
    file.write_text("def scan(x):\n    return x + 1\n" * 400)
    return file


@pytest.fixture(scope="module")
def trained(book: Path) -> Path:
    out = book.parent / "run"
    assert main(["train", "--data", str(book), "--out", str(out), "--quiet", *TINY]) == 0
    return out


def test_version(capsys: Any) -> None:
    with pytest.raises(SystemExit) as error:
        main(["--version"])
    assert error.value.code == 0
    assert capsys.readouterr().out == f"mambapy {mambapy.__version__}\n"


@pytest.mark.parametrize("verb", ["train", "generate", "bench", "info"])
def test_help_has_examples(verb: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as error:
        main([verb, "--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert f"examples:\n  mambapy {verb}" in text


def test_every_setting_is_a_flag_with_its_default(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for item in fields(TrainConfig):
        assert f"--{item.name.replace('_', '-')} " in text
    assert "peak learning rate [" in text
    assert "tokens in a sequence [" in text


def test_help_and_version_load_no_torch() -> None:
    code = "import sys, mambapy.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "required: train | generate | convert | bench | info"),
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--stpes", "3"], "unrecognized arguments: --stpes 3"),
        (["train", "--step", "3"], "unrecognized arguments: --step 3"),
        (["train", "--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["train", "--steps", "0"], "steps=0 must be at least 1"),
        (["train", "--schedule", "linear"], "argument --schedule: invalid choice: 'linear'"),
        (["train", "--steps", "3", "--minutes", "1"], "both say how long"),
        (["train", "--config", "gone.toml"], "gone.toml cannot be read"),
        (["train", "--data", "gone.txt", "--out", "OUT"], "gone.txt: no such file or folder"),
        (["train", "--resume", "--out", "OUT"], "holds no run to resume"),
        (["train", "--resume", "--config", "x"], "give flags, not --config"),
        (["train", "--tokenizer", "gone.json", "--out", "OUT"], "gone.json"),
        (["generate"], "required: MODEL"),
        (["generate", "./gone", "--prompt", "x"], "there is no folder ./gone, and no such name"),
        (["generate", "gone", "--seed", "-1"], "argument --seed: -1 must be an integer from 0"),
        (["convert", "a"], "the following arguments are required: DST, --format"),
        (["convert", "a", "b", "--format", "gguf"], "argument --format: invalid choice: 'gguf'"),
        (["convert", "./gone", "OUT", "--format", "hf"], "there is no folder ./gone"),
        (["bench"], "required: scan | block | heads | experts | vision | train | decode | plot"),
        (["bench", "block", "--threads", "0"], "--threads 0 must be at least 1"),
        (["bench", "plot", "--results", "OUT"], "no such folder"),
    ],
)
def test_mistake_is_one_line(args: list[str], message: str, capsys: Any, tmp_path: Path) -> None:
    assert message in fails(capsys, *(str(tmp_path / "o") if a == "OUT" else a for a in args))


def test_train_prints_its_result(book: Path, tmp_path: Path) -> None:
    process = start("train", "--data", str(book), "--out", str(tmp_path / "r"), "--json", *TINY)
    out, err = process.communicate()
    assert process.returncode == 0, err
    result = json.loads(out)
    assert result["step"] == 10
    assert result["final_bpb"] > 0
    assert "10/10 steps" in err
    assert "Traceback" not in err


def test_report_compares_with_xz(book: Path, tmp_path: Path, capsys: Any) -> None:
    out = str(tmp_path / "r")
    assert main(["train", "--data", str(book), "--out", out, "--quiet", *TINY]) == 0
    text = capsys.readouterr().out
    assert "not below the " in text
    assert "of xz -9" in text
    assert f"mambapy generate {out}" in text
    assert text.startswith((Path(out) / "samples.txt").read_text(encoding="utf-8"))


def test_config_file_then_flags(book: Path, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f'data = "{book}"\nlr = 0.5\nseed = 3\n')
    out = tmp_path / "r"
    args = ["train", "--config", str(file), "--lr", "0.25", "--out", str(out), "--quiet"]
    assert main([*args, *TINY]) == 0
    config = json.loads((out / "log.jsonl").read_text().split("\n")[0])["config"]
    assert (config["data"], config["lr"], config["seed"]) == (str(book), 0.25, 3)


def test_second_run_needs_resume_or_overwrite(trained: Path, book: Path, capsys: Any) -> None:
    args = ["train", "--data", str(book), "--out", str(trained)]
    assert "already holds a run" in fails(capsys, *args)
    assert "d_model=99 cannot change" in fails(
        capsys, "train", "--resume", "--out", str(trained), "--d-model", "99"
    )
    resume = ["train", "--resume", "--out", str(trained), "--steps", "12", "--json", "--quiet"]
    assert main(resume) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 12


def test_unwritable_run_folder(book: Path, capsys: Any) -> None:
    assert "cannot be written to" in fails(capsys, "train", "--out", str(book / "run"))


def test_bad_data_is_named(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "photo.jpg"
    file.write_bytes(b"\xff\xd8\0\0" * 100)
    line = fails(capsys, "train", "--data", str(file), "--out", str(tmp_path / "r"))
    assert f"{file} is not text: byte 2 is NUL" in line


def test_generate_continues_a_prompt(trained: Path, capsys: Any) -> None:
    def say(*flags: str) -> str:
        args = ["generate", str(trained), "--prompt", "def ", "--num-tokens", "20", *flags]
        assert main(args) == 0
        return capsys.readouterr().out

    assert say("--seed", "1") == say("--seed", "1")
    assert say("--seed", "1") != say("--seed", "2")
    assert say("--temperature", "0") == say("--temperature", "0", "--seed", "9")
    assert say("--top-k", "1", "--seed", "3") == say("--temperature", "0")
    result = json.loads(say("--json", "--seed", "1"))
    assert result["prompt"] == "def "
    assert result["text"] + "\n" == say("--seed", "1")
    # The file's own path names the checkpoint too.
    file = str(trained / "model.safetensors")
    assert main(["generate", file, "--prompt", "def ", "--num-tokens", "20", "--seed", "1"]) == 0
    assert capsys.readouterr().out == say("--seed", "1")


def test_generate_stops_at_a_text(trained: Path, capsys: Any) -> None:
    args = ["generate", str(trained), "--prompt", "def ", "--num-tokens", "40", "--seed", "1"]
    assert main(args) == 0
    whole = capsys.readouterr().out[:-1]
    assert main([*args, "--stop", whole[5], "--stop", "never this"]) == 0
    assert capsys.readouterr().out == whole[: whole.index(whole[5])] + "\n"


def test_generate_reads_stdin(trained: Path) -> None:
    process = start(
        *("generate", str(trained), "--num-tokens", "8", "--json", "--seed", "0"),
        stdin=subprocess.PIPE,
    )
    out, err = process.communicate("def scan")
    assert process.returncode == 0, err
    assert json.loads(out)["prompt"] == "def scan"
    assert err == ""


def test_generate_asks_on_a_terminal(trained: Path, monkeypatch: Any, capsys: Any) -> None:
    answers = iter(["def ", "return "])

    def answer(_: str) -> str:
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert main(["generate", str(trained), "--num-tokens", "4", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["prompt"] for line in lines if line] == ["def ", "return "]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", "x", "--num-tokens", "0"], "num_tokens=0 must be"),
        (["--prompt", "x", "--top-p", "2"], "top_p=2.0 must be"),
        (["--prompt", "x", "--temperature", "-1"], "temperature=-1.0 must be"),
        (["--prompt", "x", "--stop", ""], "empty stop string"),
        (["--prompt", "x", "--device", "cuda:99"], "device='cuda:99' cannot be used here"),
    ],
)
def test_bad_sampling_is_one_line(
    trained: Path, flags: list[str], message: str, capsys: Any
) -> None:
    assert message in fails(capsys, "generate", str(trained), *flags)


def test_generate_from_a_damaged_checkpoint(trained: Path, tmp_path: Path, capsys: Any) -> None:
    args = ["generate", str(tmp_path), "--prompt", "x"]
    assert str(tmp_path) in fails(capsys, *args)
    (tmp_path / "config.json").write_bytes((trained / "config.json").read_bytes())
    weights = (trained / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "damaged" in fails(capsys, *args)


def test_reader_that_goes_away_is_no_traceback(trained: Path) -> None:
    process = start("generate", str(trained), "--prompt", "def ", "--num-tokens", "100000")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141
    assert err == ""


def test_interrupt_is_130(trained: Path) -> None:
    process = start("generate", str(trained), "--prompt", "def ", "--num-tokens", "100000")
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(2)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err.strip() == "mambapy: interrupted"


def test_info(capsys: Any) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert mambapy.__version__ in text
    assert "selective_scan" in text
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["threads"] >= 1
    assert os.uname().machine in facts["system"]
    rows = [row for row in facts["backends"]["cpu"] if row["op"] == "selective_scan"]
    assert sum(row["chosen"] for row in rows) == 1
    assert all(row["reason"] for row in rows if not row["usable"])


def test_convert_there_and_back(tmp_path: Path, capsys: Any) -> None:
    from mambapy.lm import LM, MambaConfig

    lm = LM(MambaConfig(d_model=8, n_layers=1), 257)
    lm.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.byte").write_text("bytes")
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert main(["convert", a, b, "--format", "official"]) == 0
    printed = capsys.readouterr().out
    for name in ("config.json", "pytorch_model.bin", "tokenizer.byte"):
        assert f"bytes  {tmp_path / 'b' / name}" in printed
    assert main(["convert", b, c, "--format", "hf", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["target"] == c
    assert set(result["files"]) == {"config.json", "model.safetensors", "tokenizer.byte"}
    assert "holds a checkpoint in the format 'hf'" in fails(
        capsys, "convert", a, c, "--format", "official"
    )
    assert main(["generate", c, "--prompt", "x", "--num-tokens", "3", "--dtype", "bfloat16"]) == 0
