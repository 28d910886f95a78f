"""What the launcher puts into the environment of its workers."""

import os

import pytest

from torchtitan.launch.environment import set_defaults_of_workers

NAMES = ("OMP_NUM_THREADS", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("nproc", "given", "expected"),
    [
        (1, {}, (str(CORES), "expandable_segments:True", None)),
        (2, {"OMP_NUM_THREADS": ""}, (str(max(1, CORES // 2)), "expandable_segments:True", None)),
        (10**6, {"PYTORCH_ALLOC_CONF": "backend:native"}, ("1", "backend:native", None)),
        (2, {"OMP_NUM_THREADS": "7", "PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, ("7", None, "backend:native")),
    ],
)
def test_what_the_user_has_set_stays(
    monkeypatch: pytest.MonkeyPatch, nproc: int, given: dict[str, str], expected: tuple[str | None, ...]
) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that all is as before when the test ends
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    set_defaults_of_workers(nproc)
    assert tuple(os.environ.get(name) for name in NAMES) == expected
