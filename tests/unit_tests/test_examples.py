"""What the examples of the pages promise, beyond that they run (which tests/integration_tests/test_docs.py sees to)."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tests.integration_tests.doc_pages import REPO, Page
from torchtitan.components.loss import cross_entropy_sum, fused_linear_cross_entropy
from torchtitan.config.sections import LigerKernel
from torchtitan.datasets import DocumentStreams, Position
from torchtitan.distributed.init_weights import init_parameters
from torchtitan.models.common.args import TransformerModelArgs
from torchtitan.models.common.model import Transformer

TINY = TransformerModelArgs(dim=32, n_layers=1, n_heads=2, n_kv_heads=2, ffn_hidden_dim=48, vocab_size=101)


def example(page: str, index: int | str) -> dict[str, Any]:
    """The names that a Python block leaves behind: the one at an index, or the file of a name."""
    parsed = Page.of(REPO / "docs" / page)
    if isinstance(index, str):
        code = parsed.files()[index]
    else:
        code = [block.text for block in parsed.blocks if block.language == "python"][index]
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, page, "exec"), names)
    return names


@pytest.fixture
def model() -> Transformer:
    model = Transformer(TINY)
    init_parameters(model, 0, "cpu")
    return model


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The model families that an example registers, kept from other tests."""
    families: dict[str, Any] = {}
    monkeypatch.setattr(
        "torchtitan.protocols.train_spec.register_train_spec", lambda name, spec: families.update({name: spec})
    )
    return families


def test_the_training_loop_with_the_fused_loss_learns_and_has_the_standard_loss(
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.manual_seed(0)
    names = example("liger_kernel.md", 1)
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 10 and losses[-1] < losses[0] - 1
    hidden, weight, labels = names["hidden"].detach(), names["head"].weight.detach(), names["labels"]
    fused = fused_linear_cross_entropy(hidden, weight, labels, scale=names["scale"])
    torch.testing.assert_close(fused, F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten()))


def test_the_policy_loss_and_its_gradients_are_those_of_logits() -> None:
    torch.manual_seed(0)
    names = example("liger_kernel.md", 2)
    leaves = [names[name].detach().double().requires_grad_() for name in ("hidden", "weight")]
    logp = (leaves[0] @ leaves[1].t()).log_softmax(-1)
    chosen = logp.gather(-1, names["labels"].unsqueeze(-1)).squeeze(-1)
    ratio, advantages = (chosen - chosen.detach()).exp(), names["advantages"]
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    expected = -surrogate + 0.01 * (logp.exp() * logp).sum(-1).mean()
    torch.testing.assert_close(names["policy_loss"].double(), expected, rtol=1e-5, atol=0)
    for name, true in zip(("hidden", "weight"), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(names[name].grad.double(), true, rtol=1e-5, atol=1e-7)


def test_llama_of_transformers_trains_with_its_own_loss_and_without_logits() -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    names = example("liger_kernel.md", 3)
    model, tokens, loss = names["model"], names["tokens"], names["loss"]
    assert model(tokens).logits.shape[-1] == model.config.hidden_size
    fused = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    expected = model.eval()(tokens, labels=tokens).loss
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(fused, {name: p.grad for name, p in model.named_parameters()})


class UpstreamModel(nn.Module):
    """With the last layer left to the loss, as upstream's are where the loss takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.lm_head = nn.Embedding(101, 16), nn.RMSNorm(16), nn.Linear(16, 101, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.embedding(tokens))


class UpstreamTrainer:
    """A stand-in: what upstream's trainer does with a model and a loss that takes the head, with FSDP2, in bf16."""

    def __init__(self, loss: Any) -> None:
        torch.manual_seed(0)
        self.model, self.loss = UpstreamModel(), loss
        options: Any = {"mesh": init_device_mesh("cpu", (1,)), "mp_policy": MixedPrecisionPolicy(torch.bfloat16)}
        fully_shard([self.model.norm, self.model.lm_head], **options)
        fully_shard(self.model, **options)
        loss.set_lm_head(self.model.lm_head)

    def step(self, microbatches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[Tensor]]:
        """The loss and the gradients; the tokens with a label are counted over all microbatches."""
        num_valid = torch.stack([(labels != -100).sum() for _, labels in microbatches]).sum().float()
        total = torch.zeros(())
        for tokens, labels in microbatches:
            loss = self.loss(self.model(tokens), labels, num_valid)
            loss.backward()
            total += loss.detach()
        return total, [p.grad.full_tensor() for p in self.model.parameters()]


def test_the_loss_for_upstreams_trainer_is_cross_entropy_of_its_head() -> None:
    class StandardLoss:
        def set_lm_head(self, lm_head: nn.Linear) -> None:
            self.lm_head = lm_head

        def __call__(self, hidden: Tensor, labels: Tensor, global_valid_tokens: Tensor) -> Tensor:
            return cross_entropy_sum(self.lm_head(hidden), labels) / global_valid_tokens

    microbatches = list(zip(torch.randint(101, (2, 3, 8)), torch.randint(101, (2, 3, 8)), strict=True))
    microbatches[0][1][:, :5] = -100
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        losses = (StandardLoss(), example("liger_kernel.md", 4)["FusedLoss"]())
        (expected, true), (found, mine) = (UpstreamTrainer(loss).step(microbatches) for loss in losses)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(found, expected)
    for a, b in zip(mine, true, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-4)


def test_z_loss_is_cross_entropy_plus_the_square_of_log_z_of_valid_tokens(
    model: Transformer, registered: dict[str, Any]
) -> None:
    loss_cls = example("extending.md", "my_z_loss.py")["ZLoss"]
    options = {"device_type": "cpu", "tensor_parallel": False, "compile": False}
    assert type(registered["llama3_z"].load().build_loss(LigerKernel(), **options)) is loss_cls
    loss = loss_cls(weight=0.5)
    hidden, labels = torch.randn(2, 5, TINY.dim), torch.randint(TINY.vocab_size, (2, 5))
    labels[0, :3] = -100
    logits = model.output(hidden)
    expected = cross_entropy_sum(logits, labels) + 0.5 * logits.logsumexp(-1)[labels != -100].square().sum()
    torch.testing.assert_close(loss(hidden, model.output, labels, torch.tensor(0.25)), expected / 4)


def test_the_sums_are_right_and_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: dict[str, Any] = {}
    monkeypatch.setattr("torchtitan.datasets.register_dataset", lambda name, open: registered.update({name: open}))
    example("extending.md", "my_sums.py")
    source = registered["sums"]("text")
    documents = [text for _, text in DocumentStreams(source, seed=1, infinite=False).read(0, Position())]
    assert len(documents) == 6400
    a, plus, b, equals, c = documents[0].split("\n")[0].split()
    assert (plus, equals) == ("+", "=") and int(a) + int(b) == int(c)
    assert list(source.read(3, 0, 1)) == list(source.read(3, 0, 1))


def test_the_averager_is_causal_and_counts_itself_right(registered: dict[str, Any]) -> None:
    example("extending.md", "my_averager.py")
    spec = registered["averager"]
    args = spec.flavors["tiny"]
    averager = spec.load().model_cls(args)
    init_parameters(averager, 0, "cpu")
    assert sum(p.numel() for p in averager.parameters()) == args.num_params()
    tokens = torch.randint(args.vocab_size, (1, 12))
    changed = tokens.clone()
    changed[0, 8:] = 0
    torch.testing.assert_close(averager(tokens)[:, :8], averager(changed)[:, :8])
    assert not torch.equal(averager(tokens)[:, 8:], averager(changed)[:, 8:])
