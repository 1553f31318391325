"""A step whose numbers are read later, as on a GPU; here on a CPU, where that changes nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mambapy.config import JambaConfig, MambaConfig
from mambapy.errors import ConfigError, TrainingError
from mambapy.lm import LM
from mambapy.optim import make_optimizer
from mambapy.train import TrainConfig, state, train, trainer
from mambapy.train.graph import make_update, refuses
from mambapy.train.readback import Readback
from mambapy.train.trainer import Trainer
from mambapy.train.update import Update
from tests.train.test_train_loop import log_of, losses, run

MAMBA = MambaConfig(d_model=8, n_layers=2, d_state=4)


def make(config: Any = MAMBA, check: Any = None, **settings: Any) -> Update:
    torch.manual_seed(0)
    model = LM(config, 21)
    settings = {"batch_size": 2, "length": 6, "grad_clip": 1.0, "lr": 1e-2} | settings
    optimizer = make_optimizer(model, lr=1e-2)
    return Update(model, optimizer, TrainConfig(**settings), check)


def state_of(update: Update) -> list[torch.Tensor]:
    """Copies of all that a step changes."""
    moments = [T for values in update.optimizer.state.values() for T in values.values()]
    return [T.detach().clone() for T in (*update.model.parameters(), *moments)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "lag_of", lambda device: 2)


@pytest.mark.usefixtures("deferred")
def test_a_run_is_the_same_to_the_bit(tiny: dict[str, Any], tmp_path: Path) -> None:
    run(tiny)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "lag_of", lambda device: 0)
        at_once = {**tiny, "out": str(tmp_path / "at once")}
        run(at_once)
    assert losses(tiny) == losses(at_once)
    assert log_of(tiny, "step", "val_bpb") == log_of(at_once, "step", "val_bpb")
    weights = [(Path(s["out"]) / "model.safetensors").read_bytes() for s in (tiny, at_once)]
    assert weights[0] == weights[1]
    # Resumed in the middle, too.
    train(state.saved_config(tiny["out"], steps=14), resume=True, quiet=True)
    assert [step for step, *_ in losses(tiny)] == list(range(1, 15))


@pytest.mark.usefixtures("deferred")
def test_routers_in_the_log(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny |= {"model": "jamba", "n_layers": 2, "n_experts": 3, "steps": 4, "samples": 0}
    run(tiny)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "lag_of", lambda device: 0)
        run({**tiny, "out": str(tmp_path / "at once")})
    keys = ("step", "loss", "aux_loss", "expert_load")
    assert log_of(tiny, *keys) == log_of({"out": tmp_path / "at once"}, *keys)
    assert len(log_of(tiny, *keys)) == 4


@pytest.mark.usefixtures("deferred")
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nan_is_found_later_and_costs_nothing(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    whole, calls, trainers = LM.loss, [], []

    def spoilt(self: LM, *args: Any, **options: Any) -> torch.Tensor:
        loss = whole(self, *args, **options)
        calls.append(1)
        if len(calls) == 5 and what == "loss":
            return loss * float("nan")
        if len(calls) == 5:
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    step = Trainer.step

    def watched(self: Trainer) -> None:
        trainers.append((self, state_of(self.update)))  # type: ignore[arg-type]
        step(self)

    monkeypatch.setattr(LM, "loss", spoilt)
    monkeypatch.setattr(Trainer, "step", watched)
    with pytest.raises(TrainingError, match=f"{what} is nan at step 5"):
        run({**tiny, "eval_interval": 8})
    # Two steps later; from the fifth on, nothing has changed.
    assert len(trainers) == 7
    last, before = trainers[4]
    assert same(state_of(last.update), before)  # type: ignore[arg-type]
    assert state.read(Path(tiny["out"]))["step"] == 0


def test_a_spoilt_step_and_all_after_it_change_nothing() -> None:
    update = make()
    windows = torch.randint(21, (2, 7))
    assert update(windows, 1e-2).isfinite().all()
    before = state_of(update)
    loss = update.loss
    update.loss = lambda *args: loss(*args) * float("inf")
    numbers = update(windows, 1e-2)
    assert not numbers.isfinite().all()
    assert same(state_of(update), before)
    update.loss = loss
    assert update(windows, 1e-2).isfinite().all()
    assert same(state_of(update), before)


def test_numbers_are_read_in_order_and_may_be_overwritten() -> None:
    queue, numbers, seen = Readback(torch.device("cpu"), 2), torch.zeros(2), []
    for step in range(5):
        numbers.fill_(step)
        queue.push(step, numbers)
        seen.append(list(queue.pop()))
    assert seen == [[], [], *([(step, [step, step])] for step in range(3))]
    assert list(queue.pop(everything=True)) == [(3, [3, 3]), (4, [4, 4])]
    assert not list(queue.pop(everything=True))


def test_reasons_against_a_graph() -> None:
    def never(loss: float, norm: float) -> None:
        """A check."""

    assert refuses(make()) == "it needs a CUDA device, not cpu"
    experts = JambaConfig(d_model=8, n_layers=2, d_intermediate=8, n_heads=1, n_experts=2)
    cases = [
        (make(experts), "experts read back how many tokens each of them has"),
        (make(check=never), "every step is checked by the host"),
        (make(), None),
        (make(recompute="scan"), None),
    ]
    for update, reason in cases:
        update.device = torch.device("cuda")
        assert refuses(update) == reason
    update = make(recompute="block")
    update.device = torch.device("cuda")
    update.model.backbone.layers[1].drop_path = 0.1  # type: ignore[attr-defined]
    assert "dropout" in str(refuses(update))
    update = make()
    update.device = torch.device("cuda")
    update.optimizer.param_groups[0]["fused"] = False
    assert refuses(update) == "AdamW is not the fused one"


def test_a_graph_on_a_cpu(tiny: dict[str, Any]) -> None:
    update, told = make(), []
    for choice in ("auto", "never"):
        config = TrainConfig(cuda_graph=choice)
        assert make_update(update, config, told.append) is update
    assert not told
    with pytest.raises(ConfigError, match="cuda_graph='always' cannot be: it needs a CUDA device"):
        run({**tiny, "cuda_graph": "always"})


def test_what_cannot_be_recorded_is_told() -> None:
    update, told = make(check=lambda loss, norm: None), []
    update.device = torch.device("cuda")
    assert make_update(update, TrainConfig(), told.append) is update
    assert told == ["every step is checked by the host"]
