"""Learning per second on tinyshakespeare: nanoGPT's recipe for a CPU, then Mamba in the same time.

    python benchmarks/shakespeare.py tinyshakespeare.txt

The first nine tenths are trained on, the last tenth is held out, as nanoGPT splits them. First the
transformer of nanoGPT's README ("I only have a macbook") trains for its 2000 steps, and its seconds
are taken; then `mambapy train --preset shakespeare` gets those seconds, its own validations
included. Both are judged on the whole held-out tenth, in nats per character.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import mambapy
from mambapy.bench.machine import facts
from mambapy.layers import QUANTIZED
from mambapy.lm import LM
from mambapy.tokenizer import ByteTokenizer
from mambapy.train import TrainConfig, train
from mambapy.train.validation import nats

# nanoGPT, config/train_shakespeare_char.py with the flags of its README's CPU example.
BATCH, LENGTH, WIDTH, HEADS, LAYERS, STEPS = 12, 64, 128, 4, 4, 2000
PEAK, LAST, WARMUP, BETAS, DECAY, CLIP = 1e-3, 1e-4, 100, (0.9, 0.99), 0.1, 1.0


class Block(nn.Module):
    """Attention and MLP, each with a norm before it and a residual around it."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, bias=False) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, l, d) to (b, l, d)."""
        parts = self.qkv(self.norms[0](x)).split(WIDTH, dim=-1)
        q, k, v = [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts]
        heads = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(heads.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))


class GPT(nn.Module):
    """A small GPT with learned positions and a tied head."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, P in self.named_parameters():
            if P.dim() == 2:
                residual = name.endswith(("mix.weight", "down.weight"))
                nn.init.normal_(P, std=0.02 / math.sqrt(2 * LAYERS) if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (b, l, v) of tokens (b, l)."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return functional.linear(self.norm(self.blocks(x)), self.tokens.weight)


def train_gpt(text: np.ndarray) -> dict[str, float]:
    """Train by the recipe; its seconds without any validation, and its loss on the last tenth."""
    torch.manual_seed(0)
    characters, ids = np.unique(text, return_inverse=True)
    cut = int(0.9 * len(ids))
    rng, model = np.random.default_rng(0), GPT(len(characters))
    decayed = [P for P in model.parameters() if P.dim() == 2]
    others = [P for P in model.parameters() if P.dim() != 2]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=BETAS, fused=True)
    start = time.perf_counter()
    for step in range(STEPS):
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - WARMUP) / (STEPS - WARMUP)))
        rate = PEAK * (step + 1) / (WARMUP + 1) if step < WARMUP else LAST + cosine * (PEAK - LAST)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = losses(model, ids, rng.integers(0, cut - LENGTH, size=BATCH)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        starts = np.arange(cut, len(ids) - LENGTH - 1, LENGTH)
        found = [losses(model, ids, starts[i : i + 64]) for i in range(0, len(starts), 64)]
    return {
        "nats": torch.cat(found).mean().item(),
        "seconds": seconds,
        "tokens": STEPS * BATCH * LENGTH,
        "parameters": sum(P.numel() for P in model.parameters()),
    }


def quantized_nats(folder: str, held_out: np.ndarray, kind: str) -> float:
    """The loss of a run's model on bytes with its weights in fewer bits."""
    model = LM.from_pretrained(folder).quantize(kind)
    total, count = nats(model, held_out, ByteTokenizer().eos_token_id, autocast=nullcontext)
    return total / count


def losses(model: GPT, ids: np.ndarray, starts: np.ndarray) -> Tensor:
    """The loss of every token of the windows that begin at `starts`."""
    windows = torch.from_numpy(np.stack([ids[s : s + LENGTH + 1] for s in starts]))
    logits = model(windows[:, :-1]).flatten(0, 1)
    return functional.cross_entropy(logits, windows[:, 1:].flatten(), reduction="none")


def main() -> None:
    """Run both and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="tinyshakespeare.txt")
    parser.add_argument("--out", default="benchmarks/results/shakespeare.json")
    args = parser.parse_args()
    gpt = train_gpt(np.frombuffer(Path(args.data).read_bytes(), np.uint8))
    sys.stderr.write(f"{json.dumps(gpt)}\n")
    with tempfile.TemporaryDirectory() as folder:
        options = {"out": folder, "plot": "never", "samples": 0, "minutes": gpt["seconds"] / 60}
        config = TrainConfig.from_toml(None, "shakespeare", data=args.data, **options)
        result = train(config)
        held_out = np.fromfile(next(Path(folder).glob("data/*/held_out.txt")), np.uint8)
        quantized = {kind: quantized_nats(folder, held_out, kind) for kind in QUANTIZED}
    ours = {
        "nats": result["final_nats"],
        "nats_quantized": quantized,
        **{name: result[name] for name in ("seconds", "tokens", "parameters")},
    }
    record = {
        "kind": "shakespeare",
        "date": time.strftime("%Y-%m-%d"),
        "machine": facts(torch.get_num_threads(), None),
        "versions": {"mambapy": mambapy.__version__, "torch": str(torch.__version__)},
        "nanogpt_recipe": gpt,
        "mambapy": ours,
    }
    Path(args.out).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps({"nanogpt_recipe": gpt, "mambapy": ours}, indent=2) + "\n")


if __name__ == "__main__":
    main()
