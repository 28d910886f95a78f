import subprocess
import sys

import pytest

from torchtitan.config.errors import ConfigError
from torchtitan.models.llama3.flavors import llama3_flavors
from torchtitan.protocols import train_spec
from torchtitan.protocols.train_spec import TrainSpec, get_model_names, get_train_spec, register_train_spec


def test_llama3_is_there_and_its_code_loads() -> None:
    spec = get_train_spec("llama3")
    assert spec.flavors is llama3_flavors
    code = spec.load()
    assert code.model_cls.__name__ == "Transformer"
    assert callable(code.parallelize_fn)
    assert callable(code.state_dict_adapter)


def test_flavors_are_known_without_torch() -> None:
    program = """
import sys
from torchtitan.protocols.train_spec import get_train_spec
assert get_train_spec("llama3").flavors["8B"].num_params() == 8030261248
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_unknown_model_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"^model.name=mixtral is unknown; known are llama3"):
        get_train_spec("mixtral")
    with pytest.raises(ConfigError, match=r"^model.name=lama3 is unknown; did you mean llama3\?"):
        get_train_spec("lama3")


def test_model_from_outside_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_spec, "_registered", {})
    spec = TrainSpec(flavors={}, load=get_train_spec("llama3").load)
    register_train_spec("mine", spec)
    assert get_train_spec("mine") is spec
    assert get_model_names() == ["llama3", "mine", "qwen3"]
    for taken in ("mine", "llama3"):
        with pytest.raises(ValueError, match="exists already"):
            register_train_spec(taken, spec)
