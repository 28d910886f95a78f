"""A run goes on from its checkpoint as if nothing had happened, in its layout or another, from the step it is told."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.unit_tests.checkpoint.checkpointed_run import (
    MODEL,
    MODES,
    Numbers,
    Run,
    assert_same,
    build_run,
    folder,
    names,
)
from tests.unit_tests.distributed.processes import run_processes
from torchtitan.checkpoint.contents import RandomState
from torchtitan.checkpoint.storage import (
    find_weights,
    load_alone,
    read_metadata,
)
from torchtitan.checkpoint.write import save_alone
from torchtitan.config.degrees import ParallelDims
from torchtitan.config.errors import CheckpointError
from torchtitan.distributed.init_weights import init_parameters
from torchtitan.models.common.model import Transformer
from torchtitan.models.llama3 import train_spec

build_adapter = train_spec.load().state_dict_adapter

pytestmark = pytest.mark.usefixtures("process_group", "quick_writer")


# Saving and going on


@pytest.mark.parametrize("mode", MODES)
def test_resumed_run_equals_the_one_that_was_never_stopped_bit_for_bit(tmp_path, mode):
    run = build_run(tmp_path, async_mode=mode, noisy=True)
    run.train(4)
    losses = run.train(6, save=False)  # while the last checkpoint is being written
    expected = run.full_state()
    run.checkpointer.close()

    resumed = build_run(tmp_path, noisy=True)
    torch.manual_seed(99)
    random.seed(99)
    assert resumed.checkpointer.load()
    assert resumed.step == 4
    assert resumed.train(6, save=False) == losses
    assert_same(resumed.full_state(), expected)


@pytest.mark.parametrize("mode", MODES)
def test_compact_states_are_resumed_bit_for_bit(tmp_path, mode):
    run = build_run(tmp_path, compact=True, async_mode=mode)
    run.train(4)
    losses = run.train(6, save=False)
    expected = run.full_state()
    run.checkpointer.close()
    resumed = build_run(tmp_path, compact=True)
    assert resumed.checkpointer.load()
    assert resumed.train(6, save=False) == losses
    assert_same(resumed.full_state(), expected)


@pytest.mark.parametrize("compact", [False, True])
def test_states_of_another_precision_are_refused_and_weights_are_not(tmp_path, compact):
    build_run(tmp_path / "before", compact=compact).train(2)
    before = folder(build_run(tmp_path / "before")) / "step-2"
    options = {"initial_load_path": str(before), "initial_load_model_only": False}
    with pytest.raises(CheckpointError, match=r"in another form than this run's.*optimizer.state_precision"):
        build_run(tmp_path / "other", compact=not compact, **options).checkpointer.load()
    options["initial_load_model_only"] = True
    after = build_run(tmp_path / "after", compact=not compact, **options)
    assert after.checkpointer.load()
    saved = {"norm.weight": torch.empty(MODEL.dim)}
    load_alone(before, saved)
    assert_same(
        {"norm.weight": after.parts[0].norm.weight.detach().bfloat16()},
        {"norm.weight": saved["norm.weight"].bfloat16()},
    )


def test_the_last_checkpoint_holds_the_true_weights_of_compact_states(tmp_path):
    run = build_run(tmp_path, compact=True, steps=3)
    run.train(3)
    expected = run.optimizer.export_weights(run.parts[0].state_dict())
    metadata = read_metadata(folder(run) / "step-3")
    assert {entry.properties.dtype for entry in find_weights(metadata).values()} == {torch.float32}
    saved = {name: torch.empty_like(weight) for name, weight in expected.items()}
    load_alone(folder(run) / "step-3", saved)
    assert_same(saved, expected)
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in saved.values())


def test_checkpoint_has_these_keys_and_no_others(tmp_path):
    """Names are those of the plain model. What wraps its blocks adds none: test_compile.py, and test_names_stay in
    test_activation_checkpoint.py.
    """
    run = build_run(tmp_path)
    run.train(2)
    weights = list(Transformer(MODEL).state_dict())
    expected = {*weights, "lr_scheduler.step", "dataloader.dp_world_size", "dataloader.dp_rank_0"}
    expected |= {f"optimizer.state.{name}.{key}" for name in weights for key in ("exp_avg", "exp_avg_sq")}
    expected |= {"optimizer.state.step", "train_state.step", "rng.rank_0"}
    assert read_metadata(folder(run) / "step-2").state_dict_metadata.keys() == expected


def test_checkpoint_with_a_count_of_steps_for_each_parameter_is_gone_on_from(tmp_path):
    """As they were before."""
    run = build_run(tmp_path)
    run.train(2)
    state = run.checkpointer._contents.everything()
    step = state.pop("optimizer.state.step")
    state |= {f"optimizer.state.{name}.step": step for name in run.parts[0].state_dict()}
    shutil.rmtree(folder(run) / "step-2")
    save_alone(folder(run) / "step-2", state)
    resumed = build_run(tmp_path)
    assert resumed.checkpointer.load()
    assert resumed.train(3, save=False) == run.train(3, save=False)


def test_no_checkpoint_and_nothing_to_start_from(tmp_path):
    run = build_run(tmp_path)
    assert not run.checkpointer.load()
    assert run.step == 0


def test_disabled_checkpoints_touch_no_disk(tmp_path):
    run = build_run(tmp_path, enable_checkpoint=False)
    run.train(10)
    assert not run.checkpointer.load()
    assert not run.checkpointer.save(10)
    assert not any(tmp_path.iterdir())


def test_load_only_goes_on_and_saves_nothing(tmp_path):
    run = build_run(tmp_path, last_save_model_only=False)
    run.train(4)
    before = sorted(folder(run).rglob("*"))
    reader = build_run(tmp_path, load_only=True, async_mode="async", enable_first_step_checkpoint=True)
    assert reader.checkpointer.load()
    assert reader.step == 4
    reader.train(10)
    assert not reader.checkpointer.save(10)
    reader.checkpointer.close()
    assert sorted(folder(run).rglob("*")) == before


def test_latest_are_kept(tmp_path):
    run = build_run(tmp_path, keep_latest_k=2, last_save_model_only=False)
    run.train(10)
    assert names(run) == ["step-10", "step-8"]


def test_zero_keeps_all(tmp_path):
    run = build_run(tmp_path, keep_latest_k=0, last_save_model_only=False)
    run.train(10)
    assert names(run) == ["step-10", "step-2", "step-4", "step-6", "step-8"]


def test_first_step_is_saved_on_request(tmp_path):
    run = build_run(tmp_path, enable_first_step_checkpoint=True)
    run.train(1)
    assert names(run) == ["step-1"]


def test_preemption_saves_at_once_and_only_once(tmp_path):
    run = build_run(tmp_path, async_mode="async", interval=3)
    run.train(4)
    assert run.checkpointer.save(4)
    written = (folder(run) / "step-4/.metadata").stat().st_mtime_ns
    assert run.checkpointer.save(4)
    assert (folder(run) / "step-4/.metadata").stat().st_mtime_ns == written
    run.checkpointer.close()
    resumed = build_run(tmp_path)
    resumed.checkpointer.load()
    assert resumed.step == 4


def test_saving_a_step_again_replaces_it(tmp_path):
    run = build_run(tmp_path)
    run.train(4)
    rewound = build_run(tmp_path, load_step=2, interval=4)
    rewound.checkpointer.load()
    rewound.parts[0].norm.weight.data.fill_(7.0)
    rewound.train(4)
    assert names(rewound) == ["step-2", "step-4"]
    weight = {"norm.weight": torch.zeros(MODEL.dim)}
    load_alone(folder(rewound) / "step-4", weight)
    assert weight["norm.weight"].mean() > 6


def test_newer_checkpoints_of_an_abandoned_future_are_named_and_kept(tmp_path, caplog):
    build_run(tmp_path).train(8)
    run = build_run(tmp_path, load_step=4, keep_latest_k=2, interval=5)
    run.checkpointer.load()
    assert "newer checkpoints (step-6, step-8)" in caplog.text
    run.train(5)
    assert names(run) == ["step-4", "step-5", "step-6", "step-8"]  # of those up to 5, the latest two


def test_seed_checkpoint_starts_a_run_with_its_weights(tmp_path):
    seed = build_run(tmp_path)
    seed.parts[0].norm.weight.data.fill_(7.0)
    seed.checkpointer.save_seed()
    run = build_run(tmp_path)
    assert run.checkpointer.load()
    assert run.step == 0
    assert_same(run.full_state(), seed.full_state())


def test_two_parts_on_a_rank_save_what_one_model_loads(tmp_path):
    whole = build_run(tmp_path / "whole")
    first, second = Transformer(replace(MODEL, n_layers=1)), Transformer(MODEL)
    first.norm = first.output = None
    second.tok_embeddings = None
    del second.layers["0"]
    for part in (first, second):
        init_parameters(part, seed=3, device="cpu")
    parts = Run([first, second], {}, tmp_path, Numbers())
    expected = whole.train(2)
    assert parts.train(2) == pytest.approx(expected, rel=1e-6)
    resumed = build_run(tmp_path)
    resumed.checkpointer.load()
    assert resumed.train(3, save=False) == pytest.approx(whole.train(3, save=False), rel=1e-6)


# What is loaded


def test_excluded_states_are_not_loaded(tmp_path):
    run = build_run(tmp_path / "source")
    run.train(4)
    source = {"initial_load_path": str(folder(run) / "step-4"), "initial_load_model_only": False}
    resumed = build_run(tmp_path / "run", exclude_from_loading=["optimizer", "dataloader", "train_state"], **source)
    before = torch.get_rng_state()
    resumed.checkpointer.load()
    assert (resumed.step, resumed.data.position) == (0, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert resumed.lr_scheduler.state_dict() == {"step": 4}
    assert not resumed.optimizer.state_dict()["state.norm.weight.exp_avg"].any()
    assert torch.equal(resumed.full_state()["norm.weight"], run.full_state()["norm.weight"])


def test_a_run_does_not_count_anew_among_its_own_checkpoints(tmp_path):
    build_run(tmp_path).train(4)
    excluded = {"exclude_from_loading": ["optimizer", "train_state"]}
    with pytest.raises(
        CheckpointError, match=r"another job.dump_folder, with --checkpoint.initial_load_path .*step-4 "
    ):
        build_run(tmp_path, **excluded).checkpointer.load()


@pytest.mark.parametrize("is_restart", [True, False])
def test_what_is_excluded_once_is_not_excluded_again_when_the_run_is_started_again(tmp_path, is_restart):
    build_run(tmp_path / "source").train(4)
    source = {"initial_load_path": str(tmp_path / "source/checkpoint/step-4"), "initial_load_model_only": False}
    options = {**source, "exclude_from_loading": ["dataloader", "train_state"]}
    run = build_run(tmp_path / "run", **options)
    run.checkpointer.load()
    assert (run.step, run.data.position) == (0, 0)
    run.train(2)
    again = build_run(tmp_path / "run", is_restart=is_restart, **options)
    again.checkpointer.load()
    assert (again.step, again.data.position) == (2, 2)
    # another choice is obeyed
    other = build_run(tmp_path / "run", **{**options, "exclude_from_loading": ["dataloader"]})
    other.checkpointer.load()
    assert (other.step, other.data.position) == (2, 0)


def test_a_position_that_cannot_be_carried_over_is_excluded_again(tmp_path):
    excluded = {"exclude_from_loading": ["dataloader"]}
    build_run(tmp_path, **excluded).train(2)
    run = build_run(tmp_path, **excluded)
    run.data.dp_world_size = 2
    run.checkpointer.load()
    assert (run.step, run.data.position) == (2, 0)


@pytest.mark.parametrize("enable_checkpoint", [True, False])
def test_initial_load_takes_the_weights_only(tmp_path, enable_checkpoint):
    source = build_run(tmp_path / "source")
    source.train(4)
    path = folder(source) / "step-4"
    run = build_run(tmp_path / "run", initial_load_path=str(path), enable_checkpoint=enable_checkpoint)
    assert run.checkpointer.load()
    assert run.step == 0
    assert torch.equal(run.full_state()["norm.weight"], source.full_state()["norm.weight"])
    assert not run.optimizer.state_dict()["state.norm.weight.exp_avg"].any()


def test_initial_weights_of_another_model_than_their_config_says_are_refused(tmp_path):
    """As `torchtitan convert` leaves it beside weights of Hugging Face's."""
    source = build_run(tmp_path / "source")
    source.train(2)
    path = folder(source) / "step-2"
    config = {**build_adapter(MODEL).to_hf_config(), "rms_norm_eps": 1e-6}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config.json: rms_norm_eps is 1e-06, and 1e-05 in this model"):
        build_run(tmp_path / "run", initial_load_path=str(path)).checkpointer.load()


