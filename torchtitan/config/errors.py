"""Mistakes of the user, each with a message that is complete in itself.

Whoever starts a run prints `error.report()` and exits with status 1, without a traceback.
Those that the documentation of the fused loss calls an ImportError or a RuntimeError are that as well.
"""

from collections.abc import Sequence


class ConfigError(ValueError):
    """An option, or a combination of options, that cannot work."""

    title: str | None = None
    """What the documentation calls it, where that is not the class's own name."""

    def report(self) -> str:
        """What the user reads."""
        return f"{self.title or type(self).__name__}: {self}"


class DatasetError(ConfigError):
    """Data that is missing, empty or not in the format it should be in."""


class TokenizerError(ConfigError):
    """A tokenizer that cannot be read or does not fit the model."""


class CheckpointError(ConfigError):
    """A checkpoint that is missing, damaged or does not fit the run."""


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


def raise_all(errors: Sequence[ConfigError]) -> None:
    """Raise the errors that were found, several as one with a line for each; nothing if there are none."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise ConfigError(f"{len(errors)} mistakes:" + "".join(f"\n- {error}" for error in errors))
