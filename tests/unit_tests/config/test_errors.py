"""Whether a restart may heal what ended a run: the launcher decides by the exit status."""

import pytest

from torchtitan.config.errors import (
    EXIT_MISTAKE,
    CheckpointError,
    ConfigError,
    DatasetError,
    LigerNotInstalledError,
    NonFiniteError,
    UnreachableDataError,
    UnsavedError,
    exit_status,
)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("an option"), EXIT_MISTAKE),
        (DatasetError("no data"), EXIT_MISTAKE),
        (CheckpointError("another model"), EXIT_MISTAKE),
        (LigerNotInstalledError(), EXIT_MISTAKE),
        (NonFiniteError(3, "the loss is nan"), EXIT_MISTAKE),
        (UnreachableDataError("no network"), 1),
        (UnsavedError("the disk is full"), 1),
        (RuntimeError("a bug, or a GPU that fell off"), 1),
    ],
)
def test_only_what_cannot_heal_has_the_status_of_a_mistake(error, status):
    assert exit_status(error) == status