def test_initial_load_takes_everything_on_request_and_only_at_the_start(tmp_path):
    source = build_run(tmp_path / "source")
    source.train(4)
    options = {"initial_load_path": str(folder(source) / "step-4"), "initial_load_model_only": False}
    run = build_run(tmp_path / "run", **options)
    run.checkpointer.load()
    assert run.step == 4
    run.train(6)
    resumed = build_run(tmp_path / "run", **options)
    resumed.checkpointer.load()
    assert resumed.step == 6


def test_a_restart_goes_on_from_what_was_saved_since_load_step(tmp_path):
    build_run(tmp_path).train(4)
    run = build_run(tmp_path, load_step=2)
    assert run.checkpointer.load() and run.step == 2
    restarted = build_run(tmp_path, load_step=2, is_restart=True)
    assert restarted.checkpointer.load() and restarted.step == 4


def test_load_step_that_is_not_there(tmp_path):
    build_run(tmp_path).train(4)
    with pytest.raises(CheckpointError, match=r"checkpoint.load_step=3: no such step in .*, it has 2, 4"):
        build_run(tmp_path, load_step=3).checkpointer.load()


def test_initial_load_path_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint at .*nowhere"):
        build_run(tmp_path, initial_load_path=str(tmp_path / "nowhere")).checkpointer.load()


