"""The cases of a GPU, and what runs them, on a machine without one."""

import dataclasses

import pytest
import torch

from mambapy.bench import cases, records, rivals, work
from mambapy.bench.cases_cuda import CUDA
from mambapy.bench.contestants import floor, mamba_py, ours
from mambapy.bench.curves import SWEEPS
from mambapy.bench.measure import Timing
from mambapy.bench.options import Options
from mambapy.bench.process import Run
from mambapy.bench.run import Session
from mambapy.bench.style import STYLES
from mambapy.cli import main

BF16 = {"dtype": "bfloat16"}
SCAN = {"batch": 1, "length": 6, "d_inner": 8, "d_state": 4}
LM = {"batch": 2, "length": 6, "d_model": 16, "d_state": 4, "n_layers": 1, "vocab_size": 20}


@pytest.mark.parametrize("kind", CUDA)
def test_the_table_is_valid(kind):
    found = cases.select(kind, device="cuda")
    assert found == CUDA[kind]
    names = [case.name for case in found]
    assert len({*names}) == len(names)
    assert all(name.startswith(f"{kind}-b") and name.endswith("-bf16") for name in names)
    for case in found:
        assert {*case.contestants} <= {*rivals.WHO} & {*STYLES}
        assert {*case.sweeps} <= {*SWEEPS}
        # A sweep's cases differ in that size alone.
    for sweep in {sweep for case in found for sweep in case.sweeps}:
        points = [case.sizes for case in found if sweep in case.sweeps]
        others = [{k: v for k, v in sizes.items() if k != sweep} for sizes in points]
        assert len(points) > 2
        assert all(other == others[0] for other in others)
    assert cases.select(kind) != found
    assert cases.select(kind, quick=True, device="cuda") == cases.select(kind, quick=True)


def test_the_shapes_of_the_targets():
    scans = [tuple(case.sizes.values())[:4] for case in CUDA["scan"]]
    for shape in (
        (8, 2048, 1536, 16),
        (8, 2048, 5120, 16),
        (1, 32768, 1536, 16),
        (64, 512, 1536, 16),
        (8, 2048, 1536, 64),
    ):
        assert shape in scans
    assert "train-b16-l1024-d768-n16-bf16" in [case.name for case in CUDA["train"]]
    assert [case.sizes["batch"] for case in CUDA["decode"]] == [1, 64, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_one_line(tmp_path, capsys):
    flags = ["--device", "cuda", "--cases", "l256", "--contestants", "auto", "--out", str(tmp_path)]
    assert main(["bench", "scan", *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert "torch finds no CUDA device" in captured.err
    assert not [*tmp_path.iterdir()]


def test_a_fused_scan_is_the_same_for_all(mamba_py_scan):
    sizes = SCAN | {"fused": 1}
    seen = []

    def spy(contestant):
        class Spy:
            @staticmethod
            def scan(sizes, options):
                run = contestant.scan(sizes, options)

                def watched(*inputs):
                    seen.append((inputs, run(*inputs)))
                    return seen[-1][1]

                return watched

        return Spy

    for contestant, options in ((ours, {"backend": "auto"}), (ours, {"backend": "pscan"})):
        passes, _ = work.build(spy(contestant), "scan", sizes, options | BF16, "cpu")
        passes["forward"]()
        passes["training"]()
    passes, _ = work.build(spy(mamba_py), "scan", sizes, BF16, "cpu")
    passes["training"]()
    inputs = seen[0][0]
    assert [T.dtype for T in inputs] == [
        *(torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16),
        *(torch.float32, torch.bfloat16, torch.float32),
    ]
    for _, y in seen:
        assert y.dtype == torch.bfloat16
        assert (y.float() - seen[0][1].float()).abs().max() < 0.1
    facts = work.build(ours, "scan", sizes, {"backend": "auto"} | BF16, "cpu")[1]
    assert facts == {"forward": "cpu", "training": "cpu"}


def test_the_deterministic_one_is_that():
    options = {**rivals.WHO["deterministic"].options} | BF16
    try:
        passes, _ = work.build(ours, "scan", SCAN | {"fused": 1}, options, "cpu")
        assert torch.are_deterministic_algorithms_enabled()
        passes["training"]()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def mamba_py_scan(monkeypatch):
    """mamba.py's block: its scan alone, written as a loop in float32."""

    class Block:
        def __init__(self, config):
            pass

        @staticmethod
        def selective_scan(x, dt, A, B, C, D):
            h = torch.zeros(x.shape[0], x.shape[2], A.shape[1])
            rows = []
            for t in range(x.shape[1]):
                decay = (dt[:, t, :, None] * A).exp()
                h = decay * h + (dt[:, t] * x[:, t])[:, :, None] * B[:, t, None]
                rows.append((h * C[:, t, None]).sum(-1) + D * x[:, t])
            return torch.stack(rows, dim=1)

    monkeypatch.setattr(mamba_py.theirs, "MambaBlock", Block)


@pytest.mark.parametrize("kind", ["block", "train", "decode"])
def test_half_precision(kind):
    sizes = LM | {"tokens": 2, "bandwidth_bytes": 1 << 16}
    options = {"backend": "auto", **BF16}
    for contestant in (floor, ours):
        passes, _ = work.build(contestant, kind, sizes, options, "cpu")
        for run in passes.values():
            run()
    assert torch.get_default_dtype() == torch.float32
    products = work.build(floor, kind, sizes, options, "cpu")[0]
    assert products


def test_records_say_the_dtype():
    case = CUDA["decode"][0]
    timing = Timing.of([0.5, 0.5])
    runs = {"mambapy": Run("mambapy", None, "decode", 1.0)}
    facts = {"mambapy": {"weight_bytes": 100}}
    record = records.make(case, "decode", {"mambapy": timing}, runs, facts)
    assert record["dtype"] == "bfloat16"
    records.add_bandwidth(record, 1e4, 64, facts)
    assert [*record["contestants"]] == ["floor", "mambapy"]
    assert record["contestants"]["floor"]["tokens_per_s"] == 100


def test_a_card_tells_memory_apart_without_a_process_for_each_case():
    case = CUDA["block"][0]
    run = Run("auto", None, "forward", 1.0)
    run.peak_bytes, run.process_bytes = 3, 5
    for one, expected in ((case, 3), (dataclasses.replace(case, on_gpu=False), None)):
        assert not one.fresh
        record = records.make(one, "forward", {"auto": Timing.of([0.5])}, {"auto": run}, {})
        assert record["contestants"]["auto"]["peak_bytes"] == expected


def test_memory_of_the_card_is_the_limit():
    options = Options(kind="scan", device="cuda")
    session = Session(options, rivals.find())
    session.card = {"gpu_memory_bytes": 10 << 30}
    case = next(case for case in CUDA["scan"] if case.sizes["d_state"] == 256)
    assert "the limit is 9.0 GiB" in session._too_large(case, "training", "pscan")
    assert session._too_large(case, "training", "chunked") is None
    assert options.path.name == "cuda-scan.json"
