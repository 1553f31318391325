"""README's figures from the records in results/: `python benchmarks/readme.py` writes them anew.

A test compares README with what this file makes.
"""

import itertools
import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
HEADLINE = "block-b1-l1024-d768-n16"
HEADS = "heads-b1-l1024-d768-n128-p64"
MAMBA_PY = ("mamba.py 1.2", "mamba.py")
SCANS = (
    (8, 2048, 1536, 16),
    (8, 2048, 5120, 16),
    (1, 32768, 1536, 16),
    (64, 512, 1536, 16),
    (8, 2048, 1536, 64),
)


def load(kind: str) -> dict[str, Any]:
    """A record."""
    return json.loads((HERE / "results" / f"{kind}.json").read_text(encoding="utf-8"))


def table(*rows: list[str]) -> str:
    """Rows as a table of Markdown, the first as its head."""
    head, *rest = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *rest])


def block() -> str:
    """Times of a block over those of its matrix products."""
    found = {c["pass"]: c["contestants"] for c in load("block")["cases"] if c["name"] == HEADLINE}
    names = [
        ("its four matrix products", "floor"),
        ("mambapy", "mambapy"),
        ("mambapy, plain PyTorch (`chunked`)", "chunked"),
        MAMBA_PY,
        ("transformers", "transformers"),
    ]
    rows = []
    for label, name in names:
        passes = [found[one] for one in ("forward", "training")]
        ratios = [one[name]["median_s"] / one["floor"]["median_s"] for one in passes]
        rows.append(
            [label, *[f"{ratio:.2f}" if ratio < 100 else f"{ratio:.0f}" for ratio in ratios]]
        )
    head = ["one block, d_model 768, length 1024", "forward", "forward + backward"]
    return table(head, *rows)


def heads() -> str:
    """Times of blocks of Mamba-2 and Mamba-3 over those of Mamba-2's matrix products."""
    found = {c["pass"]: c["contestants"] for c in load("heads")["cases"] if c["name"] == HEADS}
    names = [
        ("its two projections and its chunks' products", "floor"),
        ("mambapy, Mamba-2", "mamba2"),
        ("mambapy, Mamba-3", "mamba3"),
        ("transformers, Mamba-2", "transformers mamba2"),
    ]
    rows = []
    for label, name in names:
        passes = [found[one] for one in ("forward", "training")]
        ratios = [one[name]["median_s"] / one["floor"]["median_s"] for one in passes]
        memory = passes[1][name]["peak_bytes"]
        rows.append(
            [
                label,
                *[f"{ratio:.2f}" for ratio in ratios],
                "" if memory is None else f"{memory / 1e6:.0f} MB",
            ]
        )
    head = [
        "one block of Mamba-2's, d_model 768, d_state 128, length 1024",
        "forward",
        "forward + backward",
        "memory of it",
    ]
    return table(head, *rows)


def experts() -> str:
    """Times of a mixture of experts over those of its matrix products; nothing before a record."""
    if not (HERE / "results" / "experts.json").exists():
        return ""
    found = {(c["length"], c["pass"]): c["contestants"] for c in load("experts")["cases"]}
    names = [
        ("its dense products", "floor"),
        ("mambapy", "mambapy"),
        ("one dense MLP of the same active parameters", "dense"),
        ("transformers, loop", "transformers loop"),
        ("transformers, grouped_mm", "transformers grouped"),
    ]
    columns = [found[key] for key in ((2048, "forward"), (2048, "training"), (1, "forward"))]
    rows = [
        [label, *[f"{one[name]['median_s'] / one['floor']['median_s']:.2f}" for one in columns]]
        for label, name in names
    ]
    head = [
        "2 of 16 experts, d_model 512, inner width 1024, 2048 tokens",
        "forward",
        "forward + backward",
        "one token",
    ]
    return table(head, *rows)


def train() -> str:
    """Speed and memory of training."""
    found = load("train")["cases"][0]["contestants"]
    rows = [
        [
            label,
            f"{found[name]['tokens_per_s']:,.0f}",
            f"{found[name]['process_bytes'] / 1e9:.1f} GB",
        ]
        for label, name in (("mambapy", "mambapy"), MAMBA_PY)
    ]
    rows.insert(0, ["its matrix products", f"{found['floor']['tokens_per_s']:,.0f}", ""])
    head = ["training, d_model 256, 6 layers, 16 x 256", "tokens a second", "memory of the process"]
    return table(head, *rows)


def scan_gpu() -> str:
    """The scan on a GPU beside mamba.py's and plain PyTorch's."""
    cases: dict[str, dict[str, Any]] = {}
    for case in load("h100/cuda-scan")["cases"]:
        cases.setdefault(case["name"], {"sizes": case})[case["pass"]] = case["contestants"]
    rows = []
    for shape in SCANS:
        name = "scan-b{}-l{}-e{}-n{}-bf16".format(*shape)
        forward, training = cases[name]["forward"], cases[name]["training"]
        ours = training["auto"]
        plain = [training[who] for who in ("chunked", "pscan") if who in training]
        fastest = min(plain, key=lambda one: one["median_s"])
        found = [forward["auto"], ours, fastest, training.get("mamba.py")]
        times = ["-" if one is None else f"{one['median_s'] * 1e3:.3g}" for one in found]
        sizes = [f"{size:,}" for size in shape]
        rows.append([*sizes, *times, f"{ours['peak_bytes'] / 1e6:,.0f} MB"])
    head = ["batch", "length", "channels", "states", "forward, ms", "forward + backward"]
    return table([*head, "plain PyTorch", MAMBA_PY[0], "memory beside the inputs"], *rows)


