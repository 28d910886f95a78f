"""What a rank says when it fails, for the others to read: they notice only that a collective of theirs fails.

Each failing rank leaves a line in the store at which the ranks met: its error, or nothing where it only misses
another rank. A rank that has left none by the time the others have hangs, or was killed.
"""

import json
import re
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

# Collectives that wait for one rank time out one after the other, as they began.
_PATIENCE_S = 5.0
_KEY = "last_words"


@dataclass(frozen=True)
class LostRanks:
    """Why a collective of this rank failed."""

    symptom: str
    """What the collective said."""
    said: dict[int, str]
    """Ranks that failed for reasons of their own."""
    silent: list[int]
    """Ranks that hang, or ended without a word."""

    def report(self, step: int) -> str:
        """What the user reads."""
        causes = [f"rank {rank} ended with {words}" for rank, words in sorted(self.said.items())]
        if self.silent:
            ranks = ", ".join(map(str, self.silent[:8])) + (", ..." if len(self.silent) > 8 else "")
            causes.append(f"rank {ranks} gave no sign: it hangs or has ended, see its own log")
        if not causes:
            causes.append("all ranks are there: the network failed, or one of them was slower than [comm] allows")
        return (
            f"LostRankError: a collective of rank {dist.get_rank()} failed in step {step} ({self.symptom});"
            f" {'; '.join(causes)}"
        )


def leave(words: str) -> None:
    """Tell the other ranks why this one ends."""
    if dist.is_initialized():
        with suppress(RuntimeError):  # the store ends with the rank, or the launcher, that keeps it
            line = json.dumps([dist.get_rank(), words]) + "\n"
            _get_default_store().append(_KEY, line)  # type: ignore[attr-defined]  # torch has it, and no type for it


def is_of_lost_rank(error: Exception) -> bool:
    """Whether a collective failed, and not this rank itself."""
    of_collective = isinstance(error, dist.DistError) or "gloo/transport" in str(error)
    return of_collective and dist.is_initialized()


def find_lost_ranks(error: Exception) -> LostRanks:
    """Wait for what the other ranks say of the failure."""
    leave("")
    heard = {dist.get_rank(): ""}
    # In a thread, because a store whose rank hangs never answers.
    listener = threading.Thread(target=_listen, args=(heard, dist.get_world_size()), daemon=True)
    listener.start()
    listener.join(_PATIENCE_S)
    heard = dict(heard)
    return LostRanks(
        # without the line of its source code, and advice to read logs
        symptom=re.sub(r"^\[.*?\] |\. This is typically.*", "", str(error).partition("\n")[0]),
        said={rank: words for rank, words in heard.items() if words},
        silent=[rank for rank in range(dist.get_world_size()) if rank not in heard],
    )


def _listen(heard: dict[int, str], world_size: int) -> None:
    """Fill in what each rank has said, until all have."""
    store = _get_default_store()
    with suppress(RuntimeError):
        while len(heard) < world_size:
            time.sleep(0.2)
            if store.check([_KEY]):
                heard.update(json.loads(line) for line in store.get(_KEY).decode().splitlines())


__all__ = ["LostRanks", "find_lost_ranks", "is_of_lost_rank", "leave"]
