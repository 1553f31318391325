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
from mambapy.train.readback import LAG, Readback
from mambapy.train.schedule import lr_factor
from mambapy.train.update import Update, autocast
from mambapy.train.validation import bits_per_byte, nats

# The first steps compile, and on a GPU they are recorded. With `minutes`, CALIBRATION_STEPS after
# them are timed before the number of steps is planned; it is planned again after PLANS' shares of
# the time, or of the steps, since a machine's speed changes.
FIRST_STEPS = 2
FIRST_STEPS_CUDA = WARM_UP + 2
CALIBRATION_STEPS = 10
PLANS = (0.0, 0.1, 0.25, 0.5, 0.75)
# With `eval_interval=0`, about that many validations in a run; with `minutes`, at most that many,
# and no more than take that share of its time.
VALIDATIONS = 20
VALIDATION_SHARE = 0.1
# With `save_interval=0`, a run is saved at validations, if saving takes no more than that share of
# the time; and at the latest after that long, whatever the settings.
SAVE_SHARE = 0.05
SAVE_SECONDS = 300.0


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
        # Step and seconds at the last plan, or where this process took the run up; and the seconds
        # since then that were not steps.
        self._measure_from_here()
        # How much longer the last validation is, which reads all of the held-out text.
        self._whole = max(1.0, len(data.held_out) / run.config.eval_tokens)
        # Seconds of the last validation and of the last save.
        self._validation, self._save = run.reserve / self._whole, 0.0

    def fit(self, stop: "Stop") -> None:
        """Run to the end, or until a stop is asked for.

        Raises:
            TrainingError: the loss or the gradient is not finite.
            KeyboardInterrupt: after the state was saved.
        """
        run, config = self.run, self.config
        started = time.perf_counter() - run.seconds
        self._saved = time.perf_counter()
        self._measure_from_here()
        run.model.train()
        tuning = ops.tune() if self.config.tune else nullcontext()
        while run.total is None or run.step < run.total:
            with tuning:
                self.step()
            tuning = nullcontext()
            run.seconds = time.perf_counter() - started
            self._read()
            plan = self._plan_is_due()
            validate = run.total is not None and self._due(run.interval)
            # Asked once: a signal may come between two looks.
            stopping = stop.asked
            save = plan or stopping or self._save_is_due(validate)
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
            if run.step == self._first_steps:
                self._read(everything=True)
                run.seconds = time.perf_counter() - started
                self._measure_from_here()
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
        self.log.write(step=run.step, tokens=tokens, val_bpb=bpb)
        if bpb < run.best:
            run.best, run.best_step = bpb, run.step
            run.model.save_pretrained(self.folder)
        self._shown["held-out"] = f"{bpb:.3f}"
        self._validation = time.perf_counter() - began
        self._aside += self._validation
        return bpb

    def save(self) -> None:
        """Save everything that a resumed run needs."""
        began = time.perf_counter()
        self.log.sync()
        state.save(self.run, self.folder)
        self._saved = time.perf_counter()
        self._save = self._saved - began
        self._aside += self._save

    def _save_is_due(self, validated: bool) -> bool:
        """Whether to save after this step."""
        since = time.perf_counter() - self._saved
        if since > SAVE_SECONDS or self.run.step == self.run.total:
            return True
        if self.config.save_interval:
            return self._due(self.config.save_interval)
        return validated and self._save <= SAVE_SHARE * since

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision context of forward passes; weights stay float32 in all of them."""
        return autocast(self.config.dtype, self.device)

    def _plan_is_due(self) -> bool:
        """Whether it is time to plan (again) how many steps a run of some minutes has."""
        run, minutes = self.run, self.config.minutes
        if minutes is None or run.plans == len(PLANS) or run.step == run.total:
            return False
        if run.step - self._mark[0] < CALIBRATION_STEPS:
            return False
        return run.total is None or self._progress() >= PLANS[run.plans]

    def _progress(self) -> float:
        """The share of a timed run that is over: of its minutes or of its steps."""
        run = self.run
        return max(run.seconds / (60 * (self.config.minutes or 1)), run.step / (run.total or 1))

    def _plan(self) -> None:
        """Set how many steps the run has, from the speed since the plan before.

        What is planned is saved, so a run that is resumed later goes on as it would have.
        """
        run, config = self.run, self.config
        per_step = self._seconds_per_step()
        self._measure_from_here()
        left = (config.minutes or 0.0) * 60 - run.seconds
        if run.total is None:
            self.validate()
            run.reserve = self._validation * self._whole
            left -= self._validation
        if not config.eval_interval:
            apart = max(
                60 * (config.minutes or 0.0) / VALIDATIONS, self._validation / VALIDATION_SHARE
            )
            run.interval = math.ceil(apart / per_step)
        cost = per_step + self._validation / run.interval
        if config.save_interval:
            cost += self._save / config.save_interval
        else:
            cost += min(self._save / run.interval, SAVE_SHARE * per_step)
        run.total = run.step + max(1, int((left - run.reserve) / cost))
        progress = self._progress()
        # Never twice for a share, if more steps are left now: soon after a plan, speed is noise.
        run.plans = max(run.plans + 1, 1 + sum(progress >= share for share in PLANS[1:]))
        self.bar.total = run.total
        self.bar.refresh()

    def _measure_from_here(self) -> None:
        """Begin to time steps."""
        self._mark, self._aside = (self.run.step, self.run.seconds), 0.0

    def _seconds_per_step(self) -> float:
        """Seconds of a step since then, without what was not a step."""
        steps = self.run.step - self._mark[0]
        return (self.run.seconds - self._mark[1] - self._aside) / steps

    def _due(self, interval: int) -> bool:
        """Whether something that happens every `interval` steps, and at the end, is due."""
        return self.run.step == self.run.total or self.run.step % interval == 0

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
        if speed is None or self.run.step - self._mark[0] > 4 * self._lag:
            tokens = self.config.batch_size * self.config.accumulate * self.config.length
            speed = f"{tokens / self._seconds_per_step():,.0f}"
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
