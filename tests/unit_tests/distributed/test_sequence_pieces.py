"""The feed-forward in pieces is the feed-forward, with the memory of one piece."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit_tests.distributed.layouts import ARGS, get_batch, get_gradients, loss_sum
from torchtitan.config import ConfigManager
from torchtitan.config.block_modes import BlockMode
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.distributed.init_weights import init_parameters
from torchtitan.memory.estimate import estimate_memory
from torchtitan.memory.trace import MemoryTrace
from torchtitan.models.common.model import Transformer
from torchtitan.models.common.parallelize import KEPT_RESULTS

QWEN: dict[str, Any] = {"tie_embeddings": True, "qk_norm": True, "given_head_dim": 12}


def step(mode: BlockMode, pieces: int, args: dict[str, Any], *, compiled: bool = False) -> dict[str, Tensor]:
    model = Transformer(ARGS(**args))
    init_parameters(model, seed=7, device="cpu")
    block: Any
    for block in model.layers.values():
        block.feed_forward_pieces = pieces
    apply_ac(model, [mode] * 2, kept_results=KEPT_RESULTS)
    if compiled:
        for block in model.layers.values():
            block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
    tokens, labels = get_batch()
    loss = loss_sum(model(tokens), labels)
    loss.backward()
    return {"loss": loss.detach(), **get_gradients(model)}


@pytest.mark.parametrize(
    ("mode", "compiled"), [*((mode, False) for mode in ("none", "op", "attention", "full")), ("attention", True)]
)
def test_loss_and_gradients_are_those_of_the_whole(mode: BlockMode, compiled: bool) -> None:
    torch._dynamo.reset()
    for args in ({}, QWEN)[: 1 if compiled else 2]:
        expected = step("none", 1, args)
        for pieces in (4,) if compiled else (4, 5):  # five are not equal: whole
            for name, value in step(mode, pieces, args, compiled=compiled).items():
                torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["none", "full"])
def test_intermediates_exist_for_one_piece(mode: BlockMode) -> None:
    def get_peaks(pieces: int) -> tuple[int, int]:
        with torch.device("meta"):
            model = Transformer(ARGS(n_layers=1, ffn_hidden_dim=1024, max_seq_len=64))
        block: Any = model.layers["0"]
        block.feed_forward_pieces = pieces
        apply_ac(model, [mode])
        trace = MemoryTrace()
        with trace:
            out = block(torch.empty(2, 64, 32, device="meta", requires_grad=True), model.freqs_cis[None])
            forward_ends = trace.now
            torch.autograd.backward((out,), (torch.empty_like(out),))
        return trace.peak(end=forward_ends), trace.peak(start=forward_ends)

    wide = 2 * 64 * 1024 * 4  # one of them, of all tokens
    for whole, in_pieces in zip(get_peaks(1), get_peaks(16), strict=True):
        assert whole - in_pieces > 2 * wide


def test_the_estimate_knows_the_pieces() -> None:
    options = "--model.flavor 8B --training.seq_len 65536 --training.local_batch_size 1 --training.compile"

    def estimate(pieces: int) -> int:
        flags = f"{options} --activation_checkpoint.mode full --training.feed_forward_pieces {pieces}"
        moments = estimate_memory(ConfigManager().parse_args(flags.split()), world_size=1).moments
        return next(moment.total for moment in moments if moment.name == "backward of block 1")

    assert estimate(1) - estimate(8) > 2 * 65536 * 14336 * 2
