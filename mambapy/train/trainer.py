"""The training loop itself: steps, validations and saves until the run's total is reached."""

import math
import signal
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch

from mambapy import ops
from mambapy.errors import TrainingError
from mambapy.train import state
from mambapy.train.config import TrainConfig
from mambapy.train.data import Dataset, batch
from mambapy.train.graph import WARM_UP, make_update
from mambapy.train.plan import Pace
from mambapy.train.readback import LAG, Readback
from mambapy.train.schedule import lr_factor
from mambapy.train.update import Update, autocast
from mambapy.train.validation import bits_per_byte, nats

# The first steps compile, and on a GPU they are recorded: no plan is made from them.
FIRST_STEPS = 2
FIRST_STEPS_CUDA = WARM_UP + 2


class Trainer:
    """The loop: steps, validations and saves, until the run's total is reached."""

    def __init__(self, run: state.Run, data: Dataset, log: state.Log, bar: Any) -> None:
        self.run, self.data, self.log, self.bar = run, data, log, bar
        self.config = run.config
        self.folder = Path(run.config.out)
        self.device = next(run.model.parameters()).device
        self._first_steps = FIRST_STEPS_CUDA if self.device.type == "cuda" else FIRST_STEPS
        # A GPU works on while the host reads the numbers of earlier steps.
        self._lag = lag_of(self.device)
        self._pending = Readback(self.device, self._lag)
        update = Update(
            run.model, run.optimizer, run.config, None if self._lag else self._check_next
        )
        self.update = make_update(update, run.config, self._tell_of_graph)
        self._shown: dict[str, str] = {}
        # The last validation reads all of the held-out text.
        self.pace = Pace(run, max(1.0, len(data.held_out) / run.config.eval_tokens))

    def fit(self, stop: "Stop") -> None:
        """Run to the end, or until a stop is asked for.

        Raises:
            TrainingError: the loss or the gradient is not finite.
            KeyboardInterrupt: after the state was saved.
        """
        run, config = self.run, self.config
        started = time.perf_counter() - run.seconds
        timed_from = run.step + self._first_steps
        run.model.train()
        tuning = ops.tune() if self.config.tune else nullcontext()
        while run.total is None or run.step < run.total:
            with tuning:
                self.step()
            tuning = nullcontext()
            run.seconds = time.perf_counter() - started
            self._read()
            plan = self.pace.is_due()
            validate = self.pace.validation_is_due()
            # Asked once: a signal may come between two looks.
            stopping = stop.asked
            save = plan or stopping or self.pace.save_is_due(validate)
            if validate or save:
                # Neither a validation nor a save may be of weights that were never checked.
                self._read(everything=True)
            if validate:
                self.validate()
            run.seconds = time.perf_counter() - started
            if plan:
                self._plan()
                run.seconds = time.perf_counter() - started
            if save:
                self.save()
            if run.step == timed_from:
                self._read(everything=True)
                run.seconds = time.perf_counter() - started
                self.pace.begin_again()
            if stopping and run.step != run.total:
                raise KeyboardInterrupt(
                    f"stopped after step {run.step}, saved; `mambapy train --resume --out "
                    f"{config.out}` goes on"
                )

    def step(self) -> None:
        """One optimiser step over `accumulate` passes; its line of the log comes from `_read`.

        Raises:
            TrainingError: the loss or the gradient is not finite; nothing was updated.
        """
        run, config = self.run, self.config
        lr = config.lr * lr_factor(
            run.step,
            run.total,
            schedule=config.schedule,
            warmup=config.warmup,
            min_ratio=config.min_lr_ratio,
            decay_fraction=config.decay_fraction,
        )
        windows = batch(
            self.data.train,
            rows=config.batch_size * config.accumulate,
            length=config.length,
            seed=config.seed,
            step=run.step,
        )
        numbers = self.update(torch.from_numpy(windows), lr)
        run.step += 1
        tokens = run.step * windows.shape[0] * config.length
        self._pending.push({"step": run.step, "tokens": tokens, "lr": lr}, numbers)

    def _tell_of_graph(self, reason: str) -> None:
        """Say in the log why there is no CUDA graph where there could be one."""
        self.log.write(step=self.run.step, cuda_graph=f"not recorded: {reason}")

    def _read(self, *, everything: bool = False) -> None:
        """Log and show the steps whose numbers are due; on a GPU, those of the last are not yet.

        Raises:
            TrainingError: the loss or the gradient is not finite; nothing was updated.
        """
        for known, (loss, norm, *routing) in self._pending.pop(everything=everything):
            self._check_finite(loss, norm, known["step"])
            values = {
                "step": known["step"],
                "tokens": known["tokens"],
                "loss": loss,
                "bpb": bits_per_byte(loss, len(self.data.train), self.data.train_bytes),
                "lr": known["lr"],
                "grad_norm": norm,
                **self._described(routing),
            }
            if known["step"] % self.config.log_interval == 0:
                self.log.write(**values, seconds=round(self.run.seconds, 3))
            self._show(values)

    def _described(self, routing: list[float]) -> dict[str, Any]:
        """What the log says of a step's routers: the loss, and the load of each layer's experts."""
        if not routing:
            return {}
        model: Any = self.run.model.config
        load = np.array(routing[1:]).reshape(-1, model.n_experts).tolist()
        return {
            "aux_loss": routing[0],
            "expert_load": [[round(share, 4) for share in layer] for layer in load],
        }

    def validate(self) -> float:
        """Validate on part of the held-out text; keep the weights if they are the best so far."""
        run, config = self.run, self.config
        began = time.perf_counter()
        total, count = nats(
            run.model,
            self.data.held_out,
            self.data.eos,
            limit=config.eval_tokens,
            autocast=self.autocast,
        )
        bpb = bits_per_byte(total / count, len(self.data.held_out), self.data.held_out_bytes)
        if not math.isfinite(bpb):
            raise TrainingError(f"validation loss is {bpb} after step {run.step}; {advice(config)}")
        tokens = run.step * config.batch_size * config.accumulate * config.length
        run.validated = run.step
        if bpb < run.best:
            run.best, run.best_step = bpb, run.step
            run.model.save_pretrained(self.folder)
        # After the weights: a resumed run learns from it which they are.
        self.log.write(step=run.step, tokens=tokens, val_bpb=bpb)
        self._shown["held-out"] = f"{bpb:.3f}"
        self.pace.validated(time.perf_counter() - began)
        return bpb

    def save(self) -> None:
        """Save everything that a resumed run needs."""
        began = time.perf_counter()
        self.log.sync()
        state.save(self.run, self.folder)
        self.pace.saved(time.perf_counter() - began)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision context of forward passes; weights stay float32 in all of them."""
        return autocast(self.config.dtype, self.device)

    def _plan(self) -> None:
        """Set how many steps the run has, from the speed since the plan before.

        What is planned is saved, so a run that is resumed later goes on as it would have.
        """
        run, pace = self.run, self.pace
        per_step = pace.per_step()
        pace.begin_again()
        left = 60 * (self.config.minutes or 0.0) - run.seconds
        if run.total is None:
            self.validate()
            left -= pace.validation
            run.reserve = pace.validation * pace.whole
        pace.make(per_step, left)
        self.bar.total = run.total
        self.bar.refresh()

    def _check_next(self, loss: float, norm: float) -> None:
        """Stop before an update that would spoil the weights."""
        self._check_finite(loss, norm, self.run.step + 1)

    def _check_finite(self, loss: float, norm: float, step: int) -> None:
        """Raise where a step's numbers are not finite."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "gradient" if math.isfinite(loss) else "loss"
            value = norm if math.isfinite(loss) else loss
            raise TrainingError(f"{what} is {value} at step {step}; {advice(self.config)}")

    def _show(self, values: dict[str, Any]) -> None:
        """Bring the bar up to date."""
        speed = self._shown.get("tok/s")
        # Of few steps it says little where a GPU may not have done the last of them.
        if speed is None or self.pace.steps > 4 * self._lag:
            tokens = self.config.batch_size * self.config.accumulate * self.config.length
            speed = f"{tokens / self.pace.per_step():,.0f}"
        self._shown = {
            "tok/s": speed,
            "bits/byte": f"{values['bpb']:.3f}",
            "held-out": self._shown.get("held-out", "-"),
        }
        self.bar.set_postfix(self._shown, refresh=False)
        self.bar.update(1)


class Stop:
    """Turns Ctrl-C and SIGTERM into a wish that the loop reads after each whole step.

    The second one interrupts at once.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        """Take the two signals over, where this thread may."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Note the wish."""
        if self.asked:
            raise KeyboardInterrupt("stopped at once; the last save is still there")
        self.asked = True


def lag_of(device: torch.device) -> int:
    """How many steps' numbers may be unread: on a CPU, each step is checked before its update."""
    return LAG if device.type == "cuda" else 0


def advice(config: TrainConfig) -> str:
    """What to try after a loss that is not finite."""
    tries = [f"a lower --lr (now {config.lr:g})", f"a longer --warmup (now {config.warmup})"]
    if not 0 < config.grad_clip <= 1:
        tries.append("--grad-clip 1")
    if config.dtype != "float32":
        tries.append("--dtype float32")
    return f"try {', '.join(tries)}; the last good checkpoint is in {config.out}"