def deterministic() -> str:
    """What the same bits on each run cost."""
    times, memory, states = [], [], set()
    for case in load("h100/cuda-scan")["cases"]:
        found = case["contestants"]
        if case["pass"] == "training" and "deterministic" in found:
            same, usual = found["deterministic"], found["auto"]
            times.append(same["median_s"] / usual["median_s"] - 1)
            memory.append(same["peak_bytes"] / usual["peak_bytes"])
            states.add(case["d_state"])
    low, high = (round(100 * cost) for cost in (min(times), max(times)))
    return (
        f"On an H100 a scan's two passes took {low} to {high} % longer, part of it because torch "
        "then fills\nall new memory (`torch.utils.deterministic`), and up to "
        f"{max(memory):.1f} times the memory, for {min(states)} to {max(states)} states."
    )


def train_gpu() -> str:
    """Training on a GPU at each level of recomputation."""
    found = load("h100/cuda-train")["cases"][0]["contestants"]
    names = [
        ("its matrix products", "floor"),
        ("mambapy", "mambapy"),
        *((f"`--recompute {level}`", f"mambapy {level}") for level in ("conv", "scan", "block")),
    ]
    rows = [
        [
            label,
            f"{found[name]['tokens_per_s'] / 1e3:,.0f}",
            "" if name == "floor" else f"{found[name]['peak_bytes'] / 2**30:.1f} GiB",
        ]
        for label, name in names
    ]
    head = ["training, 130 million parameters, 16 x 1024", "thousand tokens a second", "memory"]
    return table(head, *rows)


def decode_gpu() -> str:
    """Speed of reading a prompt on a GPU, and time of a token."""
    rows = []
    labels = {768: "130 million parameters", 2560: "2.8 billion"}
    cases = load("h100/cuda-decode")["cases"]
    for prefill, decode in zip(cases[::2], cases[1::2], strict=True):
        for label, name in (("mambapy", "mambapy"), MAMBA_PY, ("transformers", "transformers")):
            if name in prefill["contestants"] and name in decode["contestants"]:
                read, written = (one["contestants"][name] for one in (prefill, decode))
                per_token = written["median_s"] / decode["tokens"]
                row = [f"{labels[decode['d_model']]}, batch {decode['batch']}", label]
                rows.append([*row, f"{read['tokens_per_s']:,.0f}", f"{per_token * 1e3:.3g}"])
    head = ["", "prompt of 512, tokens a second", "ms a new token"]
    return table(["decoding", *head], *rows)


def english() -> str:
    """What ten minutes on a GPU gave."""
    record = load("h100/english")
    usual = record["other_runs"][0]
    best = record["best_step"] / record["step"]
    passes = record["tokens"] / record["train_tokens"]
    minutes = record["seconds"] / 60
    return (
        f"In {minutes:.0f} minutes on the same card, `mambapy train --config "
        "examples/gpu_130m.toml --data novels.txt\n--tokenizer tokenizer.json` took "
        f"{record['parameters'] / 1e6:,.0f} million parameters through "
        f"{record['tokens'] / 1e6:,.0f} million tokens: {passes:.0f} times\nthrough "
        f"{record['train_bytes'] / 1e6:.0f} MB of English novels. After {best * passes:.0f} times "
        "it learnt them by heart, and other text got worse,\nso the weights that it left are those "
        f"of minute {best * minutes:.0f}: **{record['final_bpb']:.3f} bits a byte** of "
        f"{record['held_out_bytes'] / 1e3:,.0f} kB held out.\n(With weight decay "
        f"{usual['config']['weight_decay']:g}, twice the batch and another schedule it was "
        f"{usual['final_bpb']:.3f}, after {usual['best_step'] / usual['step'] * 10:.0f} minutes; "
        f"`xz -9`\nneeds {record['xz_bpb']:.3f}.) [All figures, and what it wrote]"
        "(benchmarks/results/h100/english.json)."
    )


def decode() -> str:
    """Speed of reading a prompt, and of writing."""
    names = [
        ("mambapy", "mambapy float32"),
        ('mambapy, `quantize("bfloat16")`', "mambapy bfloat16"),
        ('mambapy, `quantize("int8")`', "mambapy int8"),
        MAMBA_PY,
        ("transformers", "transformers"),
        ("mambapy, Mamba-2", "mamba2"),
        ("mambapy, Mamba-3", "mamba3"),
        ("transformers, Mamba-2", "transformers mamba2"),
    ]
    found: dict[str, dict[str, Any]] = {"prefill": {}, "decode": {}}
    for case in [*load("decode")["cases"], *load("heads")["cases"]]:
        if "tokens" in case:
            found[case["pass"]] |= case["contestants"]
    rows = [
        [label, *[f"{found[one][name]['tokens_per_s']:,.0f}" for one in ("prefill", "decode")]]
        for label, name in names
    ]
    head = [
        "130 million parameters, batch 1",
        "prompt of 512, tokens a second",
        "new tokens a second",
    ]
    return table(head, *rows)


