"""A Jamba with experts beside a dense one with as many active parameters, on the same text.

    python benchmarks/jamba.py book.txt.xz --runs runs/jamba

Every block of the first has 8 experts, of which a token goes through 2; every block of the second
has one MLP of twice an expert's width. Each trains for the same minutes. A run that is finished in
its folder is taken as it is. Writes results/jamba.json, and docs/images/jamba.png and
jamba_experts.png.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from mambapy.bench.machine import facts
from mambapy.bench.style import BLUE, ORANGE, clean
from mambapy.train import TrainConfig, state, train

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs" / "images"
SIZES = {"d_model": 128, "n_layers": 4, "expert_layer_period": 1, "expert_layer_offset": 0}
RUNS = {
    "moe": {"n_experts": 8, "top_k": 2, "d_intermediate": 256},
    "dense": {"n_experts": 1, "top_k": 1, "d_intermediate": 512},
}
NAMES = {"moe": "2 of 8 experts", "dense": "dense, as many active parameters"}


def finished(folder: Path) -> bool:
    """Whether a run's log has its last line."""
    log = folder / state.LOG
    return log.is_file() and any("final_bpb" in line for line in state.read_log(log))


def summary(folder: Path) -> dict[str, Any]:
    """What is kept of a run: settings, held-out losses, and the loads of the last tenth."""
    lines = state.read_log(folder / state.LOG)
    loads = [line["expert_load"] for line in lines if "expert_load" in line]
    last = loads[-max(1, len(loads) // 10) :]
    mean = [
        [sum(e) / len(last) for e in zip(*layer, strict=True)] for layer in zip(*last, strict=True)
    ]
    end = next(line for line in lines if "final_bpb" in line)
    kept = ("final_bpb", "step", "tokens", "seconds", "parameters")
    return {
        **{name: end[name] for name in kept},
        "held_out": [[line["tokens"], line["val_bpb"]] for line in lines if "val_bpb" in line],
        "load": [[round(share, 3) for share in layer] for layer in mean],
    }


def draw(runs: dict[str, Any], path: Path) -> None:
    """Held-out loss over tokens of both."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for (name, run), color in zip(runs.items(), (BLUE, ORANGE), strict=True):
        points = zip(*run["held_out"], strict=True)
        axes.plot(*points, color=color, marker=".", label=NAMES[name])
    axes.set(xlabel="tokens trained on", ylabel="held-out text, bits per byte", ylim=(2, 3.5))
    axes.legend(frameon=False)
    clean(axes)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train both where they are not trained, then write what they gave."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="a text to train on")
    parser.add_argument("--runs", type=Path, default=Path("runs/jamba"), help="folder of the runs")
    parser.add_argument("--minutes", type=float, default=3.0)
    args = parser.parse_args()
    for name, sizes in RUNS.items():
        options = {**SIZES, **sizes, "data": args.data, "minutes": args.minutes, "lr": 2e-3}
        options |= {"out": str(args.runs / name), "cache": str(args.runs / "data"), "samples": 1}
        if not finished(args.runs / name):
            train(TrainConfig(model="jamba", **options))
    runs = {name: summary(args.runs / name) for name in RUNS}
    machine = facts(torch.get_num_threads(), None)
    result = {"machine": machine, "sizes": SIZES, "options": RUNS, "runs": runs}
    text = json.dumps(result, indent=1)
    (HERE / "results" / "jamba.json").write_text(text + "\n", encoding="utf-8")
    draw(runs, IMAGES / "jamba.png")
    shutil.copyfile(args.runs / "moe" / "experts.png", IMAGES / "jamba_experts.png")


if __name__ == "__main__":
    main()