def test_checkpoint_of_another_model(tmp_path):
    build_run(tmp_path).train(2)
    with pytest.raises(CheckpointError, match=r"output.weight is \(61, 32\) in the checkpoint and \(62, 32\) here"):
        build_run(tmp_path, args=replace(MODEL, vocab_size=62)).checkpointer.load()
    with pytest.raises(CheckpointError, match=r"layers.1.attention.wk.weight is only in the checkpoint \(and 8 more"):
        build_run(tmp_path, args=replace(MODEL, n_layers=1)).checkpointer.load()
    with pytest.raises(CheckpointError, match=r"layers.2.attention.wk.weight is not in the checkpoint"):
        build_run(tmp_path, args=replace(MODEL, n_layers=3)).checkpointer.load()


# The last checkpoint


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_last_checkpoint_holds_the_weights_in_the_export_dtype(tmp_path, dtype):
    run = build_run(tmp_path, steps=3, export_dtype=dtype)
    run.train(3)
    metadata = read_metadata(folder(run) / "step-3")
    assert metadata.state_dict_metadata.keys() == Transformer(MODEL).state_dict().keys()
    assert {entry.properties.dtype for entry in find_weights(metadata).values()} == {getattr(torch, dtype)}
    other = build_run(tmp_path / "other", initial_load_path=str(folder(run) / "step-3"))
    other.checkpointer.load()
    for name in Transformer(MODEL).state_dict():
        expected = run.full_state()[name].to(getattr(torch, dtype)).float()
        assert torch.equal(other.full_state()[name], expected)


