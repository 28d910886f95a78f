"""Greedy continuations of prompts by the model in training: what validation.prompts asks for, on every layout.

All prompts run as one batch through the runner, as validation's sequences do, once for each new token. There is no
cache of keys and values, which a pipeline or a divided sequence would have to share (generation.py has one, for models
that are whole or tensor-parallel). Where a text ends travels as its only label, wherever the layout takes that token:
there the next one is read from the logits.

Shapes: P prompts, S the length of all of them, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.runner import Runner
from torchtitan.components.tokenizer import Tokenizer
from torchtitan.config.errors import ConfigError
from torchtitan.config.sections import Validation
from torchtitan.distributed.context_parallel import ContextSharder
from torchtitan.distributed.mesh import Mesh
from torchtitan.distributed.utils import dist_sum


@dataclass
class Sampler:
    """Continues the prompts; a collective call of all ranks, which all ask `must_stop` before each new token.

    Raises:
        ConfigError: a prompt has no tokens, or too many.
    """

    validation: Validation
    tokenizer: Tokenizer
    runner: Runner
    shard_context: ContextSharder
    mesh: Mesh
    device: torch.device
    context: int
    """Tokens that the model can see."""
    must_stop: Callable[[], bool]

    def __post_init__(self) -> None:
        prompts, new = self.validation.prompts, self.validation.max_new_tokens
        self.ids = [self.tokenizer.encode(prompt, add_bos=True, add_eos=False) for prompt in prompts]
        # sequences are divided evenly, in two parts over context ranks
        unit = 2 * self.mesh["cp"].size() * self.mesh["tp"].size()
        room = self.context // unit * unit - new
        for prompt, tokens in zip(prompts, self.ids, strict=True):
            if not 0 < len(tokens) <= room:
                raise ConfigError(
                    f"validation.prompts: {prompt!r} has {len(tokens)} tokens; expected 1 to {room}, with which"
                    f" validation.max_new_tokens={new} more fit into the model's {self.context}"
                )
        self.seq_len = -(-(max(map(len, self.ids), default=0) + new) // unit) * unit

    def __call__(self) -> list[tuple[str, str]] | None:
        """Each prompt and what follows it, up to the end token; None where it must stop. The model is in eval mode."""
        tokens = torch.zeros(len(self.ids), self.seq_len, dtype=torch.int64)  # (P, S)
        ends = torch.tensor([len(ids) for ids in self.ids])
        for row, ids in enumerate(self.ids):
            tokens[row, : len(ids)] = torch.tensor(ids)
        rows = torch.arange(len(self.ids))
        for _ in range(self.validation.max_new_tokens if self.ids else 0):
            if self.must_stop():
                return None
            tokens[rows, ends] = self._next_tokens(tokens, ends)
            ends += 1
        texts = []
        for prompt, ids, made in zip(self.validation.prompts, self.ids, tokens.tolist(), strict=True):
            new = made[len(ids) : len(ids) + self.validation.max_new_tokens]
            if self.tokenizer.eos_id in new:
                new = new[: new.index(self.tokenizer.eos_id)]
            # what a tokenizer makes of the first tokens may depend on those before
            texts.append((prompt, self.tokenizer.decode([*ids, *new])[len(self.tokenizer.decode(ids)) :]))
        return texts

    def _next_tokens(self, tokens: Tensor, ends: Tensor) -> Tensor:
        """(P, S) and the length of each text -> (P,), on the CPU."""
        num_prompts = len(tokens)
        labels = torch.full_like(tokens, IGNORE_INDEX)
        labels[torch.arange(num_prompts), ends - 1] = torch.arange(num_prompts)  # which prompt's text ends there

        def read(logits: Tensor, labels: Tensor) -> Tensor:
            """The most probable token of each prompt whose end is here; 0 for the others."""
            whole = logits.full_tensor() if isinstance(logits, DTensor) else logits  # (p, s, V)
            here = labels != IGNORE_INDEX  # (p, s)
            found = torch.zeros(num_prompts, device=logits.device)
            return found.scatter(0, labels[here], whole[here].argmax(-1).float())

        place = self.shard_context(tokens.to(self.device), labels.to(self.device))
        # Compiled for the lengths of training and validation: another one is not worth a compilation.
        with torch.compiler.set_stance("force_eager"):
            found = torch.zeros(num_prompts, device=self.device) + self.runner.eval_loss(*place, loss_sum=read)
        # float32 holds every id below 2**24; a context rank has some of the ends, a pipeline's last stage all
        return dist_sum(dist_sum(found, self.mesh["cp"]), self.mesh["pp"]).long().cpu()
