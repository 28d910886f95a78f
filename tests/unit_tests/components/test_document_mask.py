"""Where documents are in a batch, and the attention that stops at their boundaries."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torchtitan.components.dataloader import Batch
from torchtitan.components.document_mask import DocumentMarker, build_document_marker, get_documents
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import build_tokenizer
from torchtitan.config.errors import ConfigError
from torchtitan.config.sections import Training
from torchtitan.distributed.document_attention import attend_within_documents
from torchtitan.protocols.sequences import Sequences

TOKENIZER = Path(__file__).parents[2] / "assets" / "tokenizer"
BOS, EOS = 0, 1

Lists = list[list[int]]


def batch_of(*rows: list[int]) -> Batch:
    ids = torch.tensor(rows)
    return Batch(ids[:, :-1], ids[:, 1:].contiguous())


@pytest.mark.parametrize(
    ("bos_id", "eos_id", "rows", "bounds", "ignored"),
    [
        (BOS, EOS, ([5, 5, EOS, BOS, 5, EOS, BOS], [5] * 7), [[0, 3, 6], [0, 6, 6]], [[2, 5], []]),
        (None, EOS, ([5, 5, EOS, 5, 5, EOS, 5], [EOS, 5, 5, 5, 5, 5, 5]), [[0, 3, 6], [0, 1, 6]], [[2, 5], [0]]),
        (BOS, None, ([5, 5, 5, BOS, 5, 5, BOS], [BOS] + [5] * 6), [[0, 3, 6], [0, 6, 6]], [[2, 5], []]),
        # one token is both: what ends a document, and what begins the next
        (EOS, EOS, ([5, 5, EOS, EOS, 5, EOS, EOS], [EOS, EOS, 5, 5, 5, 5, 5]), [[0, 3, 6], [0, 1, 6]], [[2, 5], [0]]),
    ],
)
def test_documents_are_found_by_what_the_tokenizer_puts_around_them(
    bos_id: int | None,
    eos_id: int | None,
    rows: tuple[list[int], ...],
    bounds: list[list[int]],
    ignored: list[list[int]],
) -> None:
    batch = batch_of(*rows)
    expected = batch.labels.clone()
    for row, columns in enumerate(ignored):
        expected[row, columns] = IGNORE_INDEX
    kept = DocumentMarker(bos_id, eos_id, keeps_labels=True)(batch_of(*rows))
    torch.testing.assert_close(kept.labels, batch.labels)
    marked = DocumentMarker(bos_id, eos_id, keeps_labels=False)(batch)
    torch.testing.assert_close(marked.labels, expected)
    assert marked.documents is not None
    assert marked.documents.bounds.tolist() == bounds
    assert marked.documents.longest.size(1) == max(b - a for row in bounds for a, b in pairwise(row))


def test_positions_start_anew() -> None:
    batch = DocumentMarker(None, EOS, keeps_labels=True)(batch_of([5, EOS, 5, 5, 5, 5], [5] * 6))
    assert batch.documents is not None
    assert batch.documents.get_positions(5).tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]]
    sequences = Sequences(batch.documents.get_positions(5), batch.documents)
    second = sequences.split(1)[1]
    assert second.positions.tolist() == [[0, 1, 2, 3, 4]] and second.documents is not None
    assert second.documents.get_numbers(5).tolist() == [[0] * 5]


def test_a_tokenizer_that_marks_nothing_is_refused() -> None:
    tokenizer = build_tokenizer(TOKENIZER)
    tokenizer.bos_id = tokenizer.eos_id = None
    with pytest.raises(ConfigError, match="neither a BOS nor an EOS"):
        build_document_marker(Training(document_mask=True), tokenizer)
    batch = batch_of([5, EOS, 5])
    assert build_document_marker(Training(), tokenizer)(batch) is batch


def visible_pairs(begins: Tensor, length: int) -> Tensor:
    """(B, 1, length, S), for the last `length` queries."""
    numbers = begins.cumsum(1)
    same = (numbers[:, -length:, None] == numbers[:, None, :]).tril(begins.size(1) - length)
    return same[:, None]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("length", "head_dim"), [(384, 64), (128, 128), (256, 20)])
def test_on_a_gpu_documents_cost_and_see_only_themselves(length: int, head_dim: int, compiled: bool) -> None:
    """The kernel for lengths of all kinds, grouped heads, and queries that are the last of the keys, in float64."""
    heads, kv_heads, seq_len = 4, 2, 384
    torch.manual_seed(0)
    run = torch.compile(attend_within_documents, fullgraph=True) if compiled else attend_within_documents
    for share in (0.02, 0.2, 0.0):
        begins = torch.rand(2, seq_len) < share
        begins[:, 0] = True
        documents = get_documents(begins)
        documents = type(documents)(*(x.cuda() for x in documents))
        shape = {"device": "cuda", "dtype": torch.bfloat16}
        q, grad = (torch.randn(2, length, heads, head_dim, **shape).transpose(1, 2) for _ in range(2))
        k, v = (torch.randn(seq_len, 2, kv_heads, head_dim, **shape).permute(1, 2, 0, 3) for _ in range(2))
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = run(*inputs, documents)
        got = [out, *torch.autograd.grad(out, inputs, grad)]

        wide = [x.detach().double().requires_grad_() for x in inputs]
        keys, values = (x.repeat_interleave(heads // kv_heads, dim=1) for x in wide[1:])
        scores = wide[0] @ keys.transpose(2, 3) / head_dim**0.5
        exact = scores.masked_fill(~visible_pairs(begins, length).cuda(), float("-inf")).softmax(-1) @ values
        expected = [exact, *torch.autograd.grad(exact, wide, grad.double())]
        for name, x, y in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
            error = (x.double() - y).norm() / y.norm()
            assert error < 1e-2, f"{name}: relative error {error:.1e}"
