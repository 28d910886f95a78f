"""Generation: the cache changes no token, the filters are what they say, text comes in whole characters."""

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from tests.unit_tests.distributed.processes import run_processes
from torchtitan.components.generation import Sampling, TextStream, generate, get_num_new_tokens
from torchtitan.components.tokenizer import build_tokenizer
from torchtitan.config.errors import ConfigError
from torchtitan.distributed.init_weights import init_parameters
from torchtitan.distributed.tensor_parallel import apply_tp
from torchtitan.models.common.args import TransformerModelArgs
from torchtitan.models.common.model import Transformer
from torchtitan.models.common.parallelize import TENSOR_PARALLEL_PLAN

ARGS = TransformerModelArgs(
    dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_hidden_dim=48, vocab_size=61, max_seq_len=32
)
GREEDY = Sampling(temperature=0)


def build_model() -> Transformer:
    model = Transformer(ARGS)
    init_parameters(model, seed=4, device="cpu")
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.mul_(8)  # so that attention decides
    return model.eval()


@torch.no_grad()
def generate_without_cache(model: Transformer, prompt: list[int], num_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def draw(seed: int, **options) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    sampling = Sampling(**options)
    return list(generate(build_model(), [1, 2, 3], max_new_tokens=20, sampling=sampling, generator=generator))


# Tokens


@pytest.mark.parametrize("prompt", [[5], [7, 8], [3, 1, 4, 1, 5, 9, 2, 6, 5]])
def test_tokens_equal_those_of_full_recomputation(prompt):
    model = build_model()
    expected = generate_without_cache(model, prompt, 20)
    assert len(set(expected)) > 5  # else it shows nothing
    assert list(generate(model, prompt, max_new_tokens=20, sampling=GREEDY)) == expected


def test_context_can_be_used_up():
    model = build_model()
    expected = generate_without_cache(model, [5], ARGS.max_seq_len - 1)
    assert list(generate(model, [5], max_new_tokens=ARGS.max_seq_len - 1, sampling=GREEDY)) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("prompt", [[5], [3, 1, 4, 1, 5, 9, 2, 6, 5]])
def test_tokens_on_a_gpu_are_the_most_probable_ones(prompt):
    model = build_model()
    expected = generate_without_cache(model, prompt, 20)
    assert list(generate(model.cuda(), prompt, max_new_tokens=20, sampling=GREEDY)) == expected

    in_bf16 = build_model().cuda().bfloat16()
    in_bf16.init_buffers("cuda")
    made = list(generate(in_bf16, prompt, max_new_tokens=20, sampling=GREEDY))
    ids = torch.tensor([prompt + made], device="cuda")
    with torch.no_grad():
        logits = in_bf16.float()(ids)[0, len(prompt) - 1 : -1]  # (20, V): the same weights, without rounding between
    chosen = logits.gather(1, torch.tensor(made, device="cuda")[:, None])[:, 0]
    assert (logits.max(1).values - chosen).max() < 0.05 * logits.std()


def generate_with_two_ranks() -> dict[str, list[int]]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = build_model()
    apply_tp(model, mesh, TENSOR_PARALLEL_PLAN, loss_parallel=False)
    run = partial(generate, model, tp_mesh=mesh)
    # each rank would draw other tokens: those of the first count
    unequal = torch.Generator().manual_seed(mesh.get_rank())
    return {
        "odd": list(run([5, 6, 7], max_new_tokens=6, sampling=GREEDY)),
        "even": list(run([1, 2], max_new_tokens=6, sampling=GREEDY)),
        "full": list(run([5], max_new_tokens=ARGS.max_seq_len - 1, sampling=GREEDY)),
        "drawn": list(run([1, 2, 3], max_new_tokens=6, sampling=Sampling(temperature=1.0), generator=unequal)),
    }


def test_two_ranks_make_the_tokens_of_one():
    results = run_processes(generate_with_two_ranks, 2)
    model = build_model()
    assert results[0] == results[1]
    assert results[0]["odd"] == generate_without_cache(model, [5, 6, 7], 6)
    assert results[0]["even"] == generate_without_cache(model, [1, 2], 6)
    assert results[0]["full"] == generate_without_cache(model, [5], ARGS.max_seq_len - 1)
    assert results[0]["drawn"] == draw(0, temperature=1.0)[:6]


def test_stops_before_an_end_token():
    model = build_model()
    expected = generate_without_cache(model, [5, 6], 20)
    stop = expected[7]
    made = list(generate(model, [5, 6], max_new_tokens=20, sampling=GREEDY, eos_ids={stop, 10**6}))
    assert made == expected[: expected.index(stop)]


@pytest.mark.parametrize("num_taken", [0, 3])
def test_model_is_left_as_it_was(num_taken):
    model = build_model()
    kernels = [block.attention.sdpa for block in model.layers.values()]
    tokens = generate(model, [1, 2], max_new_tokens=5, sampling=GREEDY)
    for _ in range(num_taken):
        next(tokens)
    tokens.close()
    assert [block.attention.sdpa for block in model.layers.values()] == kernels


def test_a_model_without_such_attention_is_refused():
    model = build_model()
    del model.layers["1"].attention
    with pytest.raises(ConfigError, match="only models whose blocks have attention.sdpa can make text"):
        next(generate(model, [1], max_new_tokens=3, sampling=GREEDY))


class WithoutGraph(Sampling):
    def choose(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        assert not logits.requires_grad
        return super().choose(logits, generator)


def test_makes_no_graph_and_keeps_the_callers_grad_mode():
    model = build_model()
    assert model(torch.tensor([[1]])).requires_grad
    tokens: Iterator[int] = generate(model, [1], max_new_tokens=3, sampling=WithoutGraph(temperature=0))
    next(tokens)
    assert torch.is_grad_enabled()


# The choice of a token


LOGITS = torch.tensor([0.1, 0.4, 0.2, 0.3]).log() + 5  # probabilities, whatever is added to their logarithms


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),  # squares
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 3}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.39}, [0, 1, 0, 0]),
        ({"top_p": 0.5}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.69}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.71}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 0.01}, [0, 1, 0, 0]),  # one is always left
        ({"top_k": 3, "top_p": 0.42}, [0, 1, 0, 0]),  # top_p counts what top_k leaves: not 0.4 but 4 / 9
        ({"top_k": 3, "top_p": 0.5}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 0.5, "top_p": 0.6}, [0, 16 / 25, 0, 9 / 25]),
        ({"temperature": 1e-30}, [0, 1, 0, 0]),
        ({"top_p": 1e-300}, [0, 1, 0, 0]),  # 0 in float32
    ],
)
def test_probabilities_equal_those_by_hand(options, expected):
    probabilities = Sampling(**{"temperature": 1.0, **options}).get_probabilities(LOGITS)
    torch.testing.assert_close(probabilities, torch.tensor(expected, dtype=torch.float32))


