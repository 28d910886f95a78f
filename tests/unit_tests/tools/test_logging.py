import re

import pytest

from torchtitan.tools.logging import init_logger, logger


def test_lines_are_upstreams_and_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    init_logger(warnings_only=True)
    logger.info("not said")
    init_logger()
    logger.info("hello")
    assert re.fullmatch(
        r"\[titan\] \d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} - root - INFO - hello\n", capsys.readouterr().out
    )
