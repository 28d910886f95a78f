"""What a save costs the training beside it: ours, and torch's own asynchronous ones, one after the other.

    python scripts/benchmark_checkpoint.py 4        # GiB of state

Some hundred float32 tensors are saved twice in each mode, while a loop runs steps of small kernels, which the host
launches one by one, as where a model is not compiled. A line of JSON says how long each save kept the loop from its
next step and how long it took; how fast steps were beside the second; and what the mode had of the host's memory.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that a checkout need not be installed

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

from torchtitan.checkpoint.background import BackgroundSaver
from torchtitan.checkpoint.plan import Planner
from torchtitan.checkpoint.ranks import Ranks
from torchtitan.checkpoint.write import Writer, save

State = dict[str, torch.Tensor]
Saves = Generator[tuple[Callable[[], object], Callable[[], bool]], None, None]
"""For each save: what waits until the state may change, and whether all is written."""
NUM_TENSORS, NUM_KERNELS = 384, 1000


def synchronous(state: State, folder: Path) -> Saves:
    planner = Planner(Ranks(alone=True))
    while True:
        save(folder, state, planner=planner)
        yield lambda: None, lambda: True


def ours(state: State, folder: Path, *, pinned: bool) -> Saves:
    planner = Planner(Ranks(alone=True))

    def save_with(writer: Writer) -> None:
        save(folder, state, planner=planner, writer=writer)

    with closing(BackgroundSaver(pinned=pinned)) as saver:
        while True:
            saver.start(save_with)
            assert saver._saving is not None
            yield saver.wait_for_copy, saver._saving.done
            saver.wait()


def torchs(state: State, folder: Path, *, kind: AsyncCheckpointerType) -> Saves:
    on_gpu = torch.cuda.is_available()
    options = StagingOptions(on_gpu, kind == AsyncCheckpointerType.PROCESS, True, on_gpu)
    while True:
        stager = DefaultStager(options)  # for one save: torch 2.11 closes it then
        answer: Any = async_save(state, checkpoint_id=folder, async_checkpointer_type=kind, async_stager=stager)
        yield answer.staging_completion.result, answer.upload_completion.done
        answer.upload_completion.result()
        stager.close()


MODES: dict[str, Callable[[State, Path], Saves]] = {
    "disabled": synchronous,
    "async": partial(ours, pinned=False),
    "async_with_pinned_mem": partial(ours, pinned=True),
    "torch, thread": partial(torchs, kind=AsyncCheckpointerType.THREAD),
    "torch, process": partial(torchs, kind=AsyncCheckpointerType.PROCESS),
}


def run_step(x: torch.Tensor) -> float:
    begin = time.perf_counter()
    for _ in range(NUM_KERNELS):
        x = torch.tanh(x @ x)
    if x.is_cuda:
        torch.cuda.current_stream().synchronize()  # not the stream of the copy
    return time.perf_counter() - begin


def get_host_gib() -> float:
    total, _, available = (int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines()[:3])
    return (total - available) / 2**20


def measure(saves: Saves, x: torch.Tensor) -> dict[str, Any]:
    alone, host_before = [run_step(x) for _ in range(20)], get_host_gib()
    result: dict[str, Any] = {}
    for name in ("first", "second"):
        begin = time.perf_counter()
        wait_for_copy, is_written = next(saves)
        steps = [run_step(x)]
        wait_for_copy()
        blocked = time.perf_counter() - begin - steps[0]
        host = get_host_gib() - host_before
        while not is_written():
            steps.append(run_step(x))
        result |= {f"{name}_blocked_ms": round(1e3 * blocked), f"{name}_s": round(time.perf_counter() - begin, 1)}
    step = statistics.mean(alone + [run_step(x) for _ in range(20)])
    speed = step / statistics.mean(steps)
    return result | {"step_ms": round(1e3 * step, 1), "speed_beside": round(speed, 2), "host_gib": round(host, 1)}


def main() -> None:
    gib = float(sys.argv[1]) if sys.argv[1:] else 3.0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    size = int(gib * 2**30 / 4 / NUM_TENSORS)
    state = {f"layers.{i}.weight": torch.randn(size, device=device) for i in range(NUM_TENSORS)}
    x = torch.randn(128, 128, device=device) / 128
    run_step(x)
    for name, mode in MODES.items():
        with tempfile.TemporaryDirectory() as folder, closing(mode(state, Path(folder))) as saves:
            print(json.dumps({"mode": name, "gib": gib} | measure(saves, x)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":  # torch's process imports this file too
    main()
