"""Validation is the mean over all tokens of the set, on every layout, and leaves no trace in the training."""

import json
import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.finished_run import TOKENIZER, load_weights
from tests.integration_tests.lives import read_lines, read_steps, train
from tests.integration_tests.tiny_sizes import TINY
from torchtitan.checkpoint.storage import load_alone
from torchtitan.components.tokenizer import build_tokenizer
from torchtitan.models.common.model import Transformer

SEQ_LEN = 32
PROMPTS, NEW_TOKENS = ["def", "import_numpy_as"], 4
BY_ROWS = " --liger_kernel.logits_memory_budget_mib 1"  # the logits of some of a batch's tokens at a time
LAYOUTS = {
    "one process": ("--validation.local_batch_size 4" + BY_ROWS, 1),
    "fused": ("--validation.local_batch_size 4 --liger_kernel.enable_fused_linear_cross_entropy", 1),
    "compiled": ("--validation.local_batch_size 4 --training.compile", 1),
    # the second data rank has nothing in its last batch
    "shard 2": ("--validation.local_batch_size 2 --parallelism.data_parallel_shard_degree 2" + BY_ROWS, 2),
    "replicate 2": ("--validation.local_batch_size 2 --parallelism.data_parallel_replicate_degree 2", 2),
    "tp 2": ("--validation.local_batch_size 4 --parallelism.tensor_parallel_degree 2" + BY_ROWS, 2),
    "tp 2, whole logits": (
        "--validation.local_batch_size 4 --parallelism.tensor_parallel_degree 2 --parallelism.disable_loss_parallel",
        2,
    ),
    "cp 2": ("--validation.local_batch_size 4 --parallelism.context_parallel_degree 2" + BY_ROWS, 2),
    "pp 2": ("--validation.local_batch_size 4 --parallelism.pipeline_parallel_degree 2", 2),
}
SAVING = """
    --training.steps 4 --checkpoint.enable_checkpoint --checkpoint.interval 2
    --checkpoint.last_save_model_only False
"""


@pytest.fixture(scope="module")
def token_ids() -> list[int]:
    return build_tokenizer(str(TOKENIZER)).encode(validation_text(), add_bos=True, add_eos=True)


def validation_text() -> str:
    """Fills one batch of 4 sequences, and gives a few tokens to a second one."""
    tokenizer, words = build_tokenizer(str(TOKENIZER)), []
    while len(tokenizer.encode(" ".join(words), add_bos=True, add_eos=True)) <= 4 * SEQ_LEN + 1:
        words.append("qwzx" if len(words) < 30 else "the")
    return " ".join(words)


def validating(folder: Path) -> str:
    """Options for a run in `folder`."""
    data = folder.with_name("validation.jsonl")
    data.write_text(json.dumps({"text": validation_text()}))
    return (
        f"--validation.enabled --validation.dataset_path {data} --validation.seq_len {SEQ_LEN} --validation.freq 2"
        f" --validation.prompts {','.join(PROMPTS)} --validation.max_new_tokens {NEW_TOKENS}"
    )


def read_validation(folder: Path) -> dict[int, float]:
    """The loss by step."""
    losses = {
        line["step"]: line.get("validation_metrics/loss") for line in read_lines(folder) if "grad_norm" not in line
    }
    assert None not in losses.values()
    return losses


@torch.no_grad()
def batch_losses(checkpoint: Path, token_ids: list[int]) -> list[torch.Tensor]:
    """The loss of every token of the two batches, by a plain model with the weights of a checkpoint."""
    model = Transformer(TINY)
    model.load_state_dict(load_weights(checkpoint))
    model.init_buffers("cpu")
    windows = [token_ids[i : i + SEQ_LEN + 1] for i in range(0, len(token_ids) - 1, SEQ_LEN)]
    losses = []
    for window in windows:
        logits = model(torch.tensor([window[:-1]]))[0]
        losses.append(F.cross_entropy(logits.double(), torch.tensor(window[1:]), reduction="none"))
    return [torch.cat(losses[:4]), torch.cat(losses[4:])]


def read_texts(folder: Path, step: int) -> list[tuple[str, str]]:
    events = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [(e["prompt"], e["text"]) for e in events if e["event"] == "text" and e["step"] == step]