def test_tokens_are_drawn_by_their_probabilities():
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(temperature=1.0, top_k=3)
    counts = torch.bincount(torch.stack([sampling.choose(LOGITS, generator) for _ in range(2000)]), minlength=4)
    torch.testing.assert_close(counts / 2000, sampling.get_probabilities(LOGITS), atol=0.04, rtol=0)
    assert counts[0] == 0


def test_a_temperature_that_is_0_in_float32_is_the_most_probable_token():
    assert Sampling(temperature=1e-46).choose(LOGITS) == Sampling(temperature=0).choose(LOGITS)


def test_temperature_0_is_the_most_probable_token():
    assert GREEDY.choose(LOGITS) == 1


def test_a_seed_repeats_the_tokens_and_another_one_does_not():
    assert draw(1, temperature=1.0) == draw(1, temperature=1.0)
    assert draw(1, temperature=1.0) != draw(2, temperature=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0: expected 0, which is greedy, or more"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": -1}, "top_k=-1: expected 1 or more, or 0 for all tokens"),
        ({"top_p": 0.0}, "top_p=0.0: expected a probability above 0 and up to 1"),
        ({"top_p": 1.1}, "top_p=1.1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)


# Lengths


def test_number_of_tokens_is_what_was_asked_for_or_what_fits():
    assert get_num_new_tokens(10, 7, context=64) == 7
    assert get_num_new_tokens(10, 54, context=64) == 54
    assert get_num_new_tokens(10, None, context=64) == 54
    assert get_num_new_tokens(10, None, context=1000) == 100
    with pytest.raises(ConfigError, match="of 10 tokens is more than the model's context of 64; ask for at most 54"):
        get_num_new_tokens(10, 55, context=64)
    with pytest.raises(ConfigError, match="the prompt has 64 tokens, and the model's context 64: .*at most 63"):
        get_num_new_tokens(64, None, context=64)
    with pytest.raises(ConfigError, match="max_new_tokens=0: expected 1 or more"):
        get_num_new_tokens(10, 0, context=64)


# Text


SHIPPED = build_tokenizer(Path("tests/assets/tokenizer"))


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2's: bytes are tokens of their own, and a token at the start of a text loses its space."""
    vocab = {"<unk>": 0, "▁a": 1, "b": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


FALLBACK = byte_fallback()
TEXT = "naïve 🌍€ … 𝄞 family: 👩‍👩‍👧\n日本語"


def stream(decode, ids: list[int], context: list[int] = ()) -> list[str]:
    text = TextStream(decode, context)
    return [*(text.add(i) for i in ids), text.end()]


def test_characters_come_whole_and_as_soon_as_they_are():
    ids = SHIPPED.encode(TEXT, add_bos=False, add_eos=False)
    assert len(ids) > len(TEXT)
    pieces = stream(SHIPPED.decode, ids)
    assert "".join(pieces) == TEXT
    assert pieces[-1] == ""
    for n in range(1, len(ids)):
        assert "".join(pieces[:n]) == SHIPPED.decode(ids[:n]).rstrip("\N{REPLACEMENT CHARACTER}")


def test_characters_come_whole_where_a_cut_one_spoils_all_bytes_before_it():
    data = TEXT.encode()
    pieces = stream(FALLBACK.decode, [3 + byte for byte in data])
    assert FALLBACK.decode([3 + byte for byte in data[:3]]) == "\N{REPLACEMENT CHARACTER}" * 3  # "na" and half of "ï"
    for n in range(1, len(data) + 1):
        assert "".join(pieces[:n]) == data[:n].decode(errors="ignore")


def test_any_ids_make_the_text_that_they_make_at_once():
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(SHIPPED.vocab_size if rng.random() < 0.3 else 258) for _ in range(12)]
        assert "".join(stream(SHIPPED.decode, ids)) == SHIPPED.decode(ids)


def test_what_never_becomes_whole_comes_at_the_end():
    ids = SHIPPED.encode("x🌍", add_bos=False, add_eos=False)
    assert stream(SHIPPED.decode, ids[:-1])[-1] == "\N{REPLACEMENT CHARACTER}"


def test_text_goes_on_after_its_context():
    assert FALLBACK.decode([1]) == "a"
    assert stream(FALLBACK.decode, [1, 2], context=[1]) == [" a", "b", ""]
    assert stream(SHIPPED.decode, [SHIPPED.bos_id, 70, SHIPPED.bos_id, 71])[::2] == ["", "", ""]
