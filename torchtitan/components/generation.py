"""Text from a model, token by token: the cache of keys and values, the choice of a token, ids to text as they come.

The model is left as it is: while it generates, the attention kernel of each block (`attention.sdpa`) is replaced by
one that remembers keys and values. The prompt but for its last token runs through the model at once, without logits;
then each step runs one token and attends to all before it.

Under tensor parallel each rank caches its own heads. The sequence of a step is divided over the ranks too, so it is
filled up to a multiple of their number. What was filled in stands last, where nothing that counts attends to it, and
is overwritten in the cache by the next step.

Shapes: B batch (1), S tokens of a step, N tokens so far, H query heads, K key/value heads, E head dim, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from torchtitan.config.errors import ConfigError
from torchtitan.distributed.attention_kernels import attend_to_prefix
from torchtitan.protocols.model import Decoder
from torchtitan.protocols.sequences import Documents, Sequences


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: from the top_k most probable ones (0: all), and of these from the fewest whose
    probabilities add up to top_p. Temperature 0 takes the most probable one.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature={self.temperature}: expected 0, which is greedy, or more")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k}: expected 1 or more, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: expected a probability above 0 and up to 1")

    def choose(
        self,
        logits: Tensor,  # (V,)
        generator: torch.Generator | None = None,
    ) -> Tensor:  # () int64
        if self.temperature < torch.finfo(torch.float32).tiny:  # as good as 0, and 0 where float32 divides by it
            return logits.argmax()
        return torch.multinomial(self.get_probabilities(logits), 1, generator=generator).squeeze(0)

    def get_probabilities(self, logits: Tensor) -> Tensor:  # (V,) -> (V,) float32; temperature above 0
        logits = logits.float()
        # The maximum goes first: a quotient by a small temperature would overflow.
        scaled, ids = ((logits - logits.max()) / self.temperature).sort(descending=True, stable=True)
        if self.top_k:
            scaled, ids = scaled[: self.top_k], ids[: self.top_k]
        probabilities = scaled.softmax(0)
        if self.top_p < 1:
            before = probabilities.cumsum(0) - probabilities  # of the more probable tokens
            before[0] = -1  # the most probable one stays, however small top_p is
            probabilities = probabilities.masked_fill(before >= self.top_p, 0)
            probabilities = probabilities / probabilities.sum()
        return torch.zeros_like(logits).scatter(0, ids, probabilities)


@torch.no_grad()
def generate(
    model: Decoder,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos_ids: Set[int] = frozenset(),
    generator: torch.Generator | None = None,
    tp_mesh: DeviceMesh | None = None,
) -> Iterator[int]:
    """The tokens that follow the prompt, each as soon as it is known, up to one of `eos_ids`, which is not among them.

    Args:
        model: as PretrainedModel.build_model makes it. It must not be run otherwise until the iterator is closed.
        generator: on the model's device.
        tp_mesh: the ranks over which the model is divided; all iterate, and get the tokens that the first one draws.
    """
    assert len(prompt) > 0, "there must be a token to continue"
    num_ranks = 1 if tp_mesh is None else tp_mesh.size()
    device = next(model.parameters()).device
    with cached_attention(model, capacity=len(prompt) + max_new_tokens + num_ranks) as cache:

        def run(ids: Sequence[int], *, return_hidden_states: bool) -> Tensor:  # (S, V) or (S, D)
            padded = [*ids, *[0] * (-len(ids) % num_ranks)]
            # Those that are filled in may lie beyond the rotary table: any position will do.
            places = [cache.length + min(i, len(ids) - 1) for i in range(len(padded))]
            tokens, positions = torch.tensor([padded, places], device=device).split(1)  # each (1, S)
            out = model(tokens, return_hidden_states, sequences=Sequences(positions))
            cache.length += len(ids)
            return out[0]

        *before, last = prompt
        if before:
            run(before, return_hidden_states=True)
        for _ in range(max_new_tokens):
            token = sampling.choose(run([last], return_hidden_states=False)[0], generator)
            if tp_mesh is not None:
                dist.broadcast(token, group=tp_mesh.get_group(), group_src=0)
            last = int(token.item())
            if last in eos_ids:
                return
            yield last


def get_num_new_tokens(num_prompt_tokens: int, max_new_tokens: int | None, *, context: int, default: int = 100) -> int:
    """How many tokens to make at most: those asked for, else the default or what the context leaves.

    Raises:
        ConfigError: the context has no room for them.
    """
    room = context - num_prompt_tokens
    if room < 1:
        raise ConfigError(
            f"the prompt has {num_prompt_tokens} tokens, and the model's context {context}: nothing can follow it;"
            f" give at most {context - 1}"
        )
    if max_new_tokens is None:
        return min(default, room)
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens}: expected 1 or more")
    if max_new_tokens > room:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens} after a prompt of {num_prompt_tokens} tokens is more than the model's"
            f" context of {context}; ask for at most {room}"
        )
    return max_new_tokens


@dataclass
class KVCache:
    """What the caches of all blocks have in common."""

    capacity: int
    length: int = 0
    """Tokens that the model has seen."""


@contextmanager
def cached_attention(model: Decoder, *, capacity: int) -> Iterator[KVCache]:
    """Let each block remember up to `capacity` tokens. The caller counts up `length` after each step."""
    cache = KVCache(capacity)
    try:
        attentions = [block.get_submodule("attention") for block in model.layers.values()]
        kernels = [attention.get_submodule("sdpa") for attention in attentions]
    except AttributeError as error:
        raise ConfigError(
            f"only models whose blocks have attention.sdpa can make text, as Llama 3's do: {error}"
        ) from None
    for attention in attentions:
        attention.sdpa = CachedAttention(cache)
    try:
        yield cache
    finally:
        for attention, kernel in zip(attentions, kernels, strict=True):
            attention.sdpa = kernel


class CachedAttention(nn.Module):
    """Causal attention of the tokens of a step to themselves and to all before them."""

    def __init__(self, cache: KVCache):
        super().__init__()
        self._cache = cache
        self._past: Tensor | None = None  # (2, B, K, capacity, E)

    def forward(
        self,
        q: Tensor,  # (B, H, S, E)
        k: Tensor,  # (B, K, S, E)
        v: Tensor,  # (B, K, S, E)
        documents: Documents | None = None,
    ) -> Tensor:  # (B, H, S, E)
        assert documents is None, "a text is one document"
        if self._past is None:  # only here is it known which heads this rank has
            batch_size, num_heads, _, head_dim = k.shape
            self._past = k.new_empty(2, batch_size, num_heads, self._cache.capacity, head_dim)
        begin, end = self._cache.length, self._cache.length + k.size(2)
        self._past[:, :, :, begin:end] = torch.stack((k, v))
        keys, values = self._past[:, :, :, :end]  # (B, K, N, E)
        return attend_to_prefix(q, keys, values)


class TextStream:
    """Ids to text as they come. A character whose bytes are spread over several tokens is given when it is whole."""

    def __init__(self, decode: Callable[[Sequence[int]], str], context: Sequence[int] = ()):
        """`context` comes before the first id: some tokenizers decode a token at the start of a text differently."""
        self._decode = decode
        self._ids = list(context)
        self._num_given = len(self._ids)  # the others are not given yet

    def add(self, token: int) -> str:
        """The text that is complete now; empty while a character is not."""
        self._ids.append(token)
        text = self._rest()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._ids, self._num_given = self._ids[self._num_given :], len(self._ids) - self._num_given
        return text

    def end(self) -> str:
        """What was held back, with a replacement character for what never became whole."""
        text = self._rest()
        self._num_given = len(self._ids)
        return text

    def _rest(self) -> str:
        given = self._decode(self._ids[: self._num_given])
        return self._decode(self._ids)[len(given) :]
