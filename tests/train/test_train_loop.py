import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mambapy.config import MambaConfig
from mambapy.errors import ConfigError, DataError, MissingExtraError, TrainingError
from mambapy.lm import LM
from mambapy.ops.gpu import tuning
from mambapy.train import TrainConfig, plan, report, state, train, trainer
from mambapy.train.plan import CALIBRATION_STEPS, PLANS, VALIDATIONS
from mambapy.train.trainer import Trainer

RUN = """
import json, sys
from mambapy.train import TrainConfig, state, train
settings = json.loads(sys.argv[1])
if sys.argv[2] == "resume":
    train(state.saved_config(settings["out"]), resume=True, quiet=True)
else:
    train(TrainConfig(**settings), quiet=True)
"""


def run(settings: dict[str, Any], **options: Any) -> dict[str, Any]:
    return train(TrainConfig(**settings), quiet=True, **options)


def log_of(settings: dict[str, Any], *keys: str) -> list[tuple[Any, ...]]:
    """These keys of each line of a run's log that has them all."""
    lines = state.read_log(Path(settings["out"]) / "log.jsonl")
    return [tuple(line[k] for k in keys) for line in lines if all(k in line for k in keys)]


def losses(settings: dict[str, Any]) -> list[tuple[Any, ...]]:
    return log_of(settings, "step", "loss", "grad_norm", "lr")


def start(settings: dict[str, Any], how: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", RUN, json.dumps(settings), how])


def wait_for_lines(
    settings: dict[str, Any], count: int, process: "subprocess.Popen[bytes]"
) -> None:
    log = Path(settings["out"]) / "log.jsonl"
    limit = time.monotonic() + 60
    while not log.exists() or log.read_bytes().count(b"\n") < count:
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.002)


def test_a_run_learns_and_leaves_everything(tiny: dict[str, Any]) -> None:
    tiny |= {"steps": 60, "plot": "auto"}
    result = run(tiny)
    out = Path(tiny["out"])
    for name in ("model.safetensors", "config.json", "last.pt", "log.jsonl", "samples.txt"):
        assert (out / name).stat().st_size > 0
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    bpb = [value for (value,) in log_of(tiny, "bpb")]
    assert bpb[0] > 7.5
    assert np.mean(bpb[-5:]) < 4
    assert result["final_bpb"] < 4
    assert result["step"] == 60
    assert result["tokens"] == 60 * 4 * 32
    assert 0 < result["xz_bpb"] < 8
    lines = state.read_log(out / "log.jsonl")
    assert lines[0]["config"] == TrainConfig(**tiny).to_dict()
    assert lines[-1] == {k: v for k, v in result.items() if k not in ("out", "samples")}
    assert "".join(result["samples"]) == (out / "samples.txt").read_text(encoding="utf-8")
    assert [step for step, _ in log_of(tiny, "step", "val_bpb")] == list(range(4, 61, 4))


def test_step_0_has_the_initial_weights(tiny: dict[str, Any], monkeypatch: Any) -> None:
    # trap 52: nothing redraws weights after the model's own initialisation.
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tiny)
    saved = state.read(Path(tiny["out"]))["model"]
    torch.manual_seed(0)
    fresh = LM(MambaConfig(d_model=16, n_layers=2, d_state=4), 257).state_dict()
    assert saved.keys() == fresh.keys()
    assert all(torch.equal(saved[name], fresh[name]) for name in fresh)


def test_the_run_folder_is_not_the_data(tiny: dict[str, Any]) -> None:
    tiny |= {"out": tiny["data"]}
    with pytest.raises(ConfigError, match="own folder"):
        run(tiny)


def test_fewer_steps_than_are_done(tiny: dict[str, Any]) -> None:
    run(tiny)
    for steps in (1, 11):
        config = state.saved_config(tiny["out"], steps=steps)
        with pytest.raises(ConfigError, match=f"steps={steps}: .* at step 12 already"):
            train(config, resume=True, quiet=True)


