"""Which digit is it? A small Vision Mamba and a vision transformer learn to read, on real images.

    python examples/image_classification.py --out runs/digits

There are 1797 digits of 8 x 8 pixels, in the package scikit-learn (pip install scikit-learn). A
fifth of each class is held out, the same at each --seed; settings were chosen with --validate,
which holds out a fifth of the rest instead. Both models see 16 patches of 2 x 2 pixels, and are
trained by the same loop on images that are shifted, turned and stretched a little, never flipped.

One image held out is 0.3 %: a difference of two or three says nothing. The 13 people who wrote the
digits are in both parts; those of strangers are harder to read.

Your own images, a folder for each class (pip install pillow):

    python examples/image_classification.py --data DIR --size 32 --channels 3 --patch 4
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample
from tqdm import tqdm

import mambapy
from mambapy.bench.style import INK, RED
from mambapy.optim import make_optimizer
from mambapy.vim import VimConfig, VisionMamba

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
NAMES = {"vim": "VisionMamba", "vit": "ViT"}
OPTIONS = {"size": 8, "channels": 1, "patch": 2, "d_model": 64, "depth": 5, "d_state": 16}
OPTIONS |= {"steps": 1500, "batch": 64, "rate": 2e-3, "weight_decay": 0.1, "smoothing": 0.1}
OPTIONS |= {"drop_path": 0.1, "turn": 12.0, "stretch": 0.12, "shift": 0.12, "seed": 0}


class ViT(nn.Module):
    """A plain vision transformer, (b, c, H, W) -> (b, classes): the mean of its patches decides."""

    def __init__(self, config, depth):
        super().__init__()
        rows, columns = config.grid_of(*config.img_size)
        d = config.embed_dim
        self.patch_embed = nn.Conv2d(config.in_chans, d, config.patch_size, config.stride)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, rows * columns, d))
        kinds = {"activation": "gelu", "batch_first": True, "norm_first": True}
        layer = (nn.TransformerEncoderLayer(d, 4, 4 * d, 0.1, **kinds) for _ in range(depth))
        self.layers, self.norm = nn.Sequential(*layer), nn.LayerNorm(d)
        self.head = nn.Linear(d, config.num_classes)

    def forward(self, images):
        """Logits of the classes."""
        x = self.patch_embed(images).flatten(2).mT + self.pos_embed  # (b, patches, d)
        return self.head(self.norm(self.layers(x)).mean(1))


def make(kind, config):
    """A model of that kind: the ViT as deep as has about as many parameters as the other."""
    model = VisionMamba(config)
    if kind == "vit":
        one, two = (count(ViT(config, depth)) for depth in (1, 2))
        model = ViT(config, max(1, 1 + round((count(model) - one) / (two - one))))
    return model


def count(model):
    """How many parameters a model has."""
    return sum(p.numel() for p in model.parameters())


def digits():
    """Images (n, 1, 8, 8) from 0 to 1, their labels (n), the names of the classes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("the digits need scikit-learn: pip install scikit-learn") from None
    data = load_digits()
    images = torch.tensor(data.images).float()[:, None] / 16
    return images, torch.tensor(data.target).long(), [str(n) for n in data.target_names]


def folder(root, size, channels):
    """The same of a folder with one folder of images for each class."""
    try:
        from PIL import Image
    except ImportError:
        raise SystemExit("--data needs Pillow: pip install pillow") from None
    names = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    images, labels = [], []
    for label, name in enumerate(names):
        for path in sorted((root / name).rglob("*")):
            if path.suffix.lower() in SUFFIXES:
                with Image.open(path) as file:
                    pixels = file.convert({1: "L", 3: "RGB"}[channels]).resize((size, size))
                raw = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8)
                images.append(raw.view(size, size, channels).movedim(2, 0) / 255)
                labels.append(label)
    if len(set(labels)) < 2:
        raise SystemExit(f"--data {root}: want at least two folders with images in them")
    return torch.stack(images), torch.tensor(labels), names


def split(labels, seed):
    """Rows to train and rows held out: of each class a fifth, drawn at random."""
    random, parts = torch.Generator().manual_seed(seed), ([], [])
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=random)]
        cut = max(1, round(len(rows) / 5))
        parts[0].append(rows[cut:])
        parts[1].append(rows[:cut])
    return torch.cat(parts[0]), torch.cat(parts[1])


def disturb(images, args):
    """Each image (b, c, H, W) turned, stretched and shifted by its own random amounts."""
    amounts = 2 * torch.rand(5, len(images)) - 1
    angle = amounts[0] * math.radians(args.turn)
    wide, high = 1 + args.stretch * amounts[1:3]
    right, down = 2 * args.shift * amounts[3:]
    rows = (wide * angle.cos(), -high * angle.sin(), right)
    rows += (wide * angle.sin(), high * angle.cos(), down)
    grid = affine_grid(torch.stack(rows, 1).view(-1, 2, 3), images.shape, align_corners=False)
    return grid_sample(images, grid, align_corners=False)


def train(kind, model, images, labels, normal, args):
    """Train a model on these images (n, c, H, W), by AdamW with a cosine schedule."""
    if kind == "vim":
        optimizer = make_optimizer(model, lr=args.rate, weight_decay=args.weight_decay)
    else:  # the matrices of torch's transformer have names of their own
        groups = {True: [], False: []}
        for parameter in model.parameters():
            groups[parameter.dim() in (2, 4)].append(parameter)
        groups = [{"params": groups[True]}, {"params": groups[False], "weight_decay": 0}]
        decay = args.weight_decay
        optimizer = torch.optim.AdamW(groups, args.rate, betas=(0.9, 0.95), weight_decay=decay)
    for step in tqdm(range(args.steps), desc=NAMES[kind]):
        scale = min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / args.steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = args.rate * scale
        chosen = torch.randint(len(images), (args.batch,))
        logits = model(normal(disturb(images[chosen], args)))
        loss = cross_entropy(logits, labels[chosen], label_smoothing=args.smoothing)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
