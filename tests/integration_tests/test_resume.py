"""A run that is continued is the run that was never stopped: to the bit on its own layout, to 1e-5 on another."""

import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tomli
import torch

import torchtitan.train
from tests.finished_run import load_weights
from tests.integration_tests.lives import REPO, Life, Step, errors, read_records, read_steps, signal_at, train
from tests.integration_tests.tiny_sizes import TINY
from torchtitan.checkpoint.storage import read_metadata
from torchtitan.components.dataloader import Batch
from torchtitan.components.loss import IGNORE_INDEX

STEPS = 6
SAVING = f"""
    --training.steps {STEPS} --checkpoint.enable_checkpoint --checkpoint.interval 2
    --checkpoint.last_save_model_only False
"""
FUSED = "--liger_kernel.enable_fused_linear_cross_entropy"
ACCUMULATION = "--training.global_batch_size 4"
LAYOUTS = {
    "one process": ("", 1),
    "shard 2": ("--parallelism.data_parallel_shard_degree 2", 2),
    "replicate 2": ("--parallelism.data_parallel_replicate_degree 2", 2),
    "tp 2": ("--parallelism.tensor_parallel_degree 2", 2),
    "cp 2": ("--parallelism.context_parallel_degree 2", 2),
    "pp 2": ("--parallelism.pipeline_parallel_degree 2", 2),
}


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        *((layout, "") for layout in LAYOUTS),
        # a loss has no state: where it sums over ranks it could be of other bits, and where it runs twice a step
        ("tp 2", FUSED),
        ("one process", f"{ACCUMULATION} {FUSED}"),
    ],
)
def test_resume_on_the_same_layout_is_exact(tmp_path, layout, options):
    degrees, world_size = LAYOUTS[layout]
    options = f"{SAVING} {degrees} {options}"
    whole = train(tmp_path / "whole", options, world_size=world_size).folder
    resumed = train(take_checkpoint(whole, 2, tmp_path / "resumed"), options, world_size=world_size).folder
    assert read_steps(resumed) == {step: said for step, said in read_steps(whole).items() if step > 2}
    weights, expected = (load_weights(folder / f"checkpoint/step-{STEPS}") for folder in (resumed, whole))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def take_checkpoint(run: Path, step: int, new_run: Path) -> Path:
    """A run that has got no further than a checkpoint of another."""
    shutil.copytree(run / f"checkpoint/step-{step}", new_run / f"checkpoint/step-{step}")
    return new_run


@pytest.mark.parametrize(("before", "after"), [("", FUSED), (FUSED, "")], ids=["on", "off"])
def test_fused_loss_can_be_turned_on_or_off_by_a_resume(tmp_path, before, after):
    whole = train(tmp_path / "whole", f"{SAVING} {before}").folder
    resumed = train(take_checkpoint(whole, 2, tmp_path / "resumed"), f"{SAVING} {after}").folder
    assert_close(read_steps(resumed)[3], read_steps(whole)[3])
    keys = [read_metadata(folder / "checkpoint/step-4").state_dict_metadata.keys() for folder in (whole, resumed)]
    assert keys[0] == keys[1]


def assert_close(step: Step, expected: Step) -> None:
    assert step[:2] == pytest.approx(expected[:2], rel=1e-5, abs=0)  # the others depend on the number of data ranks


# Other layouts


def test_layouts_continue_each_others_runs(tmp_path):
    """Each goes on where the one before was after two steps, and also to the end: to know what comes next there."""
    chain = ["shard 2", "tp 2", "one process", "pp 2", "cp 2", "replicate 2", "shard 2", "one process"]
    options = f"{SAVING} --training.steps {2 * len(chain) + 1}"
    previous: Path | None = None
    for number, layout in enumerate(chain):
        degrees, world_size = LAYOUTS[layout]
        start = ""
        if previous is not None:
            start = f"""
                --checkpoint.initial_load_path {previous}/checkpoint/step-{2 * number}
                --checkpoint.initial_load_model_only False --checkpoint.exclude_from_loading dataloader
            """
        batch_size = GLOBAL_BATCH // (2 if layout in ("shard 2", "replicate 2") else 1)
        this = train(
            tmp_path / f"{number}",
            f"{options} {degrees} {start} --training.local_batch_size {batch_size}",
            world_size=world_size,
            hook=read_the_same_batch_in_every_step,
        ).folder
        if previous is not None:
            step = 2 * number + 1
            assert min(read_steps(this)) == step
            assert_close(read_steps(this)[step], read_steps(previous)[step])
        previous = this


