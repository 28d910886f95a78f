"""Each rank decides for itself what it writes, and together they write everything once; a plan lasts."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.unit_tests.checkpoint.checkpointed_run import assert_same
from tests.unit_tests.checkpoint.simulated_ranks import divide, mesh_of, run_ranks
from torchtitan.checkpoint.plan import Planner
from torchtitan.checkpoint.ranks import Ranks
from torchtitan.checkpoint.storage import load_alone, read_metadata
from torchtitan.checkpoint.write import CheckpointWriter, Digest, make_metadata, save
from torchtitan.config.errors import CheckpointError

NUM_RANKS = 64  # 512 pass as well, in a minute


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Two copies, shards, tensor parallel over 8. Nothing can be communicated."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=NUM_RANKS)
    yield init_device_mesh("cpu", (2, NUM_RANKS // 16, 8), mesh_dim_names=("dp_replicate", "dp_shard_cp", "tp"))
    dist.destroy_process_group()


COPIES = Replicate()
LAYOUTS = {
    "rows.weight": (COPIES, _StridedShard(0, split_factor=8), Shard(0)),  # as FSDP divides what TP has divided
    "columns.weight": (COPIES, Shard(0), Shard(1)),
    "norm.weight": (COPIES, Shard(0), COPIES),
    "uneven.weight": (COPIES, Shard(0), COPIES),  # most ranks have none of it
}


def whole_state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"rows.weight": (512, 3), "columns.weight": (64, 16), "norm.weight": (64,), "uneven.weight": (5, 2)}
    return {key: torch.randn(size, generator=generator) for key, size in sizes.items()}


def test_many_ranks_save_what_one_and_what_each_loads(tmp_path, mesh):
    """All through the code that real ranks run, but for the collectives of ranks.py."""
    whole, meshes = whole_state(), [mesh_of(rank, mesh) for rank in range(NUM_RANKS)]

    def save_twice(ranks: Ranks) -> int:
        planner, writer = Planner(ranks), CountingWriter()
        state = divide(whole, LAYOUTS, meshes[ranks.rank])
        for step in (1, 2):
            values = {
                "train_state.step": step,
                f"rng.rank_{ranks.rank}": "x" * (200 + step),
                "count": torch.tensor(step),
            }
            save(tmp_path / f"step-{step}", {**state, **values}, planner=planner, writer=writer)
        return writer.num_tables

    written = run_ranks(NUM_RANKS, save_twice)
    assert written[0] == NUM_RANKS  # of the first save: the second one says what lies where with the same bytes
    assert (tmp_path / "step-1/.metadata").read_bytes() == (tmp_path / "step-2/.metadata").read_bytes()

    alone = {key: torch.zeros_like(tensor) for key, tensor in whole.items()}
    more = {"count": torch.tensor(0), "train_state.step": 0, "rng.rank_63": ""}
    loaded = {**alone, **more}
    load_alone(tmp_path / "step-2", loaded)
    assert_same({key: loaded[key] for key in whole}, whole)
    assert (loaded["count"], loaded["train_state.step"], loaded["rng.rank_63"]) == (2, 2, "x" * 202)

    metadata = read_metadata(tmp_path / "step-2")
    weights = {entry.relative_path for index, entry in metadata.storage_data.items() if index.fqn.endswith("weight")}
    assert {int(name.split("_")[2]) // (NUM_RANKS // 2) for name in weights} == {0, 1}  # the copies share the writing

    def load_share(ranks: Ranks) -> None:
        expected = divide(whole, LAYOUTS, meshes[ranks.rank])
        share = divide({key: torch.zeros_like(tensor) for key, tensor in whole.items()}, LAYOUTS, meshes[ranks.rank])
        ranks.together(lambda: load_alone(tmp_path / "step-2", share, metadata))
        assert_same({k: t.to_local() for k, t in share.items()}, {k: t.to_local() for k, t in expected.items()})

    run_ranks(NUM_RANKS, load_share)


class CountingWriter(CheckpointWriter):
    def __init__(self) -> None:
        super().__init__()
        self.num_tables = 0

    def write_metadata(self, path, files: list[Digest], tables: list[bytes] | None) -> bool:
        self.num_tables += len(tables or [])
        return super().write_metadata(path, files, tables)


def test_a_state_that_changes_its_shapes_or_keys_is_planned_anew(tmp_path):
    planner, writer = Planner(Ranks(alone=True)), CountingWriter()
    state = {"weight": torch.ones(3), "value": "a"}
    for number, change in enumerate(
        ({}, {"value": "b"}, {"weight": torch.ones(4)}, {"more": 1}, {"value": "b" * 9999})
    ):
        state |= change
        save(tmp_path / str(number), state, planner=planner, writer=writer)
        loaded = {key: torch.zeros_like(value) if key == "weight" else None for key, value in state.items()}
        load_alone(tmp_path / str(number), loaded)
        assert_same({"weight": loaded.pop("weight")}, {"weight": state["weight"]})
        assert loaded == {key: value for key, value in state.items() if key != "weight"}
    assert writer.num_tables == 4  # all but the second save, whose value is of the same length


def test_a_writer_that_was_started_anew_asks_for_the_tables(tmp_path):
    planner, state = Planner(Ranks(alone=True)), {"weight": torch.ones(3)}
    for step in (1, 2):
        save(tmp_path / str(step), state, planner=planner, writer=CheckpointWriter())
    assert (tmp_path / "1/.metadata").read_bytes() == (tmp_path / "2/.metadata").read_bytes()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_own_reader_reads_it(tmp_path):
    save(tmp_path, {"weight": torch.arange(5.0), "step": 7}, planner=Planner(Ranks(alone=True)))
    state = {"weight": torch.zeros(5), "step": 0}
    load(state, storage_reader=FileSystemReader(Path(tmp_path)), no_dist=True)
    assert torch.equal(state["weight"], torch.arange(5.0)) and state["step"] == 7


def test_shards_that_do_not_fill_their_tensor_are_no_checkpoint():
    row = ("weight", torch.float32, (4,), (0,), (2,), 0, 8)
    with pytest.raises(CheckpointError, match="shards of weight do not fill it"):
        make_metadata(["__0_0.distcp"], [[row]])
    with pytest.raises(CheckpointError, match="shards of weight do not fill it"):
        make_metadata(["__0_0.distcp", "__1_0.distcp"], [[row], [row]])
