"""What a finished run leaves to look at: loss.png, samples.txt, and experts.png of a Jamba."""

import importlib.util
import re
from pathlib import Path

import numpy as np

from mambapy.checkpoints import atomic_write
from mambapy.errors import MissingExtraError
from mambapy.lm import LM
from mambapy.tokenizer import Tokenizer
from mambapy.train.config import TrainConfig
from mambapy.train.data import Dataset
from mambapy.train.state import read_log

# Longest prompt taken from the held-out text, in bytes.
_PROMPT_BYTES = 120
_LINE_END = re.compile(rb"\n(?:[^\S\n]*\n)*")


def require_matplotlib() -> None:
    """Raise MissingExtraError unless matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "train")


def write_plot(log: Path, path: Path) -> None:
    """Draw training and held-out loss, in bits per byte over tokens, from a run's log.

    Raises:
        MissingExtraError: matplotlib is not installed.
        CheckpointError: the picture cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    lines = read_log(log)
    train = [(line["tokens"], line["bpb"]) for line in lines if "bpb" in line]
    held_out = [(line["tokens"], line["val_bpb"]) for line in lines if "val_bpb" in line]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="0.75", linewidth=0.8, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="C0", marker=".", label="held out")
    for line in lines:
        if "final_bpb" in line:
            label = f"best weights, all held-out text: {line['final_bpb']:.3f}"
            at = line["tokens"] * line["best_step"] / line["step"]
            axes.plot([at], [line["final_bpb"]], "o", color="C3", label=label)
            label = f"xz -9 of it: {line['xz_bpb']:.3f}"
            axes.axhline(line["xz_bpb"], color="C2", linestyle="--", label=label)
    axes.set(xlabel="tokens trained on", ylabel="bits per byte", ylim=(0, None))
    if held_out:
        # The first steps are off the scale of everything after them.
        values = [*(bpb for _, bpb in held_out), *(line.get("xz_bpb", 0) for line in lines)]
        axes.set_ylim(0, 1.1 * max(values))
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def write_load_plot(log: Path, path: Path) -> None:
    """Draw how many tokens went to each expert over the run, a picture for each layer.

    Raises:
        MissingExtraError: matplotlib is not installed.
        CheckpointError: the picture cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    lines = [line for line in read_log(log) if "expert_load" in line]
    if not lines:
        return
    loads = np.array([line["expert_load"] for line in lines])  # (steps, layers, experts)
    figure = Figure(figsize=(8, 1 + 1.6 * loads.shape[1]), layout="constrained")
    even = loads[0].sum(axis=1)[0] / loads.shape[2]
    for i in range(loads.shape[1]):
        axes = figure.add_subplot(loads.shape[1], 1, i + 1)
        ends = (lines[0]["tokens"], lines[-1]["tokens"])
        picture = axes.imshow(
            loads[:, i].T / even,
            aspect="auto",
            origin="lower",
            interpolation="nearest",
            extent=(*ends, -0.5, loads.shape[2] - 0.5),
            vmin=0,
            vmax=2,
            cmap="RdBu_r",
        )
        axes.set(ylabel=f"{i + 1}. layer\nwith experts", yticks=range(loads.shape[2]))
        if i + 1 < loads.shape[1]:
            axes.set_xticklabels([])
    axes.set_xlabel("tokens trained on")
    figure.colorbar(picture, ax=figure.axes, label="load of an expert / even load")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def write_samples(
    model: LM, tokenizer: Tokenizer, data: Dataset, config: TrainConfig, path: Path
) -> list[str]:
    """Write the run's samples, each after its prompt, and return them.

    Raises:
        CheckpointError: the file cannot be written.
    """
    count = config.samples
    prompts = [config.sample_prompt] * count if config.sample_prompt else _prompts(data, count)
    texts: list[str] = []
    for i, prompt in enumerate(prompts):
        pieces = model.generate_stream(
            tokenizer,
            prompt,
            num_tokens=config.sample_tokens,
            temperature=config.sample_temperature,
            top_k=config.sample_top_k,
            seed=config.seed + i,
        )
        texts.append(
            f"=== {i + 1}: prompt ===\n{prompt}\n=== {i + 1}: the model goes on ===\n"
            f"{''.join(pieces)}\n\n"
        )
    with atomic_write(path) as temporary:
        Path(temporary).write_text("".join(texts), encoding="utf-8")
    return texts


def _prompts(data: Dataset, count: int) -> list[str]:
    """Lines spread over the held-out text, a few each; none begins with a blank line."""
    text = data.held_out_text()
    prompts = []
    for i in range(count):
        end = _LINE_END.search(text, i * len(text) // count)
        start = end.end() if end else 0
        piece = text[start : start + _PROMPT_BYTES]
        if not piece.strip():
            piece = text.lstrip()[:_PROMPT_BYTES]
        # Without the last line, or word, which is cut.
        for whole in (piece.rfind(b"\n") + 1, piece.rfind(b" ")):
            if piece[: max(whole, 0)].strip():
                piece = piece[:whole]
                break
        prompts.append(piece.decode("utf-8", errors="ignore"))
    return prompts
