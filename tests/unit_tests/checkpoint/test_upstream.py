"""Checkpoints as upstream torchtitan writes them go on here: with weights, moments, step and schedule."""

import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.optim.lr_scheduler import LambdaLR

from tests.unit_tests.checkpoint.checkpointed_run import MODEL, Run, assert_same, build_run
from torchtitan.checkpoint.storage import check_weights, find_weights, load_alone, read_metadata

pytestmark = pytest.mark.usefixtures("process_group")


class State:
    """What upstream hands to torch: an object with a state_dict."""

    def __init__(self, state: dict[str, Any]):
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def save_as_upstream(run: Run, path: Path, *, version: str) -> None:
    """v0.1.0 nests the model, keeps the rotary table in it, and counts no tokens."""
    ((part, optimizer),) = run.optimizer._parts
    is_first = version == "v0.1.0"
    weights = get_model_state_dict(part)
    schedule = LambdaLR(optimizer, lambda step: 1.0)
    schedule.last_epoch = run.step
    states: dict[str, Any] = {
        "optimizer": State(
            get_optimizer_state_dict(part, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
        ),
        "dataloader": State({"dp_rank_0": pickle.dumps({"sample_idx": 9}), "world_size": 2}),
        "lr_scheduler": State(schedule.state_dict()),
        "train_state": State({"step": run.step} | ({} if is_first else {"ntokens_seen": 70})),
    }
    table = torch.ones(4, 4, dtype=torch.complex64)
    states |= {"model": State({**weights, "freqs_cis": table})} if is_first else weights
    dcp.save(states, checkpoint_id=path)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.fixture
def counts_tokens(monkeypatch):
    """Has Run count tokens, as the trainer does."""
    monkeypatch.setattr(Run, "n_tokens_seen", 0, raising=False)
    monkeypatch.setattr(Run, "state_dict", lambda run: {"step": run.step, "n_tokens_seen": run.n_tokens_seen})

    def load_state_dict(run: Run, state: dict[str, Any]) -> None:
        run.step, run.n_tokens_seen = state["step"], state.get("n_tokens_seen", 0)

    monkeypatch.setattr(Run, "load_state_dict", load_state_dict)


@pytest.mark.parametrize(("version", "n_tokens_seen"), [("v0.1.0", 0), ("v0.2.2", 140)])
def test_a_run_goes_on_from_upstreams_checkpoint(tmp_path, counts_tokens, caplog, version, n_tokens_seen):
    run = build_run(tmp_path / "source", enable_checkpoint=False)
    run.train(4)
    path = tmp_path / "upstream/step-4"
    save_as_upstream(run, path, version=version)
    resumed = build_run(tmp_path / "run", initial_load_path=str(path), initial_load_model_only=False)
    assert resumed.checkpointer.load()
    assert (resumed.step, resumed.n_tokens_seen) == (4, n_tokens_seen)
    assert resumed.lr_scheduler.state_dict() == {"step": 4}
    assert resumed.data.position == 0
    assert_same(resumed.full_state(), run.full_state())
    run.data.position = 0
    assert resumed.train(6, save=False) == run.train(6, save=False)
    lacks, rope = warnings(caplog)
    assert lacks == (
        f"{path} is upstream torchtitan's, and holds no dataloader: the data is read from its beginning, in this"
        " package's order; no rng: random numbers are drawn anew"
    )
    assert rope.startswith(f"{path} holds no configuration") and "since v0.2.0" in rope and "use_scaled_rope" in rope


def test_upstreams_folder_is_continued_and_what_is_excluded_is_not_missed(tmp_path, counts_tokens, caplog):
    run = build_run(tmp_path / "source", enable_checkpoint=False)
    run.train(4)
    save_as_upstream(run, tmp_path / "run/checkpoint/step-4", version="v0.2.2")
    resumed = build_run(tmp_path / "run", exclude_from_loading=["dataloader", "optimizer"])
    assert resumed.checkpointer.load()
    assert resumed.step == 4
    assert not resumed.optimizer.state_dict()["state.norm.weight.exp_avg"].any()
    lacks, rope = warnings(caplog)
    assert lacks.endswith("holds no rng: random numbers are drawn anew") and "model.use_scaled_rope" in rope


@pytest.mark.parametrize("version", ["v0.1.0", "v0.2.2"])
def test_tools_find_the_weights_under_our_names(tmp_path, version):
    run = build_run(tmp_path / "source", enable_checkpoint=False)
    run.train(1)
    save_as_upstream(run, tmp_path / "step-1", version=version)
    metadata = read_metadata(tmp_path / "step-1")
    weights = run.parts[0].state_dict()
    check_weights(tmp_path, metadata, {name: tuple(weight.shape) for name, weight in weights.items()})
    assert find_weights(metadata).keys() == weights.keys()
    assert len(weights) == 3 + 9 * MODEL.n_layers
    read = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    load_alone(tmp_path / "step-1", read)
    assert_same(read, weights)