@pytest.mark.parametrize("in_hf", [True, False])
def test_complete_run_that_is_started_again_has_nothing_to_do(tmp_path, in_hf, caplog):
    build_run(tmp_path, steps=3, last_save_in_hf=in_hf).train(3)
    run = build_run(tmp_path, steps=3, last_save_in_hf=in_hf)
    assert run.checkpointer.load()
    assert run.step == 3
    assert "The run is complete" in caplog.text


def test_a_whole_last_checkpoint_is_not_converted_and_that_is_said(tmp_path, caplog):
    build_run(tmp_path, steps=3, last_save_model_only=False).train(3)
    run = build_run(tmp_path, steps=3, last_save_in_hf=True)
    assert run.checkpointer.load()
    path = folder(run) / "step-3"
    assert f"python -m torchtitan convert to_hf {path} <new folder>" in caplog.text
    assert not (path / "model.safetensors").exists()


def test_a_run_that_was_killed_in_its_last_conversion_makes_up_for_it(tmp_path, caplog):
    build_run(tmp_path, steps=3).train(3)
    run = build_run(tmp_path, steps=3, last_save_in_hf=True)
    (folder(run) / "step-3.incomplete-dead").mkdir()
    assert run.checkpointer.load()
    assert (folder(run) / "step-3/model.safetensors").exists()
    assert names(run) == ["step-2", "step-3"]
    assert "The run is complete" in caplog.text


@pytest.mark.parametrize("in_hf", [True, False])
def test_run_does_not_continue_past_a_checkpoint_of_weights(tmp_path, in_hf):
    build_run(tmp_path, steps=5, last_save_in_hf=in_hf).train(5)
    kind = "holds Hugging Face safetensors, only weights" if in_hf else "holds only weights"
    with pytest.raises(CheckpointError, match=f"step-5 {kind}.*To continue from step 4: --checkpoint.load_step 4"):
        build_run(tmp_path, steps=9).checkpointer.load()
    run = build_run(tmp_path, steps=9, load_step=4)
    run.checkpointer.load()
    assert run.step == 4


def test_full_last_checkpoint_can_be_continued(tmp_path):
    build_run(tmp_path, steps=5, last_save_model_only=False).train(5)
    run = build_run(tmp_path, steps=9)
    run.checkpointer.load()
    assert run.step == 5


