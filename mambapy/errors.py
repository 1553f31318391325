"""Every error this package raises on purpose: what was wrong, what was expected, what to do.

All derive from `MambapyError`, which is how the command line tells a user's mistake (one line,
exit status 2) from a defect of ours (a traceback).
"""


class MambapyError(Exception):
    """Base of all errors raised on purpose by mambapy."""


class ConfigError(MambapyError, ValueError):
    """A configuration value, key or combination that cannot work."""


class ShapeError(MambapyError, ValueError):
    """A tensor whose shape, dtype, device or values do not fit the call."""


class BackendError(MambapyError, RuntimeError):
    """A backend that was asked for by name and cannot run these tensors."""


class CheckpointError(MambapyError, RuntimeError):
    """A checkpoint that is missing, damaged, foreign, or could not be written."""


class DataError(MambapyError, ValueError):
    """Training or prompt data that cannot be used."""


class TrainingError(MambapyError, RuntimeError):
    """A training run that cannot start or go on."""


class MissingExtraError(MambapyError, ImportError):
    """An optional dependency that this call needs and that is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        """Name the missing `package` and the `extra` that brings it."""
        super().__init__(f"{package} is not installed; pip install 'mambapy[{extra}]' brings it")
