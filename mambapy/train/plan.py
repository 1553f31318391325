"""How many steps fit into a run of some minutes, and when to validate and save.

    Pace                                times what a run does: begin_again, validated, saved
    is_due, make                        a plan: how many steps, and how far validations are apart
    validation_is_due, save_is_due      what comes after a step

A step's time is told apart from that of validations and saves, so that a plan made soon after one
of them is not wrong.
"""

import math
import time

from mambapy.train.state import Run

# That many steps are timed before the number of steps is planned; it is planned again after PLANS'
# shares of the time, or of the steps, since a machine's speed changes.
CALIBRATION_STEPS = 10
# But after that share of the time at the latest.
LATEST = 0.25
PLANS = (0.0, 0.1, 0.25, 0.5, 0.75)
# With `eval_interval=0`, about that many validations in a run; with `minutes`, at most that many,
# and no more than take that share of its time.
VALIDATIONS = 20
VALIDATION_SHARE = 0.1
# With `save_interval=0`, a run is saved at validations, if saving takes no more than that share of
# the time; and at the latest after that long, whatever the settings.
SAVE_SHARE = 0.05
SAVE_SECONDS = 300.0


class Pace:
    """What a run's time goes into; steps apart from validations and saves.

    Args:
        run: whose plan it makes.
        whole: how much longer the last validation is, which reads all of the held-out text.
    """

    def __init__(self, run: Run, whole: float) -> None:
        self.run, self.config, self.whole = run, run.config, whole
        # Seconds of the last validation and of the last save.
        self.validation, self.save = run.reserve / whole, 0.0
        self._saved_at = time.perf_counter()
        self.begin_again()

    def begin_again(self) -> None:
        """Time steps from here on."""
        self._since = self.run.step, self.run.seconds
        self._aside = 0.0

    def validated(self, seconds: float) -> None:
        """Note how long a validation took."""
        self.validation = seconds
        self._aside += seconds

    def saved(self, seconds: float) -> None:
        """Note how long a save took that ends now."""
        self.save, self._saved_at = seconds, time.perf_counter()
        self._aside += seconds

    @property
    def steps(self) -> int:
        """How many have been timed."""
        return self.run.step - self._since[0]

    def per_step(self) -> float:
        """Seconds of a step, without what was not a step."""
        return (self.run.seconds - self._since[1] - self._aside) / self.steps

    def validation_is_due(self) -> bool:
        """Whether to validate after this step."""
        run = self.run
        if run.total is None:
            return False
        return run.step == run.total or run.step - run.validated >= run.interval

    def save_is_due(self, validated: bool) -> bool:
        """Whether to save after this step."""
        since = time.perf_counter() - self._saved_at
        if since > SAVE_SECONDS or self.run.step == self.run.total:
            return True
        if self.config.save_interval:
            return self.run.step % self.config.save_interval == 0
        return validated and self.save <= SAVE_SHARE * since

    def is_due(self) -> bool:
        """Whether it is time to plan (again) how many steps a run of some minutes has."""
        run = self.run
        if self.config.minutes is None or run.plans == len(PLANS) or run.step == run.total:
            return False
        if self.steps < CALIBRATION_STEPS:
            late = run.seconds >= LATEST * 60 * self.config.minutes
            return run.total is None and self.steps > 0 and late
        return run.total is None or self._progress() >= PLANS[run.plans]

    def _progress(self) -> float:
        """The share of a timed run that is over: of its minutes or of its steps."""
        run = self.run
        return max(run.seconds / (60 * (self.config.minutes or 1)), run.step / (run.total or 1))

    def make(self, per_step: float, left: float) -> None:
        """Set how many steps the run has.

        Args:
            per_step: seconds of one, as `per_step` says.
            left: seconds of the run that are left.
        """
        run, config = self.run, self.config
        if not config.eval_interval:
            apart = max(
                60 * (config.minutes or 0.0) / VALIDATIONS, self.validation / VALIDATION_SHARE
            )
            run.interval = math.ceil(apart / per_step)
        cost = per_step + self.validation / run.interval
        if config.save_interval:
            cost += self.save / config.save_interval
        else:
            cost += min(self.save / run.interval, SAVE_SHARE * per_step)
        # Each plan is saved, and the end.
        left -= run.reserve + self.save * (len(PLANS) - run.plans + 1)
        run.total = run.step + max(1, int(left / cost))
        progress = self._progress()
        # Never twice for a share, if more steps are left now: soon after a plan, speed is noise.
        run.plans = max(run.plans + 1, 1 + sum(progress >= share for share in PLANS[1:]))
