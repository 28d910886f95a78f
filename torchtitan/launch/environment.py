"""The environment of a start: variables of upstream's, keys, compilers, and the workers' defaults, which are set here.

Nothing is imported or run. What the workers and the commands read of it is in distributed/utils.py and cli/estimate.py.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from torchtitan.config.errors import ConfigError
from torchtitan.config.upstream import UPSTREAM_VARIABLES


def set_defaults_of_workers(nproc: int) -> None:
    """Set what torch reads at its start, where the user has not: for `nproc` workers on this machine."""
    # They share the cores; torchrun alone would give each of several a single thread.
    if not os.environ.get("OMP_NUM_THREADS"):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores // nproc))
    # Segments that grow keep the CUDA allocator from fragmenting.
    if not os.environ.get("PYTORCH_CUDA_ALLOC_CONF") and not os.environ.get("PYTORCH_ALLOC_CONF"):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def describe_upstream_variables() -> str | None:
    """One line about those that are set, which only upstream torchtitan reads; None if there are none."""
    found = [f"{name} ({instead})" for name, instead in UPSTREAM_VARIABLES.items() if os.environ.get(name)]
    return f"Environment variables of upstream torchtitan that do nothing here: {'; '.join(found)}" if found else None


def about_wandb_key() -> Iterator[ConfigError]:
    """What metrics.enable_wandb needs, and would miss only when the model has been built."""
    if not _has_wandb_key():
        yield ConfigError(
            "metrics.enable_wandb needs a key: run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline to keep"
            " the metrics on this machine"
        )


def _has_wandb_key() -> bool:
    """As wandb looks for one: in the environment, in the netrc file, or none is needed."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    if os.environ.get("WANDB_MODE", "online") not in ("online", "shared"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "").partition("://")[2].split("/")[0].split(":")[0]
    netrc = [Path(os.environ["NETRC"])] if "NETRC" in os.environ else [Path.home() / ".netrc", Path.home() / "_netrc"]
    settings = [Path("wandb/settings"), Path.home() / ".config/wandb/settings"]
    return any(_holds(file, host or "wandb.ai") for file in netrc) or any(
        _holds(file, word) for file in settings for word in ("offline", "disabled", "api_key")
    )


def _holds(file: Path, word: str) -> bool:
    try:
        return word in file.read_text(errors="replace")
    except OSError:
        return False


def about_compiler(num_gpus: int) -> Iterator[ConfigError]:
    """What training.compile needs: torch compiles C++ for a CPU, and Triton a little C for its kernels on a GPU."""
    if num_gpus > 0:
        variable, language, names = "CC", "C", ["gcc", "clang"]
    else:
        variable, language, names = "CXX", "C++", ["clang++" if sys.platform == "darwin" else "g++"]
    given = shlex.split(os.environ.get(variable, ""))
    if given:
        names = given[:1]
    if not any(shutil.which(name) for name in names):
        looked_for = f"{variable}={given[0]} is not there" if given else f"there is no {' and no '.join(names)}"
        yield ConfigError(
            f"training.compile needs a {language} compiler, and {looked_for}; install one (package g++ or gcc), name"
            f" one with {variable}, or leave training.compile off"
        )
