import datetime
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from tests.unit_tests.distributed.processes import run_processes
from torchtitan.config.degrees import ParallelDims
from torchtitan.config.errors import ConfigError
from torchtitan.config.sections import Comm
from torchtitan.distributed import utils
from torchtitan.distributed.mesh import build_mesh
from torchtitan.distributed.utils import (
    check_gpus,
    dist_max,
    dist_sum,
    get_clip_factor,
    get_start_time,
    get_total_norm,
    get_world,
    init_distributed,
    set_determinism,
    set_pg_timeouts,
    sum_each_over_world,
    tells_all,
)


def on_two_ranks() -> dict[str, Any]:
    rank = dist.get_rank()
    mesh = build_mesh(ParallelDims(dp_shard=2), "cpu")
    found: dict[str, Any] = {}

    mine = torch.tensor([1.0 + rank, 5.0 - rank])
    found["sum"], found["max"] = dist_sum(mine, mesh["dp"]), dist_max(mine, mesh["dp"])
    found["over one"] = dist_sum(mine, mesh["tp"])
    found["untouched"] = mine
    with CommDebugMode() as comm:
        found["each"] = [sum_each_over_world(told) for told in ({}, {"a": mine[0], "b": mine[1]})]
    found["reductions"] = comm.get_total_counts()

    generator = torch.Generator().manual_seed(0)
    big, small, alike = (torch.randn(shape, generator=generator) for shape in ((5, 3), (1, 2), (4,)))
    found["expected norm"] = torch.cat([x.flatten() for x in (big, small, alike)]).norm()
    on_one_mesh = [distribute_tensor(big, mesh["dp"], [Shard(0)]), distribute_tensor(small, mesh["dp"], [Shard(0)])]
    on_other = [distribute_tensor(alike, mesh["hsdp"], [Shard(0), Replicate()])]
    found["norm"] = get_total_norm([*on_one_mesh, *on_other])

    stages = build_mesh(ParallelDims(pp=2), "cpu")
    stage = [big, alike] if rank == 0 else [small]
    found["norm over stages"] = get_total_norm(
        [distribute_tensor(grad, stages["dp_shard_cp"], [Shard(0)]) for grad in stage]
    )

    device = torch.device("cpu")
    found["drawn"], found["given"] = set_determinism(None, device), set_determinism(11, device)
    found["random"] = torch.rand(1)
    clock = SimpleNamespace(now=lambda: datetime.datetime(2026, 1, 31, 12, 0, 59 - rank))
    utils.datetime = SimpleNamespace(datetime=clock, timedelta=datetime.timedelta)  # of this process alone
    found["start"] = get_start_time()

    set_pg_timeouts(77, mesh, device)
    groups = [*mesh.get_groups(), dist.group.WORLD]
    found["timeouts"] = {group._get_backend(device).options._timeout.seconds for group in groups}
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_processes(on_two_ranks, 2)


def test_reductions_give_new_tensors(ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(ranks):
        assert found["sum"].tolist() == [3.0, 9.0]
        assert found["max"].tolist() == [2.0, 5.0]
        assert found["over one"].tolist() == found["untouched"].tolist() == [1.0 + rank, 5.0 - rank]


def test_several_numbers_take_one_reduction(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["each"] == [{}, {"a": 3.0, "b": 9.0}] and found["reductions"] == 1


def test_norm_is_that_of_all_gradients_whatever_mesh_they_are_on(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        torch.testing.assert_close(found["norm"], found["expected norm"])


def test_norm_covers_every_pipeline_stage(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        torch.testing.assert_close(found["norm over stages"], found["expected norm"])


def test_all_ranks_have_one_seed(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    assert first["drawn"] == second["drawn"] != 11
    assert first["given"] == second["given"] == 11
    assert torch.equal(first["random"], second["random"])


def test_all_ranks_have_one_start_time(ranks: list[dict[str, Any]]) -> None:
    assert [found["start"] for found in ranks] == ["20260131-120059"] * 2


def test_timeout_of_every_group_changes(ranks: list[dict[str, Any]]) -> None:
    assert [found["timeouts"] for found in ranks] == [{77}, {77}]


def test_clip_factor_never_enlarges() -> None:
    assert get_clip_factor(torch.tensor(4.0), 1.0).item() == pytest.approx(0.25)
    assert get_clip_factor(torch.tensor(0.5), 1.0).item() == 1.0


def test_one_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    world = get_world()
    assert (world.rank, world.size, world.local_rank) == (0, 1, 0)
    device = init_distributed(Comm(), dump_folder="unused", device_type="cpu")
    try:
        assert device == torch.device("cpu")
        assert dist.get_world_size() == 1
        assert get_total_norm([torch.tensor([3.0, 4.0])]).item() == 5.0
    finally:
        dist.destroy_process_group()


def test_norm_keeps_its_digits_over_many_elements() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        grad = torch.randn(5_000_000, generator=torch.Generator().manual_seed(0))
        assert get_total_norm([grad]).item() == pytest.approx(grad.double().norm().item(), rel=1e-6)
        # a few large elements, then many small ones, each of which is lost in the sum of all before
        uneven = torch.cat([torch.full((10,), 1.0), torch.full((60_000,), 1e-3)])
        assert get_total_norm([uneven]).item() == pytest.approx(uneven.double().norm().item(), rel=1e-6)
    finally:
        dist.destroy_process_group()


def test_deterministic_runs_refuse_kernels_that_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        set_determinism(1, torch.device("cpu"), deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        dist.destroy_process_group()


def test_gpus_that_torch_cannot_use_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TORCHTITAN_NUM_GPUS", raising=False)
    check_gpus()
    monkeypatch.setenv("TORCHTITAN_NUM_GPUS", "0")
    check_gpus()
    monkeypatch.setenv("TORCHTITAN_NUM_GPUS", "8")
    with pytest.raises(ConfigError, match=r"has 8 GPUs, and torch .* cannot use them; .* CUDA_VISIBLE_DEVICES= to"):
        check_gpus()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_gpus()


@pytest.mark.parametrize(
    ("rank", "local_rank", "log_rank", "tells"),
    [(0, 0, None, True), (1, 1, None, False), (8, 0, "0,3", False), (11, 3, "0,3", True), (0, 0, "3", True)],
)
def test_one_rank_of_all_tells_what_is_no_warning(
    rank: int, local_rank: int, log_rank: str | None, tells: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.delenv("TORCHTITAN_LOG_RANK", raising=False)
    if log_rank is not None:
        monkeypatch.setenv("TORCHTITAN_LOG_RANK", log_rank)
    assert tells_all() is tells


@pytest.mark.parametrize("status", [0, 3])
def test_a_process_that_is_ended_keeps_its_status_and_all_that_it_wrote(status: int) -> None:
    program = f"""
import atexit, sys
from torchtitan.distributed.utils import end_process
atexit.register(print, "registered")
print("buffered", file=sys.stdout)
class Freed:
    def __del__(self): print("freed")
freed_by_python_s_end = Freed()
end_process({status})
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (status, "buffered\nregistered\n"), ended.stderr


def test_a_group_that_cannot_be_made_has_lost_no_rank() -> None:
    error = dist.DistStoreError("the address is in use")
    assert not utils.is_of_lost_rank(error)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert utils.is_of_lost_rank(error)
        assert not utils.is_of_lost_rank(KeyError("a bug"))
    finally:
        dist.destroy_process_group()
