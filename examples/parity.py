"""Parity: one layer of Mamba-3 keeps count of a bit, one layer of Mamba-2 does not.

    python examples/parity.py --minutes 2 --out runs/parity

A model reads random bits and says at each whether the ones so far are odd in number. A state that
keeps this changes sign at a 1: Mamba-3's turns by an angle that the token sets, Mamba-2's can only
decay. Accuracy is scaled, so that guessing is 0. Source: Mamba-3 (2026), appendix D.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.nn.functional import cross_entropy

import mambapy
from mambapy.bench.style import BLUE, GREY, RED, clean
from mambapy.lm import LM, Mamba2Config, Mamba3Config
from mambapy.optim import make_optimizer

LENGTHS = (8, 16, 32, 64, 128, 256)
SIZES = {"d_model": 32, "d_state": 64, "d_head": 16, "batch": 32, "longest": 256, "strings": 1024}


def strings(count, length):
    """Random bits (b, l), and at each place whether the ones so far are odd in number (b, l)."""
    bits = torch.randint(2, (count, length))
    return bits, bits.cumsum(1) % 2


def train(config, rate, args):
    """A model after its share of the minutes, and the losses of its steps."""
    torch.manual_seed(args.seed)
    model, losses = LM(config, 2, tie_embeddings=False), []
    optimizer = make_optimizer(model, lr=rate, weight_decay=args.weight_decay)
    seconds, start = 60 * args.minutes / len(args.rates), time.perf_counter()
    while (done := (time.perf_counter() - start) / seconds) < 1:
        # Strings grow, and steps shrink with them: an angle's error adds up along a string.
        longest = 3 * (args.longest / 3) ** min(1, done / 0.6)
        scale = min(1, (len(losses) + 1) / 20, 20 / longest) * (1 + math.cos(math.pi * done)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        bits, odd = strings(args.batch, int(torch.randint(3, int(longest) + 1, ())))
        logits = model(bits).flatten(0, 1)
        loss = cross_entropy(logits, odd.flatten(), label_smoothing=args.smoothing)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def run(config, rate, args):
    """Train a model, and measure it on fresh strings: what the record says of it."""
    model, losses = train(config, rate, args)
    found = {"rate": rate, "seconds": 60 * args.minutes / len(args.rates), "steps": len(losses)}
    found |= {"loss": sum(losses[-50:]) / len(losses[-50:]), "last_place": {}, "all_places": {}}
    torch.manual_seed(args.seed + 1)
    for length in LENGTHS:
        bits, odd = strings(args.strings, length)
        with torch.no_grad():
            guesses = torch.cat([model(part).argmax(-1) for part in bits.split(128)])
        by_place = 2 * (guesses == odd).double().mean(0) - 1  # (l)
        found["last_place"][length] = by_place[-1].item()
        found["all_places"][length] = by_place.mean().item()
    return {**found, "by_place": by_place.tolist()}


def plot(best, longest, path):
    """Draw the accuracy at each place of long strings, and at the last place by length."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.axvline(longest, color=GREY, ls=":", label="longest string in training")
    for (name, found), colour in zip(best.items(), (BLUE, RED), strict=True):
        axes.plot(range(1, LENGTHS[-1] + 1), found["by_place"], color=colour, label=name)
        axes.plot(LENGTHS, [*found["last_place"].values()], "o", color=colour)
    axes.set(title="Parity of random bits, one layer: accuracy by length", ylim=(-1.05, 1.05))
    axes.set(xlabel=f"place in strings of {LENGTHS[-1]} (dots: last place of strings so long)")
    axes.set(ylabel="scaled accuracy (0: guessing)", xticks=[*LENGTHS[2:], 192])
    clean(axes)
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=150)


def main(argv=None):
    """Train both models, print accuracy by length, write the record and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/parity"))
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-3, 1e-2])
    options = {"minutes": 2.0, "weight_decay": 0.1, "smoothing": 0.0, "seed": 0, **SIZES}
    for name, value in options.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    args = parser.parse_args(argv)
    sizes = {name: getattr(args, name) for name in ("d_model", "d_state", "d_head")}
    sizes |= {"n_layers": 1, "expand": 1}
    # dt near 1 allows turns up to pi from the start; softplus lets decays come near none.
    turning = {"rope_fraction": 1, "a_activation": "softplus", "dt_min": 0.1, "dt_max": 1}
    configs = {"Mamba-3": Mamba3Config(**sizes, **turning), "Mamba-2": Mamba2Config(**sizes)}
    runs = {name: [run(c, rate, args) for rate in args.rates] for name, c in configs.items()}
    best = {n: max(tried, key=lambda one: one["all_places"][256]) for n, tried in runs.items()}
    for name, found in best.items():
        row = "  ".join(f"{length}: {a:.1%}" for length, a in found["last_place"].items())
        print(f"{name}, rate {found['rate']:g}, accuracy at the last place by length:  {row}")
    record = {
        "settings": {name: getattr(args, name) for name in ("rates", *options)},
        "configs": {name: config.to_dict() for name, config in configs.items()},
        "threads": torch.get_num_threads(),
        "versions": {"mambapy": mambapy.__version__, "torch": str(torch.__version__)},
        "best": best,
        "runs": runs,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "parity.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    plot(best, args.longest, args.out / "parity.png")


if __name__ == "__main__":
    main()
