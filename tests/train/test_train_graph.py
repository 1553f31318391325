"""The recording of a step, with a stand-in for CUDA: what is recorded runs when it is played."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from mambapy.errors import ConfigError
from mambapy.train import TrainConfig
from mambapy.train import graph as module
from mambapy.train.graph import WARM_UP, GraphedUpdate, make_update
from tests.train.test_train_update import make, same, state_of

WINDOWS = torch.randint(21, (2, 7), generator=torch.Generator().manual_seed(0))


class Stream:
    """A stream that has nothing to wait for."""

    def __init__(self, device: Any = None) -> None:
        self.device = device

    def wait_stream(self, other: "Stream") -> None:
        """Nothing."""


class Graph:
    """What was recorded: a function that is called again."""

    played = 0

    def replay(self) -> None:
        Graph.played += 1
        self.numbers.copy_(self.run())


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand-ins for the parts of torch.cuda that a recording needs."""
    about: dict[str, Any] = {"error": None, "capturable": []}

    @contextmanager
    def record(graph: Graph, pool: None, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        # What is recorded does not run.
        update = about["update"]
        before = state_of(update)
        about["capturable"].append([g["capturable"] for g in update.optimizer.param_groups])
        yield
        if about["error"]:
            for T, was in zip(everything(update), before, strict=True):
                T.data.copy_(was)
            raise about["error"]
        for T, was in zip(everything(update), before, strict=True):
            T.data.copy_(was)
        graph.run = lambda: update.run(about["graphed"]._windows)  # type: ignore[attr-defined]
        graph.numbers = about["graphed"]._numbers  # type: ignore[attr-defined]

    for name, value in {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": record,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda device: Stream(),
        "synchronize": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda T: T)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda T, stream: None)
    monkeypatch.setattr(module, "refuses", lambda update: None)
    Graph.played = 0
    return about


def everything(update: Any) -> list[torch.Tensor]:
    """All that a step changes."""
    moments = [T for values in update.optimizer.state.values() for T in values.values()]
    return [*update.model.parameters(), *moments]


def graphed(card: dict[str, Any], tell: Any = None, **settings: Any) -> GraphedUpdate:
    card["update"] = make(**settings)
    card["graphed"] = GraphedUpdate(card["update"], tell or pytest.fail)
    return card["graphed"]


def test_numbers_and_weights_are_those_of_single_steps(card: dict[str, Any]) -> None:
    alone, run = make(), graphed(card)
    for step in range(WARM_UP + 4):
        lr = float(np.float32(1e-2 / (step + 1)))
        assert torch.equal(alone(WINDOWS + step % 2, lr), run(WINDOWS + step % 2, lr).clone())
    assert Graph.played == 4
    assert same(state_of(alone), state_of(run.update))
    # AdamW counts on the device while it is recorded, and warns of that at any other time.
    assert card["capturable"] == [[True, True]]
    assert not any(g["capturable"] for g in run.update.optimizer.param_groups)


def test_what_cannot_be_recorded_goes_on_step_by_step(card: dict[str, Any]) -> None:
    told: list[str] = []
    alone, run = make(), graphed(card, told.append)
    card["error"] = RuntimeError("operation not permitted\nand more lines")
    for _ in range(WARM_UP + 3):
        assert torch.equal(alone(WINDOWS, 0.25), run(WINDOWS, 0.25))
    assert told == ["operation not permitted"]
    assert Graph.played == 0
    assert same(state_of(alone), state_of(run.update))


def test_always_raises_where_it_cannot(card: dict[str, Any]) -> None:
    update = make()
    run = make_update(update, TrainConfig(cuda_graph="always"), pytest.fail)
    assert isinstance(run, GraphedUpdate)
    card |= {"update": update, "graphed": run, "error": RuntimeError("not permitted")}
    for _ in range(WARM_UP):
        run(WINDOWS, 1e-2)
    with pytest.raises(ConfigError, match="cannot be: not permitted; 'auto' goes on without"):
        run(WINDOWS, 1e-2)
