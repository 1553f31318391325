"""`train(config)`: from settings to a run folder with a trained model, its log and its report."""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mambapy.config import MODEL_TYPES
from mambapy.errors import ConfigError, DataError, MissingExtraError, TrainingError
from mambapy.lm import LM
from mambapy.optim import make_optimizer
from mambapy.tokenizer import (
    BYTE_FILE,
    JSON_FILE,
    ByteTokenizer,
    FileTokenizer,
    Tokenizer,
    load_tokenizer,
)
from mambapy.train import data as datasets
from mambapy.train import report, state
from mambapy.train.config import TrainConfig
from mambapy.train.plan import VALIDATIONS
from mambapy.train.text import open_source
from mambapy.train.trainer import Stop, Trainer
from mambapy.train.update import autocast
from mambapy.train.validation import bits_per_byte, nats, xz_bits_per_byte


def train(
    config: TrainConfig, *, resume: bool = False, overwrite: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Train a language model and leave it in the run folder `config.out`.

    The folder then holds model.safetensors and config.json (the weights of the best validation),
    the tokenizer, last.pt (to resume from), log.jsonl, samples.txt, loss.png, and experts.png
    where there are experts.

    Args:
        config: every setting. For a resumed run, see `state.saved_config`.
        resume: go on from the folder's last.pt instead of starting anew.
        overwrite: replace the run that the folder holds.
        quiet: no progress bar and no messages on stderr.

    Returns:
        What the report says: held-out loss, xz's figure, steps, tokens, seconds, parameters; and
        the samples, each with its prompt.

    Raises:
        ConfigError: a setting cannot work on this machine.
        DataError: the text cannot be used.
        TrainingError: the folder cannot be used, or the loss is no longer finite.
        CheckpointError: a checkpoint is damaged or cannot be written.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the run was saved after a whole step.
    """
    folder = Path(config.out)
    payload = _open_folder(config, resume=resume, overwrite=overwrite)
    if config.plot == "always":
        report.require_matplotlib()
    if config.threads:
        torch.set_num_threads(config.threads)
    device = find_device(config.device)
    tokenizer = load_tokenizer(config.tokenizer)
    data = _dataset(config, tokenizer, payload)
    run = _new_run(config, len(tokenizer), data, device)
    if payload is None:
        _begin(run, tokenizer, folder)
    else:
        state.restore(run, payload, folder)
    log = state.Log(folder / state.LOG, run.step)
    try:
        if payload is None:
            _describe(run, data, log, quiet)
        with _progress(run, quiet) as bar, Stop() as stop:
            Trainer(run, data, log, bar).fit(stop)
        return _finish(run, data, tokenizer, log, quiet)
    finally:
        log.close()


def _open_folder(config: TrainConfig, *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
    """Find out, before any work, whether the folder can be used; what to resume from, if asked."""
    folder = Path(config.out)
    if config.data and Path(config.data).resolve() == folder.resolve():
        raise ConfigError(f"out={config.out!r} is the data's own folder; --out must name another")
    if resume and overwrite:
        raise ConfigError("resume and overwrite contradict each other; give one of them")
    if resume:
        payload = state.read(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"mambapy")
    except OSError as error:
        reason = error.strerror or error
        raise TrainingError(f"run folder {folder} cannot be written to: {reason}") from error
    if resume:
        return payload
    if not overwrite and any((folder / name).exists() for name in (state.LAST, state.WEIGHTS)):
        raise TrainingError(
            f"{folder} already holds a run; --resume goes on with it, --overwrite replaces it, "
            "--out names another folder"
        )
    return None


def find_device(name: str) -> torch.device:
    """The device to train on; "auto" is the first there is of cuda, mps, cpu."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).split("\n")[0]
        raise ConfigError(f"device={name!r} cannot be used here: {first}") from error
    return device


def _dataset(
    config: TrainConfig, tokenizer: Tokenizer, payload: dict[str, Any] | None
) -> datasets.Dataset:
    """The prepared tokens; a resumed run's own, even if its text has changed or gone since."""
    cache = config.cache_folder
    if payload is not None and (cache / payload["fingerprint"] / "meta.json").is_file():
        data = datasets.load(cache, payload["fingerprint"])
    else:
        source = open_source(config.data, exclude=Path(config.out))
        data = datasets.prepare(source, tokenizer, config.tokenizer, cache, config.held_out)
    if payload is not None and data.fingerprint != payload["fingerprint"]:
        raise DataError(
            f"{config.data or 'the text'} has changed since the run in {config.out} began, and its "
            f"prepared tokens are no longer in {cache}; the run cannot go on exactly"
        )
    data.check_length(config.length, config.data or "the text")
    return data


def _new_run(
    config: TrainConfig, vocab_size: int, data: datasets.Dataset, device: torch.device
) -> state.Run:
    """A model with its initial weights, and its optimiser, at step 0."""
    torch.manual_seed(config.seed)
    architecture = MODEL_TYPES[config.model](**config.sizes, backend=config.backend)
    model = LM(architecture, vocab_size, tie_embeddings=config.tie_embeddings).to(device)
    model.recompute = config.recompute
    optimizer = make_optimizer(
        model,
        lr=config.lr,
        weight_decay=config.weight_decay,
        betas=config.betas,
        eps=config.eps,
    )
    interval = config.eval_interval or max(1, -(-(config.steps or 0) // VALIDATIONS))
    run = state.Run(config, model, optimizer, data.fingerprint)
    run.total, run.interval = config.steps, interval
    return run


def _begin(run: state.Run, tokenizer: ByteTokenizer | FileTokenizer, folder: Path) -> None:
    """Save step 0, so that a run can be resumed from here on, and clear away an earlier run."""
    state.save(run, folder)
    stale = {*state.RUN_FILES, BYTE_FILE, JSON_FILE} - {state.LAST}
    stale.discard(BYTE_FILE if isinstance(tokenizer, ByteTokenizer) else JSON_FILE)
    try:
        for name in stale:
            (folder / name).unlink(missing_ok=True)
        tokenizer.save(folder)
    except OSError as error:
        raise TrainingError(f"{folder} cannot be written: {error}") from error


def _describe(run: state.Run, data: datasets.Dataset, log: state.Log, quiet: bool) -> None:
    """The first line of the log, and what the user is told before the first step."""
    facts = {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "train_bytes": data.train_bytes,
        "train_tokens": len(data.train),
        "held_out_bytes": data.held_out_bytes,
        "held_out_tokens": len(data.held_out),
        "files": data.files,
        "left_out": data.left_out,
    }
    log.write(config=run.config.to_dict(), **facts)
    _say(
        f"{data.files} text files ({data.left_out} others left out): {data.train_bytes:,} bytes to "
        f"train on, {data.held_out_bytes:,} held out\n{facts['parameters']:,} parameters on "
        f"{next(run.model.parameters()).device}, run folder {run.config.out}",
        quiet,
    )


def _progress(run: state.Run, quiet: bool) -> Any:
    """The progress bar, on stderr."""
    return tqdm(
        total=run.total,
        initial=run.step,
        disable=quiet,
        file=sys.stderr,
        # One line every ten seconds where stderr is a file.
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
        dynamic_ncols=True,
        bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, {remaining} left{postfix}",
    )


def _finish(
    run: state.Run, data: datasets.Dataset, tokenizer: Tokenizer, log: state.Log, quiet: bool
) -> dict[str, Any]:
    """The final figures over the whole held-out text with the best weights, samples and plot."""
    config = run.config
    folder = Path(config.out)
    run.model.load_state_dict(LM.from_pretrained(folder).state_dict())
    device = next(run.model.parameters()).device
    total, count = nats(
        run.model, data.held_out, data.eos, autocast=lambda: autocast(config.dtype, device)
    )
    tokens = run.step * config.batch_size * config.accumulate * config.length
    result = {
        "final_bpb": bits_per_byte(total / count, count, data.held_out_bytes),
        "final_nats": total / count,
        "xz_bpb": xz_bits_per_byte(data.held_out_text()),
        "held_out_bytes": data.held_out_bytes,
        "step": run.step,
        "best_step": run.best_step,
        "tokens": tokens,
        "seconds": round(run.seconds, 3),
        "parameters": sum(p.numel() for p in run.model.parameters()),
    }
    log.write(**result)
    log.sync()
    samples: list[str] = []
    if config.samples:
        samples = report.write_samples(run.model, tokenizer, data, config, folder / "samples.txt")
    if config.plot != "never":
        try:
            report.write_plot(folder / state.LOG, folder / "loss.png")
            if "moe" in run.model.config.feed_forwards:
                report.write_load_plot(folder / state.LOG, folder / "experts.png")
        except MissingExtraError as error:
            _say(f"no loss.png: {error}", quiet)
    return {"out": str(folder), **result, "samples": samples}


def _say(text: str, quiet: bool) -> None:
    """Tell the user, on stderr."""
    if not quiet:
        tqdm.write(text, file=sys.stderr)
