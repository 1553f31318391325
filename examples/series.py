"""CO2 at Mauna Loa from few weeks, far apart: a Regressor that knows how long each gap was.

    python examples/series.py

The record has a number a week from 1958 to 2001. We keep one in eight, drawn at random, as if
somebody came by now and then. From the last 24 kept (almost 4 years) follows the CO2 of 8 weeks
later: all models below say how much it is above the last number they see.

`dt_scale` is the weeks since the number before. Mamba-3's states turn and decay for that long, so
a wave of one year can be kept in step. Beside it: the same model without, or with the gaps as a
second input; and simple rules. Answers before 1985 are for training, those before 1991 chose the
settings (of the linear rules too), the others are the test. 64 draws of the weeks give 64 windows
where one would give one; they are not independent.

To know the gaps halves the error; linear regression on interpolated weeks comes close to that
(test errors 0.77 and 0.82 ppm, with --seed 1 0.84 and 0.86).

Data: Keeling & Whorf, in the package statsmodels (pip install statsmodels).
"""

import argparse
import math
import time

import numpy as np
import torch

from mambapy.heads import Regressor, SeriesModel
from mambapy.lm import Mamba3Config
from mambapy.optim import make_optimizer

try:
    from statsmodels.datasets import co2
except ImportError:
    raise SystemExit("examples/series.py needs statsmodels: pip install statsmodels") from None

SEEN, AHEAD, KEPT = 24, 8, 1 / 8  # numbers in a window, weeks to look ahead, weeks that we keep
TURNING = {"dt_min": 0.05, "dt_max": 0.5, "rope_fraction": 1}


def windows(draws, seed):
    """Numbers above the last one (b, l), gaps in weeks (b, l), answers (b), their years (b)."""
    series = co2.load_pandas().data["co2"]
    values, real = series.to_numpy(), series.notna().to_numpy()
    random, rows = np.random.default_rng(seed), []
    for _ in range(draws):
        weeks = np.flatnonzero(real & (random.random(len(values)) < KEPT))
        for end in range(SEEN + 1, len(weeks) + 1):
            seen, answer = weeks[end - SEEN : end], weeks[end - 1] + AHEAD
            if answer < len(values) and real[answer]:
                gaps, last = np.diff(weeks[end - SEEN - 1 : end]), values[seen[-1]]
                year = series.index[answer].year
                rows.append((values[seen] - last, gaps, values[answer] - last, year))
    return tuple(torch.tensor(np.array(part)).float() for part in zip(*rows, strict=True))


def on_every_week(x, gaps):
    """The windows (b, l) with lines drawn between their numbers, at each of 172 weeks (b, 172)."""
    times = gaps.flip(1).cumsum(1).flip(1) - gaps  # weeks before the last number
    weeks = np.arange(-int(0.9 * SEEN / KEPT) + 1, 1)
    pairs = zip(-times.numpy(), x.numpy(), strict=True)
    return torch.tensor(np.stack([np.interp(weeks, *pair) for pair in pairs])).float()


def linear(features, y, parts, error):
    """Ridge regression, its strength the best of five by the validation part."""
    train = parts["train"]
    mean, std = features[train].mean(0), features[train].std(0).clamp(min=1e-6)
    F = torch.cat(((features - mean) / std, torch.ones(len(y), 1)), dim=1).double()
    gram, right = F[train].mT @ F[train], F[train].mT @ y[train].double()
    eye = torch.eye(len(gram)).double()
    tried = [F @ torch.linalg.solve(gram + s * eye, right) for s in (0.01, 1, 10, 100, 1000)]
    return min(tried, key=lambda guess: error(guess, "validation"))


def train(x, dt_scale, y, rows, args):
    """What a trained Regressor says of all windows (b)."""
    torch.manual_seed(args.seed)
    config = Mamba3Config(d_model=args.d_model, n_layers=2, d_state=8, d_head=16, **TURNING)
    model = Regressor(SeriesModel(config, d_input=x.shape[-1]))
    optimizer = make_optimizer(model, lr=1e-2)
    for step in range(args.steps):
        for group in optimizer.param_groups:
            decay = (1 + math.cos(math.pi * step / args.steps)) / 2
            group["lr"] = 1e-2 * min(1, (step + 1) / 50) * decay
        chosen = rows[torch.randint(len(rows), (64,))]
        gaps = None if dt_scale is None else dt_scale[chosen]
        loss = (model(x[chosen], dt_scale=gaps)[:, 0] - y[chosen] / 2).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        parts = torch.arange(len(x)).split(512)
        guess = [model(x[p], dt_scale=None if dt_scale is None else dt_scale[p]) for p in parts]
    return 2 * torch.cat(guess)[:, 0]


def main(argv=None):
    """Train, and print the errors of all on the same windows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in {"steps": 500, "draws": 64, "d_model": 32, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # more of them only wait for each other in a model so small
    x, gaps, y, year = windows(args.draws, args.seed)
    parts = {"train": year < 1985, "validation": (year >= 1985) & (year < 1991)}
    parts["test"] = year >= 1991
    rows = parts["train"].nonzero()[:, 0]

    def error(guess, part):
        return (guess - y)[parts[part]].square().mean().sqrt().item()

    def show(name, guess):
        print(f"{name:45}", *(f"{error(guess, part):10.2f}" for part in parts), flush=True)

    weekly, start = on_every_week(x, gaps), time.perf_counter()
    print(f"{'root mean square error, ppm':45}", *(f"{part:>10}" for part in parts))
    show("the last number", torch.zeros_like(y))
    show("the change a year ago", weekly[:, AHEAD - 53] - weekly[:, -53])
    show("linear, numbers and gaps", linear(torch.cat((x, gaps), 1), y, parts, error))
    show("linear, numbers interpolated to every week", linear(weekly, y, parts, error))
    numbers = x[:, :, None] / 8
    both = torch.cat((numbers, gaps[:, :, None] / 32), dim=2)
    show("Mamba-3 without gaps", train(numbers, None, y, rows, args))
    show("Mamba-3, gaps as a second input", train(both, None, y, rows, args))
    show("Mamba-3, gaps as dt_scale", train(numbers, gaps, y, rows, args))
    print(f"windows: {len(rows)} to train, {int(parts['test'].sum())} to test; ", end="")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
