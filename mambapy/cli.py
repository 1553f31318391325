"""The command line: `mambapy train | generate | convert | bench | info`.

Each verb calls one function.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import mambapy
from mambapy.bench.options import Options, add_flags
from mambapy.errors import ConfigError, DataError, MambapyError
from mambapy.train.config import TrainConfig
from mambapy.train.presets import PRESETS

_TRAIN = """\
examples:
  mambapy train                                   3 minutes on Python's own library, into runs/demo
  mambapy train --data book.txt --out runs/book --minutes 30
  mambapy train --config run.toml --lr 1e-3       the file's settings, then the flags
  mambapy train --preset shakespeare --data tinyshakespeare.txt
  mambapy train --resume --out runs/book          go on after a stop, exactly
"""
_GENERATE = """\
examples:
  mambapy generate runs/demo --prompt "def main("
  echo "import os" | mambapy generate runs/demo --num-tokens 500 --temperature 0.7
  mambapy generate runs/demo                      asks for prompts, where stdin is a terminal
  mambapy generate state-spaces/mamba-130m --tokenizer gpt-neox/tokenizer.json --prompt "Mamba is"
"""
_CONVERT = """\
examples:
  mambapy convert state-spaces/mamba-130m mamba-130m-hf --format hf
  mambapy convert tiiuae/falcon-mamba-7b falcon --format mambapy
  mambapy convert runs/demo demo-official --format official
"""
_BENCH = """\
examples:
  mambapy bench block --quick                     a first look, in seconds
  mambapy bench scan --threads 2                  into benchmarks/results/scan.json
  mambapy bench block --mamba-py DIR              beside mamba.py, installed in DIR
  mambapy bench plot                              draw what the results hold