# Layouts


def save_with_two_ranks(dump_folder: Path) -> dict[str, Any]:
    """Shard 2 to tp 2: the losses after the save, and the state then."""
    sharded = build_run(dump_folder / "sharded", ParallelDims(dp_shard=2))
    sharded.train(2)
    losses = sharded.train(4, save=False)
    tensor_parallel = build_run(
        dump_folder / "sharded", ParallelDims(tp=2), exclude_from_loading=["dataloader"], interval=3
    )
    tensor_parallel.checkpointer.load()
    tensor_parallel.data.position = 2
    tp_losses = tensor_parallel.train(4)
    with pytest.raises(CheckpointError, match="read by 2 ranks"):
        build_run(dump_folder / "sharded", ParallelDims(tp=2), load_step=2).checkpointer.load()
    hf = build_run(
        dump_folder / "hf", ParallelDims(dp_shard=2), steps=1, last_save_in_hf=True, last_save_model_only=True
    )
    hf.train(1)
    loaded = {}
    for name, dims in {"tp": ParallelDims(tp=2), "shard": ParallelDims(dp_shard=2)}.items():
        run = build_run(
            dump_folder / "new",
            dims,
            initial_load_path=str(folder(hf) / "step-1"),
            initial_load_in_hf=True,
        )
        nn.init.zeros_(run.parts[0].norm.weight)
        run.checkpointer.load()
        loaded[name] = run.parts[0].state_dict()
        loaded[name] = {key: weight.full_tensor() for key, weight in loaded[name].items()}
    return {
        "losses": losses,
        "tp_losses": tp_losses,
        "state": sharded.full_state(),
        "hf": {key: weight.full_tensor() for key, weight in hf.parts[0].state_dict().items()},
        "from_hf": loaded,
    }


def load_with_two_ranks(dump_folder: Path) -> list[float]:
    """One process to shard 2."""
    with pytest.raises(CheckpointError, match="read by 1 ranks"):
        build_run(dump_folder, ParallelDims(dp_shard=2)).checkpointer.load()
    run = build_run(dump_folder, ParallelDims(dp_shard=2), exclude_from_loading=["dataloader"])
    run.checkpointer.load()
    run.data.position = run.step
    return run.train(run.step + 1, save=False)


def test_layouts_read_each_others_checkpoints(tmp_path):
    result, _ = run_processes(save_with_two_ranks, 2, tmp_path)
    assert result["tp_losses"] == pytest.approx(result["losses"], rel=1e-5)
    for loaded in result["from_hf"].values():
        assert_same(loaded, result["hf"])

    with pytest.raises(CheckpointError, match="read by 2 ranks"):
        build_run(tmp_path / "sharded", load_step=2).checkpointer.load()
    alone = build_run(tmp_path / "sharded", load_step=3, interval=4)  # of tp 2
    alone.checkpointer.load()
    assert alone.train(4) == pytest.approx(result["losses"][1:], rel=1e-5)
    torch.testing.assert_close(alone.full_state(), result["state"], rtol=1e-4, atol=1e-6)
    loss_after = alone.train(5, save=False)

    again, same = run_processes(load_with_two_ranks, 2, tmp_path / "sharded")
    assert again == same == pytest.approx(loss_after, rel=1e-5)


def restart_one_of_two_ranks(dump_folder: Path) -> int:
    """torchrun on the second machine has seen its worker fail, the one on the first has only joined again."""
    build_run(dump_folder, ParallelDims(dp_shard=2)).train(4)
    run = build_run(dump_folder, ParallelDims(dp_shard=2), load_step=2, is_restart=dist.get_rank() == 1)
    run.checkpointer.load()
    return run.step


def test_all_ranks_take_a_restart_for_one_if_one_does(tmp_path):
    assert run_processes(restart_one_of_two_ranks, 2, tmp_path) == [4, 4]


# Random numbers


def test_random_state_is_one_value_for_each_rank_and_is_restored(caplog):
    state = RandomState(3).state_dict()
    expected = (torch.rand(3), random.random())
    assert list(state) == ["rank_3"]
    assert set(json.loads(state["rank_3"])) >= {"python", "torch"}
    RandomState(3).load_state_dict(state)
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
    RandomState(4).load_state_dict(state)  # a rank that the saving run did not have
    before = random.getstate()
    RandomState(3).load_state_dict({"rank_3": b"a pickle of an older version"})
    assert random.getstate() == before
    assert caplog.text.count("Random numbers are drawn anew") == 1