def test_killed_at_any_moment_it_goes_on_exactly(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny |= {"steps": 60, "eval_interval": 7, "save_interval": 5}
    whole = {**tiny, "out": str(tmp_path / "whole"), "cache": str(tmp_path / "cache")}
    process = start(whole, "start")
    assert process.wait() == 0
    process = start(tiny, "start")
    for lines in (14, 50):
        wait_for_lines(tiny, lines, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process = start(tiny, "resume")
    assert process.wait() == 0
    # Bit for bit, and each step once.
    assert losses(tiny) == losses(whole)
    assert [step for step, *_ in losses(tiny)] == list(range(1, 61))
    assert log_of(tiny, "step", "val_bpb") == log_of(whole, "step", "val_bpb")
    final = ("final_bpb", "best_step", "tokens")
    assert log_of(tiny, *final) == log_of(whole, *final)
    for name in ("model.safetensors", "samples.txt"):
        assert (Path(tiny["out"]) / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_interrupt_saves_after_a_whole_step(tiny: dict[str, Any], monkeypatch: Any) -> None:
    whole = {**tiny, "out": tiny["out"] + "-whole"}
    run(whole)
    step = Trainer.step

    def interrupted(self: Trainer) -> dict[str, Any]:
        if self.run.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Trainer, "step", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"after step 6, saved; `mambapy train --resume"):
        run(tiny)
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    assert state.read(Path(tiny["out"]))["step"] == 6
    train(state.saved_config(tiny["out"]), resume=True, quiet=True)
    assert losses(tiny) == losses(whole)


def test_finished_run_reports_again(tiny: dict[str, Any]) -> None:
    first = run(tiny)
    again = train(state.saved_config(tiny["out"]), resume=True, quiet=True)
    assert again == first
    assert len(log_of(tiny, "final_bpb")) == 1


def test_resumed_run_needs_its_text_no_more(tiny: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_text("some words to learn\n" * 500)
    tiny |= {"data": str(file)}
    run(tiny)
    file.unlink()
    assert train(state.saved_config(tiny["out"], steps=14), resume=True, quiet=True)["step"] == 14
    # Changed text, and the prepared tokens gone.
    file.write_text("other words to learn\n" * 500)
    for entry in (Path(tiny["out"]) / "data").iterdir():
        entry.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="has changed since the run"):
        train(state.saved_config(tiny["out"], steps=16), resume=True, quiet=True)


def test_accumulation_is_the_larger_batch(tiny: dict[str, Any], tmp_path: Path) -> None:
    run({**tiny, "out": str(tmp_path / "a"), "batch_size": 8})
    run({**tiny, "out": str(tmp_path / "b"), "batch_size": 2, "accumulate": 4})
    a = log_of({"out": tmp_path / "a"}, "step", "tokens", "loss")
    b = log_of({"out": tmp_path / "b"}, "step", "tokens", "loss")
    np.testing.assert_allclose(a, b, rtol=1e-4)


def test_checkpointing_changes_no_loss(tiny: dict[str, Any], tmp_path: Path) -> None:
    run({**tiny, "out": str(tmp_path / "a")})
    run({**tiny, "out": str(tmp_path / "b"), "recompute": "block"})
    a, b = (log_of({"out": tmp_path / name}, "loss") for name in "ab")
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_compile(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run(tiny)
    compiled = {**tiny, "out": tiny["out"] + "-compiled", "compile": True, "steps": 3}
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    run({**compiled})
    np.testing.assert_allclose(log_of(compiled, "loss"), log_of(tiny, "loss")[:3], rtol=1e-2)


def test_the_first_step_is_tuned(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = []
    step = Trainer.step

    def seen(self: Trainer) -> None:
        tuned.append(tuning._until > 0)
        step(self)

    monkeypatch.setattr(Trainer, "step", seen)
    run(tiny | {"tune": True, "steps": 3})
    assert tuned == [True, False, False]


def test_autocast_keeps_float32_weights_and_learns(tiny: dict[str, Any]) -> None:
    # trap 13: bfloat16 activations with float32 parameters and moments.
    tiny |= {"steps": 60, "dtype": "bfloat16"}
    result = run(tiny)
    assert result["final_bpb"] < 4
    payload = state.read(Path(tiny["out"]))
    assert {T.dtype for T in payload["model"].values()} == {torch.float32}
    moments = payload["optimizer"]["state"].values()
    assert {m["exp_avg_sq"].dtype for m in moments} == {torch.float32}


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_learning_rates_in_the_log_are_the_schedule(tiny: dict[str, Any], schedule: str) -> None:
    run({**tiny, "schedule": schedule, "decay_fraction": 0.5, "min_lr_ratio": 0.1})
    rates = [lr for (lr,) in log_of(tiny, "lr")]
    assert rates[:2] == [0.005, 0.01]
    assert rates[-1] == pytest.approx(0.001)
    assert (rates[5] == 0.01) == (schedule == "wsd")


def test_minutes_set_the_number_of_steps(tiny: dict[str, Any]) -> None:
    del tiny["steps"], tiny["eval_interval"]
    tiny |= {"minutes": 0.05}
    result = run(tiny)
    payload = state.read(Path(tiny["out"]))
    assert payload["total"] == result["step"] > CALIBRATION_STEPS
    # Three seconds, with a machine that may be busy; never many times as long.
    assert result["seconds"] < 12
    again = train(state.saved_config(tiny["out"]), resume=True, quiet=True)
    assert again["step"] == result["step"]


@pytest.mark.parametrize("quicker", [False, True])
def test_plans_hold_although_validations_and_saves_take_long(
    tiny: dict[str, Any], monkeypatch: Any, quicker: bool
) -> None:
    now = 0.0
    saves, totals, planned_at = [], [], []

    def later(seconds: float, work: Any) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal now
            result = work(*args, **options)
            # The first step compiles.
            now += 30.0 if work is step and args[0].run.step == 1 else seconds
            # So that plans find more steps left than the plan before.
            if work is step and quicker and args[0].run.step > 80:
                now -= 0.4
            return result

        return wrapped

    def planned(self: Trainer) -> None:
        make_plan(self)
        totals.append(self.run.total)
        planned_at.append(self.run.step)

    def saved(run: state.Run, folder: Path) -> None:
        saves.append(run.step)
        save(run, folder)

    step, make_plan, save = Trainer.step, Trainer._plan, state.save
    for module in (trainer, plan):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(Trainer, "step", later(2.0, step))
    monkeypatch.setattr(Trainer, "_plan", planned)
    monkeypatch.setattr(trainer, "nats", later(4.0, trainer.nats))
    monkeypatch.setattr(state, "save", later(6.0, saved))
    del tiny["steps"], tiny["eval_interval"]
    result = run({**tiny, "minutes": 10})
    assert 540 < result["seconds"] < 610
    assert len(totals) == len(PLANS)
    # A plan soon after another would see few steps.
    assert all(b - a > 20 for a, b in itertools.pairwise(planned_at[1:]))
    if not quicker:
        # The first knows nothing of saves yet: a twentieth of the time, and five plans' own.
        assert totals[0] == pytest.approx(totals[-1], rel=0.05 + 5 * 6 / 600)
        assert all(total == pytest.approx(totals[-1], rel=0.02) for total in totals[1:])
    # Of 4 s each, and a tenth of the steps' time.
    assert 10 < len(log_of(tiny, "val_bpb")) <= VALIDATIONS + 2
    # At plans and at the end; beyond these at most a twentieth of the time.
    assert 6 * (len(saves) - len(PLANS) - 2) < 0.05 * result["seconds"]
    assert saves[-1] == result["step"]


def test_a_slow_machine_plans_early_and_a_resumed_run_does_not_time_what_it_compiles(
    tiny: dict[str, Any], monkeypatch: Any
) -> None:
    now, seconds, first, stop_at = 0.0, 30.0, 0.0, 0

    def timed(self: Trainer) -> None:
        nonlocal now, first
        step(self)
        now, first = now + seconds + first, 0.0
        if self.run.step == stop_at:
            signal.raise_signal(signal.SIGINT)

    step = Trainer.step
    for module in (trainer, plan):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(Trainer, "step", timed)
    del tiny["steps"], tiny["eval_interval"]
    assert run({**tiny, "minutes": 3})["step"] == 6
    seconds, first, stop_at = 1.0, 30.0, 300
    tiny |= {"minutes": 10, "out": tiny["out"] + "2"}
    with pytest.raises(KeyboardInterrupt):
        run(tiny)
    # What a new process compiles takes some steps' time, and no more.
    first = 30.0
    result = train(state.saved_config(tiny["out"]), resume=True, quiet=True)
    assert 520 < result["step"] < 560
    assert 570 < result["seconds"] <= 600


def test_the_best_weights_are_known_although_they_are_newer_than_the_last_save(
    tiny: dict[str, Any], monkeypatch: Any
) -> None:
    whole = run(tiny)
    validations = log_of(tiny, "step", "val_bpb")
    # Saved after the first of three validations alone; then the process is gone.
    tiny |= {"out": tiny["out"] + "2", "save_interval": 4}
    save = state.save
    monkeypatch.setattr(state, "save", lambda run, out: save(run, out) if run.step < 5 else None)
    run(tiny)
    monkeypatch.setattr(state, "save", save)
    assert state.read(Path(tiny["out"]))["step"] == 4
    payload = state.read(Path(tiny["out"]))
    again = train(state.saved_config(tiny["out"], steps=6), resume=True, quiet=True)
    assert again["best_step"] == 12
    assert state.read(Path(tiny["out"]))["best"] == min(bpb for _, bpb in validations)
    assert again["final_bpb"] == whole["final_bpb"]
    assert payload["best_step"] == 4


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nan_stops_and_costs_nothing(tiny: dict[str, Any], monkeypatch: Any, what: str) -> None:
    whole = LM.loss
    calls = 0

    def spoilt(self: LM, *args: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = whole(self, *args, **options)
        if calls == 7 and what == "loss":
            return loss * float("nan")
        if calls == 7:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(LM, "loss", spoilt)
    with pytest.raises(TrainingError) as error:
        run(tiny)
    message = str(error.value)
    assert f"{what} is nan at step 7" in message
    assert "a lower --lr (now 0.01)" in message
    assert tiny["out"] in message
    payload = state.read(Path(tiny["out"]))
    assert payload["step"] == 4
    assert all(T.isfinite().all() for T in payload["model"].values())
    assert all(T.isfinite().all() for T in LM.from_pretrained(tiny["out"]).parameters())


def test_folder_with_a_run_is_kept_unless_told_otherwise(tiny: dict[str, Any]) -> None:
    run(tiny)
    out = Path(tiny["out"])
    (out / "notes.txt").write_text("mine")
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(TrainingError, match=r"already holds a run; --resume .* --overwrite"):
        run({**tiny, "seed": 1})
    assert (out / "model.safetensors").read_bytes() == before
    run({**tiny, "seed": 1}, overwrite=True)
    assert (out / "model.safetensors").read_bytes() != before
    assert (out / "notes.txt").read_text() == "mine"
    assert [step for step, *_ in losses(tiny)] == list(range(1, 13))
    with pytest.raises(ConfigError, match="contradict"):
        run(tiny, resume=True, overwrite=True)


def test_unwritable_folder_is_found_before_any_work(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    # Data that would fail, too: it is not looked at.
    settings = {**tiny, "out": str(tmp_path / "file" / "run"), "data": "gone"}
    with pytest.raises(TrainingError, match=r"run folder .*file/run cannot be written to: Not a"):
        run(settings)


def test_device_that_is_not_there(tiny: dict[str, Any]) -> None:
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(ConfigError, match=f"device='{name}' cannot be used here"):
            run({**tiny, "device": name})


def test_missing_matplotlib_never_costs_a_run(tiny: dict[str, Any], monkeypatch: Any) -> None:
    def missing() -> None:
        raise MissingExtraError("matplotlib", "train")

    monkeypatch.setattr(report, "require_matplotlib", missing)
    with pytest.raises(MissingExtraError, match=r"pip install 'mambapy\[train\]'"):
        run({**tiny, "plot": "always"})
    assert not Path(tiny["out"], "last.pt").exists()
    assert run({**tiny, "plot": "auto"})["step"] == 12
    assert not Path(tiny["out"], "loss.png").exists()


def test_samples_follow_their_prompt(tiny: dict[str, Any]) -> None:
    run({**tiny, "sample_prompt": "def mamba", "samples": 2})
    text = (Path(tiny["out"]) / "samples.txt").read_text(encoding="utf-8")
    assert text.count("def mamba") >= 2
    assert "=== 2: the model goes on ===" in text


def test_prompts_come_from_the_held_out_text(tiny: dict[str, Any], corpus: Path) -> None:
    run({**tiny, "samples": 3})
    text = (Path(tiny["out"]) / "samples.txt").read_text(encoding="utf-8")
    prompt = text.split("=== 1: prompt ===\n")[1].split("\n=== 1: the model")[0]
    assert prompt
    assert any(prompt in f.read_text(encoding="utf-8") for f in corpus.iterdir())


def test_no_prompt_is_blank_or_begins_with_a_blank_line() -> None:
    for text, count, expected in (
        (b"1\r\n\r\n  \r\n\f\nsecond\r\nthird\r\n" + 200 * b"-", 1, "second\r\nthird\r\n"),
        (b"no end of a line", 1, "no end of a"),
        (b"word", 1, "word"),
        (b"a\n\n    " + 300 * b"x", 1, "    " + 116 * "x"),
        (b"a\n" + 200 * b" " + b"b c d\n", 1, "a\n"),
        (b"\n\nword\n\n", 2, "word\n"),
    ):
        data: Any = SimpleNamespace(held_out_text=lambda text=text: text)
        assert report._prompts(data, count)[-1].rstrip("\n") == expected.rstrip("\n"), text


def test_progress_and_messages_go_to_stderr(tiny: dict[str, Any], capsys: Any) -> None:
    train(TrainConfig(**tiny))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "40 text files" in captured.err
    assert "12/12 steps" in captured.err
    for word in ("tok/s", "bits/byte", "held-out", "left"):
        assert word in captured.err


def test_a_jamba_logs_and_draws_its_experts(tiny):
    experts = {"n_experts": 4, "router_z_loss": 0.001, "expert_layer_period": 1}
    tiny |= {"model": "jamba", "n_layers": 3, **experts, "expert_layer_offset": 0}
    tiny |= {"accumulate": 2, "plot": "always"}
    run(tiny)
    lines = log_of(tiny, "step", "loss", "aux_loss", "expert_load")
    assert len(lines) == 12
    for _, _, aux, load in lines:
        assert 1.5 < aux < 8
        assert len(load) == 3
        for layer in load:
            assert len(layer) == 4
            # Each token has two experts.
            assert sum(layer) == pytest.approx(2, abs=1e-3)
            assert max(layer) <= 1
    assert (Path(tiny["out"]) / "experts.png").read_bytes().startswith(b"\x89PNG")
    assert lines[-1][1] < lines[0][1] - 0.2
    # What the losses weigh changes what is learned; what is logged as loss is the text's alone.
    heavy = {**tiny, "out": tiny["out"] + "-heavy", "aux_loss": 1.0, "router_z_loss": 0.0}
    run(heavy)
    other = log_of(heavy, "step", "loss", "aux_loss", "expert_load")
    assert other[0][1] == lines[0][1]
    assert other[-1][2] < lines[-1][2]


@pytest.mark.parametrize("model", ["mamba2", "mamba3", "jamba"])
def test_other_architectures_train_and_resume(tiny, monkeypatch, model):
    tiny |= {"model": model, "d_head": 8}
    whole = {**tiny, "out": tiny["out"] + "-whole"}
    run(whole)
    saved = LM.from_pretrained(whole["out"])
    assert saved.model_type == model
    assert saved.config.d_head == 8
    assert losses(whole)[-1][1] < losses(whole)[0][1] - 0.2
    step = Trainer.step

    def interrupted(self):
        if self.run.step == 5:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tiny)
    monkeypatch.setattr(Trainer, "step", step)
    train(state.saved_config(tiny["out"]), resume=True, quiet=True)
    assert losses(tiny) == losses(whole)