"""
_INFO = """\
examples:
  mambapy info
  mambapy info --json
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0: done; 1: a defect of ours; 2: a mistake, told in one line on stderr; 130: interrupted;
    141: whoever read our output has gone.
    """
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A terminal that cannot show a character must not end the text.
            sys.stdout.reconfigure(errors="replace")
        args = _parser().parse_args(argv)
        run: Callable[[argparse.Namespace], None] = args.run
        run(args)
        sys.stdout.flush()
    except MambapyError as error:
        line = " ".join(str(error).split())
        print(f"mambapy: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"\nmambapy: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Nothing more can be written, not even when Python flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def train(args: argparse.Namespace) -> None:
    """`mambapy train`."""
    names = {item.name for item in fields(TrainConfig)}
    flags = {name: value for name, value in vars(args).items() if name in names}
    if args.resume:
        if args.config or args.preset:
            raise ConfigError(
                "--resume uses the run's own settings; give flags, not --config or --preset"
            )
        from mambapy.train.state import saved_config

        out = flags.pop("out", TrainConfig().out)
        config = saved_config(Path(out), **flags)
    else:
        config = TrainConfig.from_toml(args.config, args.preset, **flags)
    from mambapy.train.loop import train

    result = train(config, resume=args.resume, overwrite=args.overwrite, quiet=args.quiet)
    if args.json:
        print(json.dumps(result))
        return
    print("".join(result["samples"]), end="")
    files = sorted(path.name for path in Path(result["out"]).iterdir() if path.is_file())
    winner = "below" if result["final_bpb"] < result["xz_bpb"] else "not below"
    print(
        f"held-out text ({result['held_out_bytes']:,} bytes): {result['final_bpb']:.3f} bits per "
        f"byte, {winner} the {result['xz_bpb']:.3f} of xz -9; {result['final_nats']:.3f} nats per "
        "token\n"
        f"{result['step']} steps, {result['tokens']:,} tokens, {result['parameters']:,} "
        f"parameters, {result['seconds']:.0f} s; best weights of step {result['best_step']}\n"
        f"{result['out']}: {' '.join(files)}\n"
        f"to hear it speak: mambapy generate {result['out']}"
    )


def generate(args: argparse.Namespace) -> None:
    """`mambapy generate`."""
    import torch

    from mambapy.checkpoints import find
    from mambapy.lm import LM
    from mambapy.tokenizer import load_tokenizer

    path = Path(args.model)
    folder = find(path.parent if path.is_file() else args.model, args.revision)
    device = _device(args.device) if args.device else None
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    model = LM.from_pretrained(folder, dtype=dtype, device=device)
    tokenizer = load_tokenizer(args.tokenizer or str(folder))
    for prompt in _prompts(args.prompt):
        pieces = model.generate_stream(
            tokenizer,
            prompt,
            num_tokens=args.num_tokens,
            top_k=args.top_k or None,
            top_p=args.top_p,
            temperature=args.temperature,
            stop=args.stop,
            seed=args.seed,
        )
        if args.json:
            print(json.dumps({"prompt": prompt, "text": "".join(pieces)}), flush=True)
            continue
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)


def convert(args: argparse.Namespace) -> None:
    """`mambapy convert`."""
    from mambapy.convert import convert

    files = convert(args.source, args.target, args.format, revision=args.revision)
    sizes = {path.name: path.stat().st_size for path in files}
    if args.json:
        print(json.dumps({"target": args.target, "files": sizes}))
        return
    for name, size in sizes.items():
        print(f"{size:>15,} bytes  {Path(args.target) / name}")


def bench(args: argparse.Namespace) -> None:
    """`mambapy bench`."""
    if args.kind == "plot":
        from mambapy.bench.plots import plot

        pictures = plot(Path(args.results), Path(args.out))
        print(json.dumps(pictures) if args.json else "\n".join(pictures))
        return
    from mambapy.bench.run import bench

    names = {item.name for item in fields(Options)}
    options = Options(**{name: value for name, value in vars(args).items() if name in names})
    result = bench(options, None if args.json else lambda line: print(line, flush=True))
    if args.json:
        print(json.dumps(result))


def info(args: argparse.Namespace) -> None:
    """`mambapy info`."""
    import torch

    from mambapy import ops

    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    devices = ["cpu", *(["cuda"] if cuda else [])]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    facts: dict[str, Any] = {
        "mambapy": mambapy.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "system": f"{platform.system()} {platform.machine()}",
        "cuda": cuda,
        "mps": torch.backends.mps.is_available(),
        "threads": torch.get_num_threads(),
        "backends": {device: ops.backends_info(device) for device in devices},
    }
    if args.json:
        print(json.dumps(facts))
        return
    for name in ("mambapy", "python", "torch", "system", "threads"):
        print(f"{name:9}{facts[name]}")
    names = [f"{name} (cuda:{i})" for i, name in enumerate(cuda)]
    print(f"{'devices':9}{', '.join([*devices, *names])}")
    for device, rows in facts["backends"].items():
        print(f"\nbackends on {device}, in the order in which auto tries them (* is its choice):")
        width = 2 + max(len(row["op"]) for row in rows)
        for row in rows:
            mark = "*" if row["chosen"] else " "
            usable = "usable" if row["usable"] else f"not usable: {row['reason']}"
            print(f"{mark} {row['op']:{width}}{row['backend']:11}{usable}")


class _Parser(argparse.ArgumentParser):
    """argparse, with one line on stderr for a mistake."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and where the help is; exit 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    """The verbs and their flags."""
    parser = _Parser(
        prog="mambapy", description="Mamba language models: train, generate.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"mambapy {mambapy.__version__}")
    metavar = "train | generate | convert | bench | info"
    verbs = parser.add_subparsers(required=True, metavar=metavar, dest="verb")
    _add_train(_verb(verbs, "train", train, "train a language model on text", _TRAIN))
    _add_generate(_verb(verbs, "generate", generate, "continue a prompt", _GENERATE))
    text = "write a checkpoint again in another format"
    _add_convert(_verb(verbs, "convert", convert, text, _CONVERT))
    add_flags(_verb(verbs, "bench", bench, "measure time and memory, beside others", _BENCH))
    flags = _verb(verbs, "info", info, "versions, devices and backends", _INFO)
    flags.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _verb(
    verbs: Any, name: str, run: Callable[[argparse.Namespace], None], text: str, examples: str
) -> argparse.ArgumentParser:
    """A verb's own parser."""
    verb: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb.set_defaults(run=run)
    return verb


