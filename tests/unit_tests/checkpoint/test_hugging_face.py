"""Checkpoints in Hugging Face's format: no bit changes, and transformers computes the same."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.unit_tests.checkpoint.checkpointed_run import MODEL, assert_same, build_run, damage, folder, names, no_space
from tests.unit_tests.checkpoint.simulated_ranks import SimulatedRanks, divide, mesh_of, run_ranks
from torchtitan.checkpoint import hugging_face
from torchtitan.checkpoint.storage import read_metadata
from torchtitan.config.errors import CheckpointError
from torchtitan.models.common.args import RopeScaling, TransformerModelArgs
from torchtitan.models.common.model import Transformer
from torchtitan.models.llama3 import train_spec
from torchtitan.tools import terminal

build_adapter = train_spec.load().state_dict_adapter

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.mark.parametrize("bytes_per_file", [5 * 10**9, 20_000])
def test_hugging_face_round_trip_is_bit_exact(tmp_path, bytes_per_file, monkeypatch):
    monkeypatch.setattr(hugging_face, "BYTES_PER_FILE", bytes_per_file)
    run = build_run(tmp_path, steps=3, last_save_in_hf=True)
    run.train(3)
    path = folder(run) / "step-3"
    written = {file.name for file in path.iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= written
    assert not any("distcp" in name for name in written)
    assert ("model.safetensors" in written) == (bytes_per_file > 20_000)
    config = json.loads((path / "config.json").read_bytes())
    assert (config["torch_dtype"], config["bos_token_id"], config["eos_token_id"]) == ("float32", 59, 60)
    other = build_run(tmp_path / "other", initial_load_path=str(path), initial_load_in_hf=True)
    nn.init.zeros_(other.parts[0].output.weight)
    assert other.checkpointer.load()
    weights = Transformer(MODEL).state_dict().keys()
    assert_same({k: other.full_state()[k] for k in weights}, {k: run.full_state()[k] for k in weights})


def test_ranks_read_their_own_shares_and_write_files_in_turns(tmp_path, monkeypatch):
    """16 simulated ranks, whose shards of wq and wk are parts of a head, load what three have written: never did one
    wait for another as long as all the writing took.
    """
    export = build_run(tmp_path, steps=1)
    export.train(1)
    ours, theirs = folder(export) / "step-1", tmp_path / "theirs"
    monkeypatch.setattr(hugging_face, "BYTES_PER_FILE", 1)  # a file for each weight
    save_file, gather = hugging_face.safetensors.torch.save_file, SimulatedRanks.gather
    saved: list[int] = []
    num_saved = [0]  # when the first rank meets the others

    def save_and_count(*arguments: Any, **options: Any) -> None:
        save_file(*arguments, **options)
        saved.append(1)

    def meet(self: SimulatedRanks, value: Any) -> list[Any]:
        if self.is_first:
            num_saved.append(len(saved))
        return gather(self, value)

    monkeypatch.setattr(hugging_face.safetensors.torch, "save_file", save_and_count)
    monkeypatch.setattr(SimulatedRanks, "gather", meet)
    format = hugging_face.HuggingFaceFormat(build_adapter(MODEL))
    run_ranks(3, lambda ranks: format.convert(ours, theirs, ranks=ranks))
    assert num_saved[-1] == len(saved) == 21
    assert max(later - before for before, later in pairwise(num_saved)) <= 2 * 3  # of two turns

    safe_open, num_bytes = hugging_face.safetensors.safe_open, 0

    class Counting:
        """A weight in a file, or all of a file's."""

        def __init__(self, opened: Any):
            self.opened = opened

        def __getattr__(self, name: str) -> Any:
            return getattr(self.opened, name)

        def __getitem__(self, part: Any) -> torch.Tensor:
            nonlocal num_bytes
            num_bytes += self.opened[part].nbytes
            return self.opened[part]

        def get_slice(self, name: str) -> "Counting":
            return Counting(self.opened.get_slice(name))

    @contextmanager
    def counted(*arguments: Any, **options: Any) -> Iterator[Counting]:
        with safe_open(*arguments, **options) as opened:
            yield Counting(opened)

    monkeypatch.setattr(hugging_face.safetensors, "safe_open", counted)
    whole = export.full_state()
    whole = {name: whole[name] for name in Transformer(MODEL).state_dict()}
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=16)
    mesh = init_device_mesh("cpu", (8, 2), mesh_dim_names=("dp_shard_cp", "tp"))
    rows, columns = (_StridedShard(0, split_factor=2), Shard(0)), (Shard(0), Shard(1))
    layouts = {name: (Shard(0), Replicate()) if "norm" in name else rows for name in whole}
    layouts |= {name: columns for name in whole if ".wo." in name or ".w2." in name}
    for rank in range(16):
        expected = divide(whole, layouts, mesh_of(rank, mesh))
        loaded = divide(
            {name: torch.zeros_like(weight) for name, weight in whole.items()}, layouts, mesh_of(rank, mesh)
        )
        num_bytes = 0
        format.load(theirs, loaded)
        assert_same({n: t.to_local() for n, t in loaded.items()}, {n: t.to_local() for n, t in expected.items()})
        assert num_bytes == sum(tensor.to_local().nbytes for tensor in loaded.values())
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def test_there_and_back_keeps_where_a_text_ends(tmp_path, monkeypatch, caplog):
    export = build_run(tmp_path, steps=1, last_save_in_hf=True)
    export.train(1)
    theirs, ours, back = folder(export) / "step-1", tmp_path / "ours", tmp_path / "back"
    config = json.loads((theirs / "config.json").read_bytes())
    (theirs / "config.json").write_text(json.dumps({**config, "eos_token_id": [1, 5, 7]}))
    (theirs / "generation_config.json").write_text('{"eos_token_id": [1, 5]}')
    (theirs / "chat_template.jinja").write_text("{{ messages }}")
    ours_to_theirs = hugging_face.HuggingFaceFormat(build_adapter(MODEL), bos_id=59, eos_id=60)
    shapes = {name: weight.shape for name, weight in Transformer(MODEL).state_dict().items()}
    monkeypatch.setattr(terminal, "SAID_EVERY_S", 0)
    caplog.clear()
    opened, create_stream = [], FileSystem.create_stream

    def count_and_open(self: FileSystem, path: Any, mode: str) -> Any:
        opened.append(path.name)
        return create_stream(self, path, mode)

    ours_to_theirs.convert_back(theirs, ours, shapes)
    monkeypatch.setattr(FileSystem, "create_stream", count_and_open)
    ours_to_theirs.convert(ours, back)
    assert opened == ["__0_0.distcp"]  # once, for all the weights of a file
    ends = [message for message in caplog.messages if message.endswith(": 100%, 0:00:00 left")]
    assert [message.split(": ")[0] for message in ends] == [f"Reading {theirs}", f"Converting {ours}"]
    assert json.loads((back / "config.json").read_bytes())["eos_token_id"] == [1, 5, 7]
    assert (back / "generation_config.json").read_text() == '{"eos_token_id": [1, 5]}'
    assert (ours / "chat_template.jinja").exists()