def shakespeare() -> str:
    """What was learnt in the same time."""
    found = load("shakespeare")
    theirs, ours = found["nanogpt_recipe"], found["mambapy"]
    return (
        f"In the {theirs['seconds']:.0f} seconds that nanoGPT's recipe for a CPU took to reach "
        f"{theirs['nats']:.2f} nats a character on tinyshakespeare's\nlast tenth, "
        f"`mambapy train --preset shakespeare` reached **{ours['nats']:.2f}**, with "
        f"{ours['parameters'] / theirs['parameters']:.0%} of the parameters."
    )


def parity() -> str:
    """What one layer can keep count of."""
    record = load("parity")
    found = {name: record["best"][name]["last_place"]["256"] for name in ("Mamba-3", "Mamba-2")}
    seconds = sum(one["seconds"] for runs in record["runs"].values() for one in runs)
    return (
        f"Trained side by side for {seconds / 60:.0f} minutes by [examples/parity.py]"
        "(examples/parity.py), one layer of Mamba-3\nknows the parity of 256 random bits "
        f"({found['Mamba-3']:.0%}, where guessing is 0 %), one of Mamba-2 does not "
        f"({found['Mamba-2']:.0%})."
    )


def jamba() -> str:
    """What experts gave on the same text, by token and by second."""
    runs = load("jamba")["runs"]
    moe, dense = runs["moe"], runs["dense"]
    tokens, bpb = moe["held_out"][-1]
    (t0, v0), (t1, v1) = next(
        pair for pair in itertools.pairwise(dense["held_out"]) if pair[1][0] > tokens
    )
    then = v0 + (v1 - v0) * (tokens - t0) / (t1 - t0)
    return (
        f"Trained for {dense['seconds'] / 60:.0f} minutes on two cores by "
        "[benchmarks/jamba.py](benchmarks/jamba.py), on English novels: after\n"
        f"{tokens / 1e6:.2f} million bytes a Jamba with 2 of 8 experts in each block stood at "
        f"**{bpb:.2f} bits a byte** of held-out text, a\ndense one with as many active "
        f"parameters at {then:.2f}. The dense one is the faster to train: in the same minutes it "
        f"read\n{dense['tokens'] / moe['tokens']:.1f} times as much, and stood at "
        f"{dense['held_out'][-1][1]:.2f}."
    )


def vision() -> str:
    """A Vision Mamba's passes over those of its matrix products."""
    found = {c["pass"]: c["contestants"] for c in load("vision")["cases"]}
    names = [
        ("its matrix products", "floor"),
        ("mambapy", "mambapy"),
        ("mambapy, plain PyTorch (`chunked`)", "chunked"),
        ("a ViT of the same width, 12 blocks of torch's own layers", "vit"),
    ]
    rows = []
    for label, name in names:
        passes = [found[one] for one in ("forward", "training")]
        ratios = [one[name]["median_s"] / one["floor"]["median_s"] for one in passes]
        rows.append([label, *[f"{ratio:.2f}" for ratio in ratios]])
    head = ["Vim-Ti, 8 images of 224 x 224", "forward", "forward + backward"]
    return table(head, *rows)


def digits() -> str:
    """What a small Vision Mamba reads."""
    record = load("digits")
    vim, vit = record["models"]["vim"], record["models"]["vit"]
    return (
        "[examples/image_classification.py](examples/image_classification.py) trains one on 1,438 "
        f"handwritten digits for {vim['seconds']:.0f} seconds: it reads\n**{vim['accuracy']:.1%}** "
        f"of the 359 held out. A ViT of the same size reads {vit['accuracy']:.1%} after "
        f"{vit['seconds']:.0f} seconds, the nearest training image\n"
        f"{record['nearest_image']:.1%}; a digit is 0.3 %."
    )


PARTS = {
    "block": block,
    "heads": heads,
    "experts": experts,
    "train": train,
    "decode": decode,
    "shakespeare": shakespeare,
    "parity": parity,
    "jamba": jamba,
    "scan_gpu": scan_gpu,
    "deterministic": deterministic,
    "train_gpu": train_gpu,
    "decode_gpu": decode_gpu,
    "english": english,
    "vision": vision,
    "digits": digits,
}


def fill(text: str) -> str:
    """README's text with every part between its marks made anew."""
    for name, make in PARTS.items():
        mark = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text = re.sub(mark, lambda m, make=make: m[1] + make() + "\n" + m[2], text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    README.write_text(fill(README.read_text(encoding="utf-8")), encoding="utf-8")
