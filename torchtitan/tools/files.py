"""Small files, read as a user is to hear of them."""

import json
from pathlib import Path
from typing import Any

from torchtitan.config.errors import ConfigError


def read_json(file: Path, error: type[ConfigError]) -> dict[str, Any]:
    """The object in a file of JSON; raises `error` where there is none."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as problem:
        raise error(f"{file} cannot be read: {problem}; get it anew, or mend it") from problem
    if not isinstance(content, dict):
        found = json.dumps(content)[:40]
        raise error(f"{file} cannot be read: expected a JSON object, got {found}; get it anew, or mend it")
    return content
