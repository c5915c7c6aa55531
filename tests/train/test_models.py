"""Models that come from elsewhere and go there: trained here, exported, imported, trained on."""

import json
from pathlib import Path

import pytest
import torch

from ternlm.checkpoint.errors import CheckpointError
from ternlm.convert.detect import open_foreign
from ternlm.convert.export_hf import export_hf
from ternlm.convert.weights import ConvertError
from ternlm.ops.attention import make_segment_attend
from ternlm.train.loop import train_step
from ternlm.train.models import import_model, open_model
from ternlm.train.pretrain import pretrain
from ternlm.train.run import set_up

TOKENS = torch.arange(1, 33)[None]


@torch.no_grad()
def logits(run) -> torch.Tensor:
    attend = make_segment_attend(((32,),), torch.device("cpu"))
    return run.model.lm_head(run.model(TOKENS, torch.arange(32)[None], attend))


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    weights = open_model(path).weights
    return {name: weights.read(name) for name in weights.names()}


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("model", [{}, {"tie_word_embeddings": True}, {"qk_norm": True, "attention_bias": False}])
def test_what_was_trained_here_is_the_same_model_in_transformers_and_back(model, make_config, tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    run = pretrain(make_config(model=model))
    export_hf(open_model(run.folder), tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(theirs(TOKENS).logits, logits(run), rtol=1e-5, atol=1e-5)
    import_model(tmp_path / "hf", tmp_path / "back")
    assert_equal(weights_of(tmp_path / "back"), weights_of(run.folder))
    export_hf(open_model(tmp_path / "back"), tmp_path / "again")
    again = (tmp_path / "again/model.safetensors").read_bytes()
    assert again == (tmp_path / "hf/model.safetensors").read_bytes()


def test_a_part_of_a_weight_is_read_from_a_checkpoint(make_config) -> None:
    run = pretrain(make_config())
    weights = open_model(run.folder).weights
    name = "model.layers.1.mlp.down_proj.weight"
    assert weights.shape(name) == (32, 64)
    whole = weights.read(name)
    assert torch.equal(weights.read(name, (3, 5), (7, 11)), whole[3:10, 5:16])


def test_training_starts_from_another_formats_weights_as_from_a_checkpoints(make_config, tmp_path) -> None:
    first = pretrain(make_config("first"))
    export_hf(open_model(first.folder), tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "imported")
    runs = [
        set_up(make_config(f"from-{name}", load={"from": str(path)}))
        for name, path in (("run", first.folder), ("hf", tmp_path / "hf"), ("imported", tmp_path / "imported"))
    ]
    losses = [train_step(run, next(run.loader)).loss.mean for run in runs]
    for run in runs:
        run.loader.close()
    assert losses[0] == losses[1] == losses[2]


def test_another_shape_is_refused_before_training(make_config, tmp_path) -> None:
    first = pretrain(make_config("first"))
    export_hf(open_model(first.folder), tmp_path / "hf")
    with pytest.raises(CheckpointError, match=r"hf was trained with model\.num_hidden_layers = 2, this run has 3"):
        set_up(make_config("second", model={"num_hidden_layers": 3}, load={"from": str(tmp_path / "hf")}))


def test_an_imported_model_is_no_run_to_go_on_with(make_config, tmp_path) -> None:
    first = pretrain(make_config("first"))
    export_hf(open_model(first.folder), tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "imported")
    with pytest.raises(CheckpointError, match=r"no run to go on with; .*load\.from="):
        set_up(make_config("second"), resume=str(tmp_path / "imported"))


def test_an_import_that_fails_leaves_nothing(make_config, tmp_path) -> None:
    first = pretrain(make_config("first"))
    export_hf(open_model(first.folder), tmp_path / "hf", shard_bytes=20_000)
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    damaged = bytearray(files[-1].read_bytes())
    files[-1].write_bytes(damaged[:-8])
    with pytest.raises(ConvertError, match="can't be read"):
        import_model(tmp_path / "hf", tmp_path / "imported")
    assert not (tmp_path / "imported").exists()
    (tmp_path / "imported").mkdir()
    (tmp_path / "imported/mine").touch()
    with pytest.raises(ConvertError, match="can't be read"):
        import_model(tmp_path / "hf", tmp_path / "imported")
    files[-1].write_bytes(bytes(damaged))
    with pytest.raises(CheckpointError, match="exists already"):
        import_model(tmp_path / "hf", tmp_path / "imported")


def test_the_exported_folder_says_what_it_is(make_config, tmp_path) -> None:
    run = pretrain(make_config())
    export_hf(open_model(run.folder), tmp_path / "hf", dtype="bfloat16")
    card = (tmp_path / "hf/README.md").read_text()
    assert f"| trained for | 6 steps, {run.progress.tokens:,} tokens |" in card
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["attention_bias"] is True
    assert open_foreign(tmp_path / "hf").weights.read("model.norm.weight").dtype == torch.bfloat16
