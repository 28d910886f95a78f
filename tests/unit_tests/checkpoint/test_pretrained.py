"""Finding out which model a path holds: the right one, or one message that says what to do."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.finished_run import CONTEXT, TOKENIZER, load_weights, save_run
from torchtitan.checkpoint.pretrained import check_divisible, find_pretrained
from torchtitan.config.errors import ConfigError
from torchtitan.config.sections import Model
from torchtitan.models.common.args import RopeScaling
from torchtitan.models.llama3 import llama3_flavors, train_spec

build_adapter = train_spec.load().state_dict_adapter

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run_checkpoint(tmp_path_factory) -> Path:
    return save_run(tmp_path_factory.mktemp("run"))


def fails(message: str, path: Path, **options) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        find_pretrained(path, **options)
    assert "\n" not in str(caught.value)


def hf_folder(path: Path, **config) -> Path:
    """Without weights that can be read."""
    path.mkdir()
    (path / "model.safetensors").touch()
    args = llama3_flavors["debugmodel"]
    config = {**build_adapter(args).to_hf_config(), **config}
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_checkpoint_of_a_run_is_what_its_config_says(run_checkpoint):
    found = find_pretrained(run_checkpoint)
    assert not found.in_hf
    assert found.args == llama3_flavors["debugmodel"].for_run(Model(), max_seq_len=CONTEXT)
    assert found.tokenizer_path == TOKENIZER
    assert found.build_tokenizer().eos_id == 1
    found.check_weights()


def test_scaled_rope_comes_from_the_config(tmp_path):
    path = save_run(tmp_path, use_scaled_rope=True)
    assert find_pretrained(path).args.rope_scaling == RopeScaling()


def test_a_checkpoint_s_own_options_count_before_those_that_a_later_start_left(tmp_path):
    path = save_run(tmp_path, use_scaled_rope=True)
    (tmp_path / "config.toml").rename(path / "config.toml")
    save_run(tmp_path)
    assert find_pretrained(path).args.rope_scaling == RopeScaling()


def test_config_and_tokenizer_can_be_named(run_checkpoint, tmp_path):
    moved = shutil.copytree(run_checkpoint, tmp_path / "elsewhere")
    fails("name the run's config.toml with --config", moved)
    found = find_pretrained(moved, config=run_checkpoint.parents[1] / "config.toml", tokenizer=tmp_path)
    assert (found.args.dim, found.tokenizer_path) == (256, tmp_path)
    with pytest.raises(ConfigError, match="holds no tokenizer.json; .*; name another with --tokenizer"):
        found.build_tokenizer()


def test_weights_keep_their_values_and_the_rotary_table_its_precision(run_checkpoint):
    weights = load_weights(run_checkpoint)
    for dtype in (torch.float32, torch.bfloat16):
        model = find_pretrained(run_checkpoint).build_model(device=CPU, dtype=dtype)
        assert not model.training
        assert model.freqs_cis.dtype == torch.float32
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, weights[name].to(dtype))


def test_folder_of_hugging_face_is_what_its_config_says(tmp_path):
    path = hf_folder(tmp_path / "hf", num_key_value_heads=4, eos_token_id=[7, 8], max_position_embeddings=48)
    found = find_pretrained(path)
    assert found.in_hf
    assert (found.args.n_kv_heads, found.args.max_seq_len, found.eos_ids) == (4, 48, {7, 8})
    assert found.tokenizer_path == path
    (path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert find_pretrained(path).eos_ids == {9}


def test_folders_without_a_model_are_explained(run_checkpoint, tmp_path):
    fails(f"there is no checkpoint at {tmp_path}/none", tmp_path / "none")
    fails(f"{tmp_path} holds neither a checkpoint of ours", tmp_path)
    folder = run_checkpoint.parent
    for path in (folder, folder.parent):
        fails(f"{folder} holds checkpoints of steps 10; take one of them, such as {run_checkpoint}", path)
    half = tmp_path / "step-3.incomplete-ab"
    half.mkdir()
    fails(f"{half} is not whole: its run was killed while saving it", half)


def test_models_that_we_do_not_have_are_named(tmp_path):
    fails(
        "config.json: model_type is 'mistral'; the families of this package have 'llama'",
        hf_folder(tmp_path / "1", model_type="mistral"),
    )
    fails("quantized weights are not supported", hf_folder(tmp_path / "2", quantization_config={"bits": 4}))
    path = hf_folder(tmp_path / "3")
    (path / "config.json").write_text('{"model_type": "llama"}')
    fails("config.json has no 'num_attention_heads', which the model needs", path)
    (path / "config.json").write_text("{")
    fails("config.json cannot be read", path)
    for config in (Path("nowhere.toml"), tmp_path):
        fails(f"{config} is no file; expected the config.toml of a run, or a config.json", path, config=config)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "config.json cannot be read: Expecting"),
        ("config.json", "[]", "config.json cannot be read: expected a JSON object, got []"),
        ("generation_config.json", "{", "generation_config.json cannot be read: Expecting"),
        ("generation_config.json", '"no"', 'generation_config.json cannot be read: expected a JSON object, got "no"'),
    ],
)
def test_json_that_is_damaged_is_named(tmp_path, name, content, message):
    path = hf_folder(tmp_path / "hf")
    (path / name).write_text(content)
    fails(f"{path}/{message}", path)


def test_config_that_describes_no_model_is_named(tmp_path):
    message = "config.json: num_attention_heads is 0; expected a whole number, at least 1"
    fails(message, hf_folder(tmp_path / "1", num_attention_heads=0))
    fails("config.json: vocab_size is '9'; expected", hf_folder(tmp_path / "2", vocab_size="9"))
    fails("config.json describes no model: 'str' object", hf_folder(tmp_path / "3", rope_scaling="linear"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "cannot be read: expected a JSON object, got []"),
        ("{}", "is damaged: expected weight_map, the file name of each weight"),
        ('{"weight_map": {"norm.weight": 1}}', "is damaged: expected weight_map, the file name of each weight"),
    ],
)
def test_index_that_is_damaged_is_named(tmp_path, content, message):
    path = hf_folder(tmp_path / "hf")
    (path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError, match=re.escape(f"{path}/model.safetensors.index.json {message}")):
        find_pretrained(path).build_model(device=CPU, dtype=torch.float32)


def test_unknown_flavor_names_the_known_ones(tmp_path):
    path = save_run(tmp_path)
    config = tmp_path / "config.toml"
    config.write_text(config.read_text().replace("debugmodel", "9B"))
    fails("model.flavor='9B' is none of debugmodel, 1B", path)


def test_a_module_that_is_not_there_is_named(tmp_path):
    path = save_run(tmp_path)
    config = tmp_path / "config.toml"
    config.write_text(config.read_text().replace('custom_import = ""', 'custom_import = "no_such_module"'))
    fails("experimental.custom_import=no_such_module: there is no such module", path, custom_import="no_such_module")


def test_code_that_a_foreign_configuration_names_runs_only_when_that_is_said(tmp_path, monkeypatch):
    path = save_run(tmp_path)
    config = tmp_path / "config.toml"
    config.write_text(config.read_text().replace('custom_import = ""', 'custom_import = "payload"'))
    (tmp_path / "payload.py").write_text("from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()")
    monkeypatch.syspath_prepend(tmp_path)
    asks = f"{config} asks for the import of payload, which runs code; if you trust it, add --custom_import payload"
    for options in ({}, {"custom_import": "another"}, {"config": config}):
        fails(asks, path, **options)
    assert not (tmp_path / "payload.ran").exists()
    find_pretrained(path, custom_import="payload")
    assert (tmp_path / "payload.ran").exists()


def test_tokenizer_that_is_too_large_for_the_model_is_refused(tmp_path):
    path = hf_folder(tmp_path / "hf", vocab_size=1999)
    with pytest.raises(ConfigError, match="has 2000 ids and the model at .*hf only 1999; name the tokenizer"):
        find_pretrained(path, tokenizer=TOKENIZER).build_tokenizer()


def test_damaged_or_other_weights_are_named(tmp_path):
    path = save_run(tmp_path)
    other = hf_folder(tmp_path / "other", intermediate_size=64) / "config.json"
    with pytest.raises(ConfigError, match="holds another model than this one: layers.0.feed_forward.w1.weight is"):
        find_pretrained(path, config=other).build_model(device=CPU, dtype=torch.float32)
    (file,) = path.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=f"{file} is cut: 1,000 bytes"):
        find_pretrained(path).build_model(device=CPU, dtype=torch.float32)


def test_ranks_that_cannot_share_the_heads_are_refused():
    args = llama3_flavors["8B"]
    for num_ranks in (1, 2, 4, 8):
        check_divisible(args, num_ranks)
    with pytest.raises(
        ConfigError, match="3 processes cannot share n_kv_heads=8 and n_heads=32 .*; start 1, 2, 4 or 8"
    ):
        check_divisible(args, 3)


def test_a_run_that_began_from_hugging_face_keeps_its_context_and_its_own_tokenizer(tmp_path):
    """Its checkpoints hold the config.json that it began from, and no tokenizer."""
    path = save_run(tmp_path)
    begun_from = hf_folder(tmp_path / "hf", max_position_embeddings=4096, eos_token_id=[1, 7])
    (tmp_path / "config.toml").rename(path / "config.toml")
    shutil.copy(begun_from / "config.json", path)
    found = find_pretrained(path)
    assert (found.args.max_seq_len, found.eos_ids, found.tokenizer_path) == (4096, {1, 7}, TOKENIZER)
    found.check_weights()