@torch.no_grad()
def continue_prompts(checkpoint: Path) -> list[tuple[str, str]]:
    """What a plain model with the weights of a checkpoint puts after each prompt, token by token."""
    tokenizer, model, texts = build_tokenizer(str(TOKENIZER)), Transformer(TINY), []
    model.load_state_dict(load_weights(checkpoint))
    model.init_buffers("cpu")
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt, add_bos=True, add_eos=False)
        begin = len(ids)
        for _ in range(NEW_TOKENS):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        new = ids[begin:]
        texts.append((prompt, tokenizer.decode(new[: new.index(1)] if 1 in new else new)))
    return texts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_over_all_tokens_and_no_trace_in_the_training(tmp_path, token_ids, layout):
    options, world_size = LAYOUTS[layout]
    folder = tmp_path / "with"
    train(folder, f"{SAVING} {options} {validating(folder)}", world_size=world_size, hook=begin_alike)
    losses = read_validation(folder)
    assert list(losses) == [1, 2, 4]
    for step in (2, 4):
        full, short = batch_losses(folder / f"checkpoint/step-{step}", token_ids)
        assert (len(full), len(short)) == (4 * SEQ_LEN, len(token_ids) - 1 - 4 * SEQ_LEN)
        assert 0 < len(short) < 8
        assert losses[step] == pytest.approx(torch.cat([full, short]).mean().item(), rel=1e-6)
        assert read_texts(folder, step) == continue_prompts(folder / f"checkpoint/step-{step}")
        mean_of_means = torch.stack([full.mean(), short.mean()]).mean().item()
        assert losses[step] != pytest.approx(mean_of_means, rel=1e-4)

    without = train(tmp_path / "without", f"{SAVING} {options}", world_size=world_size, hook=begin_alike).folder
    assert read_validation(without) == {}
    assert read_steps(folder) == read_steps(without)
    assert read_states(folder, world_size) == read_states(without, world_size)


def begin_alike() -> None:
    random.seed(0)
    torch.compile = partial(torch.compile, backend="aot_eager")  # whose graphs count here, not the code made of them


def read_states(folder: Path, world_size: int) -> tuple[str, Any]:
    """The random states and the places in the data that a checkpoint in the midst of the run holds."""
    random_states = {f"rng.rank_{rank}": "" for rank in range(world_size)}
    state = {"dataloader.dp_rank_0": "", **random_states}
    load_alone(folder / "checkpoint/step-2", state)
    loaded = [json.loads(state[name]) for name in random_states]
    return state["dataloader.dp_rank_0"], [(states["python"], states["torch"]) for states in loaded]


def test_every_validation_reads_the_same_batches(tmp_path):
    """With weights that do not change the loss has the same bits each time, and those of no other batches."""
    run = train(tmp_path / "run", f"{SAVING} --training.steps 6 --optimizer.lr 0 {validating(tmp_path / 'run')}").folder
    losses = read_validation(run)
    assert list(losses) == [1, 2, 4, 6]
    assert len(set(losses.values())) == 1
    options = "--training.steps 2 --optimizer.lr 0 --validation.steps 1 --validation.local_batch_size 4"
    first_batch = train(tmp_path / "first", f"{options} {validating(tmp_path / 'first')}").folder
    assert read_validation(first_batch)[1] != losses[1]


def test_resumed_run_validates_as_the_one_that_was_never_stopped(tmp_path):
    options = f"{SAVING} {validating(tmp_path / 'run')}"
    run = train(tmp_path / "run", options).folder
    expected = read_validation(run)
    resumed = train(run, f"{options} --checkpoint.load_step 2").folder
    assert [line["step"] for line in read_lines(resumed)][-3:] == [3, 4, 4]
    assert read_validation(resumed) == expected


def test_loss_is_in_the_log_in_tensorboard_and_in_the_json_lines(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = f"--training.steps 2 --metrics.enable_tensorboard {validating(tmp_path / 'run')}"
    life = train(tmp_path / "run", options)
    losses = read_validation(life.folder)
    (folder,) = (life.folder / "tb").iterdir()
    events = EventAccumulator(str(folder)).Reload().Scalars("validation_metrics/loss")
    assert {event.step: pytest.approx(event.value, rel=1e-6) for event in events} == losses
    for step, loss in losses.items():
        assert math.isfinite(loss)
        assert f"validate step: {step:2}  loss: {loss:7.4f}" in life.output()
        for prompt, text in read_texts(life.folder, step):
            assert f"validate step: {step:2}  {prompt!r}  {text!r}" in life.output()
    texts = EventAccumulator(str(folder)).Reload().Tags()["tensors"]
    assert texts == [f"{prompt}/text_summary" for prompt in PROMPTS]
