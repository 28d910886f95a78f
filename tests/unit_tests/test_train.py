"""How main() ends: what it tells the trainer about it."""

from types import SimpleNamespace

import pytest

from torchtitan import train
from torchtitan.config.errors import NonFiniteError

OPTIONS = ["--model.tokenizer_path", "tests/assets/tokenizer"]


@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (None, False),
        (NonFiniteError(3, "the loss is nan"), True),
        (KeyError("a bug"), True),
        (KeyboardInterrupt(), True),
        (SystemExit(train.EXIT_PREEMPTED), True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_the_metrics_learn_whether_the_run_failed(
    monkeypatch: pytest.MonkeyPatch, error: BaseException | None, failed: bool
) -> None:
    told: list[bool] = []

    def end() -> None:
        if error is not None:
            raise error

    trainer = SimpleNamespace(train=end, close=lambda *, failed: told.append(failed))
    monkeypatch.setattr(train, "Trainer", lambda config: trainer)
    monkeypatch.setattr(train, "end_with_launcher", lambda: None)
    try:
        train.main(OPTIONS)
    except (KeyError, SystemExit) as raised:
        assert raised is error
    assert told == [failed]
