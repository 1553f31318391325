from types import SimpleNamespace

import pytest
import torch

from mambapy.ops.gpu import backend

X = torch.ones(2, 3, 4)


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    """As if Triton were installed, and no interpreter asked for."""
    monkeypatch.setattr(backend, "HAS_TRITON", True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def on_card(monkeypatch, major, minor):
    card = SimpleNamespace(name="a card", major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    return SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)


def test_cpu(monkeypatch):
    assert backend.refuses_triton(X) == "it needs a CUDA device, x is on cpu"
    assert backend.refuses_triton(X.to("meta")) == "it needs a CUDA device, x is on meta"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.refuses_triton(X) is None
    assert backend.refuses_triton(X.to("meta")) == "it needs a CUDA device, x is on meta"


def test_card(monkeypatch):
    assert backend.refuses_triton(on_card(monkeypatch, 8, 0)) is None
    assert "7.5: it needs 8.0" in backend.refuses_triton(on_card(monkeypatch, 7, 5))


def test_triton(monkeypatch):
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    assert backend.refuses_triton(X) == "triton is not installed"


def test_float64(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "float64" in backend.refuses_triton(X.double())
    assert "float64" in backend.refuses_triton(X, X.double())
    assert "float64" in backend.refuses_triton(X, None, state=X.double())
    assert backend.refuses_triton(X, None, state=X, seq_idx=X[..., 0].long()) is None


def test_norm(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.refuses_norm(X) == "it needs a weight"
    assert backend.refuses_norm(X, X[0, 0]) is None
    assert "at most 16384" in backend.refuses_norm(X[..., :1].expand(-1, -1, 20000), X[0, 0])
