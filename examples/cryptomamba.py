"""CryptoMamba: published weights, rebuilt from MambaBlock, give the test errors of their paper.

    python examples/cryptomamba.py DIR

DIR has cmamba_v.ckpt and test.csv: the model with trading volume, and a year of daily Bitcoin
prices. The model takes 14 days and says what the close of the next one is. Its days are channels
and its 6 features are the sequence, in the order of FEATURES; nothing is normalised:

    x (b, 6, 14)  3 times: [4 times x = x + MambaBlock(norm(x)), then a linear layer]  (b, 6, 1)
                  14 -> 16 -> 32 -> 1 channels; at last a linear layer from the 6 features to 1

In the checkpoint no weight of a norm or mixer is above 1e-40: the mixers add exactly nothing, and
the model is affine. So this checks the data, the loading of all weights, the residual path and the
linear layers, but not what a mixer calculates. (To guess an unchanged close gives RMSE 1568.5.)

Source: Sepehri et al. 2024, "CryptoMamba" (arXiv 2501.01010); weights and data are from its
repository, MShahabSepehri/CryptoMamba (MIT licence).
"""

import argparse
import csv
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from mambapy.mamba import MambaBlock, MambaConfig

FEATURES = ("Timestamp", "Open", "High", "Low", "Close", "Volume")
CLOSE, VOLUME = FEATURES.index("Close"), FEATURES.index("Volume")
WINDOW, WIDTHS, LAYERS, D_STATE = 14, (14, 16, 32, 1), 4, 64
# Each with half a unit of its last digit.
PUBLISHED = {"RMSE": (1598.1, 0.05), "MAPE %": (2.034, 0.0005), "MAE": (1120.7, 0.05)}


class Residual(nn.Module):
    """x + MambaBlock(norm(x)), (b, l, d) -> (b, l, d), with the checkpoint's names."""

    def __init__(self, d):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.op = MambaBlock(MambaConfig(d_model=d, n_layers=1, d_state=D_STATE))

    def forward(self, x):
        """Add what the mixer makes of x."""
        return x + self.op(self.norm(x))


class CryptoMamba(nn.Module):
    """The model, (b, 6, 14) -> (b)."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential()
        for d, d_next in pairwise(WIDTHS):
            layers = [Residual(d) for _ in range(LAYERS)]
            self.blocks.append(nn.Sequential(*layers, nn.Linear(d, d_next)))
        self.post_process = nn.Sequential(nn.Flatten(), nn.Linear(len(FEATURES), 1))

    def forward(self, x):
        """The close of the day after each window."""
        return self.post_process(self.blocks(x)).squeeze(-1)


def load_model(path):
    """The published model; a tensor too many, too few or of another shape raises."""
    weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    model = CryptoMamba()
    model.load_state_dict({name.removeprefix("model."): T for name, T in weights.items()})
    return model.eval()


def load_windows(path):
    """Windows (b, 6, 14) of the features, and the close of the day after each (b)."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [[float(row[name]) for name in FEATURES] for row in csv.DictReader(file)]
    days = torch.tensor(rows, dtype=torch.float64)  # (days, 6)
    days[:, VOLUME] /= 1e9
    # One window more would fit; the paper's code leaves it out, and its errors are without it.
    return days[:-2].unfold(0, WINDOW, 1).float(), days[WINDOW:-1, CLOSE]


@torch.no_grad()
def main(argv=None):
    """Print the errors beside the published ones; exit with 1 where they are not the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where cmamba_v.ckpt and test.csv are")
    folder = parser.parse_args(argv).folder
    model, (x, close) = load_model(folder / "cmamba_v.ckpt"), load_windows(folder / "test.csv")
    predictions = model(x)
    e = predictions.double() - close  # (b)
    found = e.square().mean().sqrt(), 100 * (e / close).abs().mean(), e.abs().mean()
    print(f"{len(x)} windows       found   published   tolerance")
    off = []
    for (name, (value, tolerance)), error in zip(PUBLISHED.items(), found, strict=True):
        print(f"{name:11}{error:12.4f}{value:12}{tolerance:12}")
        if not abs(error - value) <= tolerance:
            off.append(name)

    mixers = [module for module in model.modules() if isinstance(module, MambaBlock)]
    largest = max(P.abs().max().item() for mixer in mixers for P in mixer.parameters())
    for mixer in mixers:
        nn.init.zeros_(mixer.out_proj.weight)
    change = (model(x) - predictions).abs().max().item()
    print(f"{len(mixers)} mixers: largest weight {largest:.1e}; without them, change {change:g}")

    if off:
        raise SystemExit(f"not the published errors: {', '.join(off)} differ by over the tolerance")


if __name__ == "__main__":
    main()