@pytest.mark.parametrize("beside", ["another tokenizer", None])
def test_the_tokenizer_of_an_export_is_the_file_that_was_named(tmp_path, beside):
    export = build_run(tmp_path, steps=1)
    export.train(1)
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok/mine.json").write_text("mine")
    if beside is not None:
        (tmp_path / "tok/tokenizer.json").write_text(beside)
    adapter = build_adapter(MODEL)
    ours_to_theirs = hugging_face.HuggingFaceFormat(adapter, tokenizer_path=tmp_path / "tok/mine.json")
    ours_to_theirs.convert(folder(export) / "step-1", tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_text() == "mine"


def test_transformers_loads_the_export_and_computes_the_same_logits(tmp_path):
    from transformers import AutoModelForCausalLM

    run = build_run(tmp_path, steps=3, last_save_in_hf=True)
    run.train(3)
    theirs = AutoModelForCausalLM.from_pretrained(folder(run) / "step-3")
    tokens = torch.randint(MODEL.vocab_size, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, run.parts[0](tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_own_save_is_loaded(tmp_path, tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {k: v for k, v in build_adapter(MODEL).to_hf_config().items() if k not in ("architectures",)}
    theirs = LlamaForCausalLM(LlamaConfig(**{**config, "tie_word_embeddings": tied}))
    theirs.save_pretrained(tmp_path / "hf")
    args = replace(MODEL, tie_embeddings=tied)
    run = build_run(tmp_path, args=args, initial_load_path=str(tmp_path / "hf"), initial_load_in_hf=True)
    assert run.checkpointer.load()
    tokens = torch.randint(MODEL.vocab_size, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, run.parts[0](tokens), rtol=1e-5, atol=1e-5)


def test_what_lies_in_a_folder_beside_the_model_is_refused_by_name(tmp_path):
    """But for a copy of a weight, and what follows from the config."""
    args = replace(MODEL, tie_embeddings=True)
    export = build_run(tmp_path, args=args, steps=1, last_save_in_hf=True)
    export.train(1)
    path = folder(export) / "step-1"
    weights = load_file(path / "model.safetensors")
    assert "lm_head.weight" not in weights
    embedding = weights["model.embed_tokens.weight"]

    def load(**more: torch.Tensor) -> None:
        save_file(
            weights | {name.replace("__", "."): tensor.clone() for name, tensor in more.items()},
            path / "model.safetensors",
        )
        options = {"initial_load_path": str(path), "initial_load_in_hf": True}
        build_run(tmp_path / "new", args=args, **options).checkpointer.load()

    load(lm_head__weight=embedding, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(4))
    with pytest.raises(CheckpointError, match=r"lm_head.weight is not model.embed_tokens.weight, to which config.json"):
        load(lm_head__weight=embedding + 1)
    with pytest.raises(CheckpointError, match=r"holds model.layers.2.mlp.up_proj.weight, which has no place in this"):
        load(model__layers__2__mlp__up_proj__weight=embedding)
    with pytest.raises(CheckpointError, match=r"holds model.layers.0.self_attn.k_proj.bias and 1 more, which has no"):
        load(model__layers__0__self_attn__q_proj__bias=embedding, model__layers__0__self_attn__k_proj__bias=embedding)


def test_failed_conversion_leaves_the_weights_in_our_format(tmp_path, monkeypatch):
    run = build_run(tmp_path, steps=3, last_save_in_hf=True)
    run.train(2)
    monkeypatch.setattr(hugging_face.safetensors.torch, "save_file", no_space)
    with pytest.raises(
        CheckpointError, match=r"step-3 could not be rewritten .*No space left on device.*holds the weights"
    ):
        run.train(3)
    assert names(run) == ["step-2", "step-3"]
    assert read_metadata(folder(run) / "step-3").state_dict_metadata.keys() == Transformer(MODEL).state_dict().keys()


def test_bad_hugging_face_folders_are_explained(tmp_path):
    export = build_run(tmp_path, steps=1, last_save_in_hf=True)
    export.train(1)
    path = folder(export) / "step-1"

    def load(args: TransformerModelArgs = MODEL) -> None:
        build_run(tmp_path / "new", args=args, initial_load_path=str(path), initial_load_in_hf=True).checkpointer.load()

    (tmp_path / "empty").mkdir()
    config = json.loads((path / "config.json").read_bytes())
    scaled = build_adapter(replace(MODEL, rope_scaling=RopeScaling())).to_hf_config()
    for change, message in (
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, and 2 in this model"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2'; the families of this package have "),
        ({"attention_bias": True}, "attention_bias is True; LlamaForCausalLM here has False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, and False in this model"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; LlamaForCausalLM here has 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantized weights are not supported"),
        (scaled, r"rope_scaling is {'rope_type': 'llama3', .*}, and None in this model"),
    ):
        (path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(CheckpointError, match=f"config.json: {message}"):
            load()
    (path / "config.json").unlink()
    damage(path / "model.safetensors", "cut")
    with pytest.raises(CheckpointError, match="model.safetensors"):
        load()
    path = tmp_path / "empty"
    with pytest.raises(CheckpointError, match="holds neither model.safetensors nor model.safetensors.index.json"):
        load()
