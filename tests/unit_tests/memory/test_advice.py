"""The message tells what was in use and what would free how much, and only what this run can do."""

import pytest

from torchtitan.config import ConfigManager, JobConfig
from torchtitan.memory.advice import explain_out_of_memory, get_remedies
from torchtitan.memory.estimate import estimate_memory

LARGE = "--model.flavor 1B --training.local_batch_size 4 --training.seq_len 4096"
TORCH_SAYS = (
    "CUDA out of memory. Tried to allocate 7.83 GiB. GPU 0 has a total capacity of 79.11 GiB of which 5.33 GiB is free."
    " Of the allocated memory 70.52 GiB is allocated by PyTorch, and 2.50 GiB is reserved by PyTorch but unallocated."
    " If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True"
)


@pytest.fixture(autouse=True)
def liger_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchtitan.memory.advice.is_liger_installed", lambda: True)


def parse(options: str) -> JobConfig:
    return ConfigManager().parse_args(options.split())


def remedies(options: str, *, world_size: int = 1) -> dict[str, int]:
    return {r.text: r.freed for r in get_remedies(parse(options), world_size=world_size)}


def test_message() -> None:
    lines = explain_out_of_memory(parse(LARGE), TORCH_SAYS, world_size=1).splitlines()
    assert lines[0] == f"OutOfMemoryError: {TORCH_SAYS.split(' If')[0]}"
    assert lines[1].startswith("Estimated peak memory per device: ")
    assert lines[1].endswith("most is in use at this moment: loss.")
    assert lines[3].endswith("--liger_kernel.enable_fused_linear_cross_entropy")  # frees the most
    freed = [float(line.split()[0]) for line in lines[3:]]
    assert freed == sorted(freed, reverse=True)
    assert freed[0] > 20


def test_what_is_promised_is_the_difference_of_two_estimates() -> None:
    before = estimate_memory(parse(LARGE), world_size=1).peak
    for remedy in get_remedies(parse(LARGE), world_size=1):
        if remedy.text.startswith("--"):
            after = estimate_memory(parse(f"{LARGE} {remedy.text}"), world_size=1).peak
            assert (remedy.freed, remedy.peak) == (before - after, after), remedy.text
            assert remedy.freed > 0.01 * before, remedy.text


def test_every_option_is_named_where_it_helps() -> None:
    found = remedies(
        f"{LARGE} --activation_checkpoint.mode none --parallelism.fsdp_reshard_after_forward never", world_size=8
    )
    assert set(found) == {
        "--liger_kernel.enable_fused_linear_cross_entropy",
        "--training.compile",
        "--activation_checkpoint.mode selective --activation_checkpoint.selective_ac_option op",
        "--activation_checkpoint.mode selective --activation_checkpoint.selective_ac_option attention",
        "--activation_checkpoint.mode full",
        "--activation_checkpoint.mode full --activation_checkpoint.offload",
        "--training.feed_forward_pieces 8",
        "--training.local_batch_size 2 --training.global_batch_size 32",
        "--parallelism.fsdp_reshard_after_forward always",
        "--training.enable_cpu_offload",
        "twice as many GPUs, the weights sharded over them",
    }
    fused = f"{LARGE} --liger_kernel.enable_fused_linear_cross_entropy --liger_kernel.logits_memory_budget_mib 4096"
    assert remedies(fused)["--liger_kernel.logits_memory_budget_mib 256"] > 2 << 30


def test_options_that_are_on_or_cannot_be_are_not_named() -> None:
    lean = (
        f"{LARGE} --training.local_batch_size 1 --activation_checkpoint.mode full --training.compile"
        " --liger_kernel.enable_fused_linear_cross_entropy --training.enable_cpu_offload"
    )
    assert set(remedies(lean, world_size=2)) <= {
        "--activation_checkpoint.offload",
        "--training.feed_forward_pieces 8",
        "--liger_kernel.logits_memory_budget_mib 256",
        "--parallelism.fsdp_reshard_after_forward always",
        "twice as many GPUs, the weights sharded over them",
    }
    stages = "--parallelism.pipeline_parallel_degree 2 --parallelism.pipeline_parallel_schedule InterleavedZeroBubble"
    found = remedies(f"{LARGE} {stages}", world_size=2)
    assert found
    assert not [text for text in found if "liger_kernel" in text or "compile" in text]


def test_without_liger_the_in_tree_loss_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchtitan.memory.advice.is_liger_installed", lambda: False)
    found = remedies(LARGE)
    assert "--liger_kernel.enable_fused_linear_cross_entropy --liger_kernel.implementation native" in found
