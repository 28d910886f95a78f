"""Mistakes of the user, each with a message that is complete in itself.

Whoever starts a run prints `error.report()` and exits with `exit_status(error)`, without a traceback.
Those that the documentation of the fused loss calls an ImportError or a RuntimeError are that as well.
"""

from collections.abc import Sequence

EXIT_MISTAKE = 78  # EX_CONFIG of sysexits.h
"""Status after what no restart heals: a mistake in the configuration or the data, or a run that has diverged."""

EXIT_OUT_OF_MEMORY = 79
"""Status of a rank whose start over, with more recomputation, may fit: the launcher starts all ranks again."""


class ConfigError(ValueError):
    """An option, or a combination of options, that cannot work."""

    may_heal: bool = False
    """Whether a start with the same options may go well."""

    title: str | None = None
    """What the documentation calls it, where that is not the class's own name."""

    def report(self) -> str:
        """What the user reads."""
        return f"{self.title or type(self).__name__}: {self}"


class DatasetError(ConfigError):
    """Data that is missing, empty or not in the format it should be in."""


class UnreachableDataError(DatasetError):
    """Data on another machine, which may answer later."""

    may_heal = True


class TokenizerError(ConfigError):
    """A tokenizer that cannot be read or does not fit the model."""


class UnknownTextError(TokenizerError):
    """A text that the tokenizer has no tokens for."""

    title = "TokenizerError"

    def __init__(self, message: str, text: str) -> None:
        super().__init__(message)
        self.text = text


class CheckpointError(ConfigError):
    """A checkpoint that is missing, damaged or does not fit the run."""


class UnsavedError(CheckpointError):
    """A checkpoint that the run must not end without, and that the disk did not take."""

    may_heal = True


class LigerNotInstalledError(ConfigError, ImportError):
    """The fused loss is asked for and liger-kernel is missing."""

    title = "ImportError"

    def __init__(self) -> None:
        super().__init__("Liger-Kernel is not installed. Please install it with: pip install liger-kernel")


class LigerTooOldError(ConfigError, ImportError):
    """The fused loss is asked for and liger-kernel is a release that cannot be used."""

    title = "ImportError"

    def __init__(self, version: str, min_version: str) -> None:
        super().__init__(
            f"liger-kernel {version} is too old: the fused loss needs {min_version} or newer. "
            "Update it with: pip install -U liger-kernel"
        )


class FusedLossWithPipelineError(ConfigError, RuntimeError):
    """The fused loss is asked for together with pipeline parallelism."""

    title = "RuntimeError"

    def __init__(self, pipeline_parallel_degree: int) -> None:
        super().__init__(
            "Liger-Kernel fused linear cross entropy loss is not compatible with Pipeline Parallelism"
            f" (parallelism.pipeline_parallel_degree={pipeline_parallel_degree})."
            " Disable one of them: --parallelism.pipeline_parallel_degree 1"
            " or --liger_kernel.enable_fused_linear_cross_entropy False"
        )


class NonFiniteError(ArithmeticError):
    """The loss, the gradient or the weights became inf or nan; nothing of that is saved."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(what)
        self.step = step

    def report(self) -> str:
        """What the user reads."""
        return (
            f"NonFiniteError: at step {self.step} {self}. "
            "Usual causes: a learning rate that is too high (optimizer.lr, lr_scheduler.warmup_steps), or bad data. "
            "Continue from the last checkpoint with other values."
        )


class RecomputeMoreError(MemoryError):
    """Memory ran out in a step, of a run that chooses its recomputation and has a leaner choice left."""

    def report(self) -> str:
        """What the user reads."""
        return f"Out of memory: {self}"


def exit_status(error: Exception) -> int:
    """Of a process that ends because of this."""
    if isinstance(error, NonFiniteError) or (isinstance(error, ConfigError) and not error.may_heal):
        return EXIT_MISTAKE
    return EXIT_OUT_OF_MEMORY if isinstance(error, RecomputeMoreError) else 1


def raise_all(errors: Sequence[ConfigError]) -> None:
    """Raise the errors that were found, several as one with a line for each; nothing if there are none."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ConfigError(f"{len(errors)} mistakes:" + "".join(f"\n- {error}" for error in errors))
