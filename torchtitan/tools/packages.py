"""Which packages that only some runs need are there; nothing is imported."""

from importlib.util import find_spec


def is_installed(name: str) -> bool:
    return find_spec(name) is not None


def is_liger_installed() -> bool:
    return is_installed("liger_kernel")