GLOBAL_BATCH = 4


@dataclass(frozen=True)
class SameBatches:
    """In place of the data loader: a data rank's part of one global batch, over and over."""

    dp_rank: int
    dp_world_size: int
    seq_len: int
    seed: int
    place = None
    gave_up = False

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(0)
        text = torch.randint(TINY.vocab_size, (GLOBAL_BATCH, self.seq_len + 1), generator=generator)
        tokens, labels = text[:, :-1], text[:, 1:].clone()
        labels[1, 5:] = IGNORE_INDEX
        while True:
            yield Batch(*(t[self.dp_rank :: self.dp_world_size].contiguous() for t in (tokens, labels)))

    def state_dict(self) -> dict[str, Any]:
        return {f"dp_rank_{self.dp_rank}": ""}

    def get_tokens_by_source(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


def read_the_same_batch_in_every_step() -> None:
    def build(*, dp_rank: int, dp_world_size: int, seq_len: int, seed: int, **_: object) -> SameBatches:
        return SameBatches(dp_rank, dp_world_size, seq_len, seed)

    torchtitan.train.build_dataloader = build


def test_any_number_of_data_ranks_reads_the_same_and_goes_on_where_others_were_killed(tmp_path):
    """12 steps of real text by 1, 2 and 4 ranks, in 4, 2 and 1 microbatches; and by 2, then 4, then 1."""
    options = f"""
        {SAVING} --checkpoint.interval 3 --training.steps 12 --training.global_batch_size 8
        --training.dataset_path {REPO / "docs"}
    """
    one, two, four = (train(tmp_path / f"by{n}", options, world_size=n).folder for n in (1, 2, 4))
    expected = read_steps(one)
    killed = tmp_path / "killed"
    for world_size, step in ((2, 5), (4, 8)):
        life = Life(killed, options, world_size=world_size, hook=partial(signal_at, step, signal.SIGKILL))
        assert life.wait() == [-signal.SIGKILL] * world_size, life.last_words()
    train(killed, options)
    for folder in (two, four, killed):
        records = read_records(folder)
        assert list(records) == list(range(1, 13))
        for step, lives in records.items():
            assert len(lives) == (2 if folder == killed and step in (4, 7) else 1)
            for said in lives:
                assert_close(said, expected[step])


def test_config_toml_is_of_the_last_start_that_was_not_refused_and_has_the_seed(tmp_path):
    folder = train(tmp_path / "run", f"{SAVING} --training.steps 2 --training.seed None").folder
    said = (folder / "config.toml").read_text()
    seed = tomli.loads(said)["training"]["seed"]
    of_checkpoint = tomli.loads((folder / "checkpoint/step-2/config.toml").read_text())
    assert of_checkpoint["model"]["flavor"] == "tiny"
    (tmp_path / "other.jsonl").write_text('{"text": "%s"}' % ("other words " * 300))
    refused = train(folder, f"{SAVING} --training.dataset_path {tmp_path / 'other.jsonl'}", status=1)
    assert any("DataloaderStateError" in line for line in errors(refused))
    assert (folder / "config.toml").read_text() == said
    assert of_checkpoint["training"]["seed"] == seed
    resumed = train(folder, f"{SAVING} --training.steps 3 --training.seed {seed + 1}")
    told = f"The data's order goes on with the checkpoint's seed, {seed}; training.seed={seed + 1} changes nothing"
    assert told in resumed.output()
    for file in ("config.toml", "checkpoint/step-3/config.toml"):
        assert tomli.loads((folder / file).read_text())["training"]["seed"] == seed
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in history] == [
        ("start", 0),
        ("end", 2),
        ("start", 2),
        ("end", 3),
    ]
    assert history[2]["layout"] == "one process" and not history[3]["failed"]
    again = train(tmp_path / "again", f"{SAVING} --training.steps 3 --training.seed {seed}").folder
    assert read_steps(again) == read_steps(folder)