def _add_train(verb: argparse.ArgumentParser) -> None:
    """The flags of `train`: every setting of TrainConfig, and how to run."""
    presets = "; ".join(f"{name}: {preset.text}" for name, preset in PRESETS.items())
    verb.add_argument("--preset", metavar="NAME", help=f"settings to start from ({presets})")
    verb.add_argument("--config", metavar="FILE", help="TOML file of settings, named as the flags")
    verb.add_argument("--resume", action="store_true", help="go on with the run in the run folder")
    verb.add_argument("--overwrite", action="store_true", help="replace the run in the run folder")
    verb.add_argument("--quiet", action="store_true", help="no progress bar, no messages")
    verb.add_argument("--json", action="store_true", help="print the result as one JSON object")
    settings = verb.add_argument_group("settings", "[in brackets: what they are if not given]")
    for item in fields(TrainConfig):
        kind = str(item.type)
        text = item.metadata["help"].replace("%", "%%")
        if item.default not in (None, ""):
            shown = item.default if isinstance(item.default, tuple) else (item.default,)
            text += f" [{' '.join(str(one) for one in shown)}]"
        options: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS, "dest": item.name}
        flag = f"--{item.name.replace('_', '-')}"
        if kind == "bool":
            verb_flag = argparse.BooleanOptionalAction
            settings.add_argument(flag, action=verb_flag, **options)
            continue
        options["type"] = {"str": str, "int": int}.get(kind.split(" ")[0], float)
        options["metavar"] = {"str": "TEXT", "int": "N"}.get(kind.split(" ")[0], "X")
        if "tuple" in kind:
            options["nargs"] = 2
        if item.metadata["choices"]:
            options["choices"] = item.metadata["choices"]
            options["metavar"] = "{" + ",".join(item.metadata["choices"]) + "}"
        settings.add_argument(flag, **options)


def _add_generate(verb: argparse.ArgumentParser) -> None:
    """The flags of `generate`."""
    verb.add_argument(
        "model", metavar="MODEL", help="run folder, checkpoint, or name on the Hugging Face hub"
    )
    verb.add_argument("--prompt", metavar="TEXT", help="text to continue; without it, stdin")
    verb.add_argument(
        "--num-tokens", type=int, default=300, metavar="N", help="most tokens to generate [300]"
    )
    verb.add_argument(
        "--top-k", type=int, default=40, metavar="N", help="draw from N likeliest; 0: all [40]"
    )
    verb.add_argument(
        "--top-p",
        type=float,
        metavar="X",
        help="draw from the likeliest whose probabilities reach X, 0 to 1",
    )
    verb.add_argument(
        "--temperature", type=float, default=1.0, metavar="X", help="0: the likeliest token [1]"
    )
    verb.add_argument("--seed", type=_seed, metavar="N", help="same seed, same text")
    verb.add_argument(
        "--stop", action="append", metavar="TEXT", help="end at this text; may be repeated"
    )
    verb.add_argument("--tokenizer", metavar="NAME", help="where the folder does not name its own")
    verb.add_argument("--device", metavar="NAME", help="cpu, cuda, mps, ... [cpu]")
    dtypes = ("float32", "bfloat16", "float16", "float64")
    verb.add_argument("--dtype", choices=dtypes, help="of the weights [the file's]")
    verb.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub")
    verb.add_argument("--json", action="store_true", help='one JSON object a prompt, with "text"')


def _add_convert(verb: argparse.ArgumentParser) -> None:
    """The flags of `convert`."""
    verb.add_argument("source", metavar="SRC", help="folder, or name on the Hugging Face hub")
    verb.add_argument("target", metavar="DST", help="folder to write")
    formats = {
        "mambapy": "this library's own",
        "official": "the papers' code (one pytorch_model.bin)",
        "hf": "transformers",
    }
    text = "; ".join(f"{name}: {what}" for name, what in formats.items())
    verb.add_argument("--format", required=True, choices=[*formats], help=text)
    verb.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub")
    verb.add_argument("--json", action="store_true", help="print one JSON object")


def _device(name: str) -> Any:
    """The device of that name, checked."""
    from mambapy.train.loop import find_device

    return find_device(name)


def _seed(text: str) -> int:
    """A seed that every generator takes."""
    if not text.isdecimal() or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text} must be an integer from 0 to 2^32 - 1")
    return int(text)


def _prompts(given: str | None) -> Iterator[str]:
    """The prompt given, what stdin holds, or what the user types until the end of input."""
    if given is not None:
        yield given
    elif not sys.stdin.isatty():
        try:
            yield sys.stdin.read()
        except UnicodeDecodeError as error:
            raise DataError(f"the prompt on stdin is not text: {error.reason}") from error
    else:
        with contextlib.suppress(EOFError):
            while True:
                if prompt := input("prompt> "):
                    yield prompt
        print()


if __name__ == "__main__":
    sys.exit(main())
