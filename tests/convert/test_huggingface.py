import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ternlm.config.model import ModelConfig, RopeScaling
from ternlm.convert.detect import open_foreign
from ternlm.convert.export_hf import export_hf
from ternlm.convert.fill import fill_model
from ternlm.convert.weights import ConvertError, OpenModel, check_weights, model_shapes
from ternlm.model.decoder import build_empty_model, build_model
from ternlm.ops.attention import make_segment_attend

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama with biases": ("Llama", {"attention_bias": True}),
    "llama3": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "smollm2, tied": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "qwen2": ("Qwen2", {}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}


def theirs(family: str, seed: int = 0) -> Any:
    """Return a random model of transformers, no weight or bias of which is 0 or 1."""
    kind, changes = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.08 + (1.0 if "norm" in name else 0.0))
    return model


@torch.no_grad()
def our_logits(opened: OpenModel, tokens_BT: torch.Tensor) -> torch.Tensor:
    model = build_empty_model(opened.config, torch.device("cpu"))
    fill_model(model, opened.weights)
    positions = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    attend = make_segment_attend(((tokens_BT.shape[1],),) * len(tokens_BT), torch.device("cpu"))
    return model.lm_head(model(tokens_BT, positions, attend))


TOKENS = torch.randint(300, (2, 150), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_there_and_back(family: str, tmp_path: Path) -> None:
    model = theirs(family)
    model.save_pretrained(tmp_path / "theirs")
    wanted = model(TOKENS).logits
    opened = open_foreign(tmp_path / "theirs")
    check(our_logits(opened, TOKENS), wanted)
    export_hf(opened, tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert again.config.model_type == ("qwen3" if family == "qwen3" else "llama")
    check(again(TOKENS).logits, wanted)
    back = open_foreign(tmp_path / "ours")
    assert back.config == opened.config
    for name in opened.weights.names():
        assert torch.equal(opened.weights.read(name), back.weights.read(name))


def check(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert float((found - wanted).detach().abs().max() / wanted.detach().abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [False, True])
def test_export_import_export_changes_no_bit(dtype: str, tied: bool, tmp_path: Path) -> None:
    theirs("smollm2, tied" if tied else "llama with biases").save_pretrained(tmp_path / "theirs")
    export_hf(open_foreign(tmp_path / "theirs"), tmp_path / "once", dtype)
    export_hf(open_foreign(tmp_path / "once"), tmp_path / "twice")
    assert json.loads((tmp_path / "twice/config.json").read_text())["dtype"] == dtype
    names = sorted(path.name for path in (tmp_path / "once").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "twice").iterdir())
    for name in names:
        if name != "README.md":  # which bears the folder's name
            assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes(), name


def test_files_are_cut_by_size_and_named_in_an_index(tmp_path: Path) -> None:
    model = theirs("llama with biases")
    model.save_pretrained(tmp_path / "theirs")
    export_hf(open_foreign(tmp_path / "theirs"), tmp_path / "ours", shard_bytes=100_000)
    files = sorted((tmp_path / "ours").glob("model-*.safetensors"))
    assert len(files) > 2
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 100_000 for file in files)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    (tmp_path / "ours/consolidated.safetensors").write_bytes(b"not named by the index")
    open_foreign(tmp_path / "ours")
    files[0].write_bytes(files[1].read_bytes())
    with pytest.raises(ConvertError, match=rf"is in {files[0].name}, and it isn't; the files are of different models"):
        open_foreign(tmp_path / "ours")
    files[1].unlink()
    with pytest.raises(ConvertError, match=rf"index\.json: names {files[1].name}, which isn't there"):
        open_foreign(tmp_path / "ours")


@pytest.mark.parametrize("layout", ["whole", "shards", "shards without index", "pickles"])
def test_other_programs_files_beside_are_left_alone(layout: str, tmp_path: Path) -> None:
    """As Mistral's and Llama's folders have them: the same weights by other names, rows of q and k in another order."""
    model = theirs("mistral")
    shard_bytes = "5GB" if layout in ("whole", "pickles") else "100KB"
    model.save_pretrained(tmp_path, max_shard_size=shard_bytes)
    if layout == "shards without index":
        (tmp_path / "model.safetensors.index.json").unlink()
    if layout == "pickles":
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    wanted = model(TOKENS).logits
    for name in ("consolidated.safetensors", "consolidated-00001-of-00002.safetensors"):
        save_file(
            {"layers.0.attention.wq.weight": torch.ones(3), "tok_embeddings.weight": torch.ones(2)}, tmp_path / name
        )
    torch.save({"model.norm.weight": torch.zeros(64)}, tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text("{}")
    check(our_logits(open_foreign(tmp_path), TOKENS), wanted)


def test_a_folder_of_other_programs_files_alone_is_refused(tmp_path: Path) -> None:
    write(tmp_path, whole(), {})
    (tmp_path / "model.safetensors").rename(tmp_path / "consolidated.safetensors")
    (tmp_path / "consolidated.00.pth").touch()
    with pytest.raises(
        ConvertError, match=r"consolidated\.00\.pth, consolidated\.safetensors alone, .* fetch the model's"
    ):
        open_foreign(tmp_path)


def test_internlm2_projections_are_taken_apart(tmp_path: Path) -> None:
    config = ModelConfig.model_validate({**SHAPE, "rope_theta": 1e6}, strict=False)
    model = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    state = dict(model.state_dict())
    fused: dict[str, torch.Tensor] = {
        "model.tok_embeddings.weight": state["model.embed_tokens.weight"],
        "model.norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for layer in range(2):
        ours, new = f"model.layers.{layer}.", f"model.layers.{layer}."
        q, k, v = (state[f"{ours}self_attn.{part}_proj.weight"] for part in "qkv")
        heads = zip(q.view(2, 2, 16, 64), k.view(2, 1, 16, 64), v.view(2, 1, 16, 64), strict=True)
        fused[f"{new}attention.wqkv.weight"] = torch.cat([torch.cat(group) for group in heads]).view(-1, 64)
        for theirs_name, name in (
            ("attention.wo", "self_attn.o_proj"),
            ("feed_forward.w1", "mlp.gate_proj"),
            ("feed_forward.w3", "mlp.up_proj"),
            ("feed_forward.w2", "mlp.down_proj"),
            ("attention_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
        ):
            fused[f"{new}{theirs_name}.weight"] = state[f"{ours}{name}.weight"]
    write(tmp_path, fused, {"model_type": "internlm2", "bias": False, "rope_theta": 1e6, "rms_norm_eps": 1e-5})
    opened = open_foreign(tmp_path)
    for name, shape in model_shapes(config).items():
        assert torch.equal(opened.weights.read(name), state[name]), name
        part = tuple(size // 2 for size in shape)
        rest = tuple(size - start for size, start in zip(shape, part, strict=True))
        wanted = state[name][tuple(slice(start, None) for start in part)]
        assert torch.equal(opened.weights.read(name, part, rest), wanted), name


def test_internlm_pickles_are_read(tmp_path: Path) -> None:
    config = ModelConfig.model_validate({**SHAPE, "num_key_value_heads": 4, "attention_bias": True}, strict=False)
    model = build_model(config)
    state = {**model.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    (tmp_path / "config.json").write_text(
        json.dumps(
            {**SHAPE, "num_key_value_heads": None, "model_type": "internlm", "bias": True}
            | {"rotary": {"base": 10000, "type": "dynamic"}, "rms_norm_eps": 1e-6}
        )
    )
    torch.save(state, tmp_path / "pytorch_model.bin")
    opened = open_foreign(tmp_path)
    assert opened.config.attention_bias
    assert opened.config.rope_scaling.kind == "dynamic"
    assert opened.config.rms_norm_eps == 1e-6
    assert all(torch.equal(opened.weights.read(name), model.state_dict()[name]) for name in opened.weights.names())


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("evil"),))


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "model_type": "llama"}))
    torch.save({"model.norm.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConvertError, match=r"holds .*nothing was run"):
        open_foreign(tmp_path)
    assert not (tmp_path / "evil").exists()


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SHAPE, "model_type": "llama", **config}))
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def whole(config: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
    model = ModelConfig.model_validate({**SHAPE, **(config or {})}, strict=False)
    return {name: torch.ones(shape) for name, shape in model_shapes(model).items()}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type = 'gpt2' isn't supported; models of llama, mistral"),
        ({"hidden_act": "gelu"}, r"hidden_act = 'gelu' isn't supported, only 'silu'"),
        ({"mlp_bias": True}, r"mlp_bias = True isn't supported"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, r"rotary scaling of type 'longrope' isn't supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 0.7}}, r"rotary scaling with mscale"),
        ({"rope_parameters": [1]}, r"doesn't describe a model"),
        ({"rope_theta": "abc"}, r"doesn't describe a model"),
        ({"rope_scaling": {"type": "llama3"}}, r"'llama3' needs a factor"),
        ({"is_causal": False}, r"is_causal = False isn't supported, only True"),
        ({"num_hidden_layers": 3_000_000}, r"num_hidden_layers = 3,000,000, and its files hold 21 tensors"),
        ({"num_attention_heads": 5}, r"hidden_size = 64 must be a multiple of num_attention_heads"),
        ({"hidden_size": None}, r"hidden_size: Field required"),
        ({"intermediate_size": 128}, r"gate_proj\.weight is \(96, 64\), and its configuration makes it \(128, 64\)"),
        ({"num_hidden_layers": 3}, r"misses model\.layers\.2\.input_layernorm\.weight, .* and 5 more"),
        ({"num_hidden_layers": 1}, r"has, beyond the model's, model\.layers\.1\.input_layernorm\.weight"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, whole(), config)
    with pytest.raises(ConvertError, match=message):
        open_foreign(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("eos_token_id", "2"),
        ("eos_token_id", True),
        ("eos_token_id", -1),
        ("eos_token_id", 300),
        ("eos_token_id", [1, [2]]),
        ("eos_token_id", [1, "</s>"]),
        ("eos_token_id", []),
        ("eos_token_id", {"id": 2}),
        ("bos_token_id", [1]),
        ("bos_token_id", 1.0),
        ("pad_token_id", False),
        ("pad_token_id", -1),
    ],
)
def test_ids_of_tokens_that_are_none_are_refused(file: str, field: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "model_type": "llama"}))
    told = json.loads((tmp_path / file).read_text()) if (tmp_path / file).exists() else {}
    (tmp_path / file).write_text(json.dumps({**told, field: value}))
    shown = re.escape(f"/{file}: {field} = {value!r} must be a whole number from 0 to 299, an id of")
    with pytest.raises(ConvertError, match=shown + ".*; correct it, or leave it out"):
        open_foreign(tmp_path)  # without weights: they aren't looked for before


def test_ids_of_tokens_are_taken_over(tmp_path: Path) -> None:
    write(tmp_path, whole(), {"eos_token_id": [2, 299], "bos_token_id": 0, "pad_token_id": None})
    assert open_foreign(tmp_path).facts["generation"] == {"eos_token_id": [2, 299]}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "pad_token_id": 0}))
    assert open_foreign(tmp_path).facts["generation"] == {"eos_token_id": 7, "pad_token_id": 0}


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="no such file or folder"):
        open_foreign(tmp_path / "nowhere")
    with pytest.raises(ConvertError, match=r"no config\.json .*, no model_tp0_pp0\.pt"):
        open_foreign(tmp_path)
    write(tmp_path, whole(), {})
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ConvertError, match=r"model\.safetensors: can't be read"):
        open_foreign(tmp_path)
    path.unlink()
    with pytest.raises(ConvertError, match="holds neither"):
        open_foreign(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConvertError, match=r"config\.json: can't be read"):
        open_foreign(tmp_path)


def test_an_export_that_fails_leaves_nothing(tmp_path: Path) -> None:
    write(tmp_path / "in", whole(), {})
    opened = open_foreign(tmp_path / "in")
    check_weights(tmp_path, opened.config, opened.weights)
    (tmp_path / "in/model.safetensors").write_bytes(b"")
    with pytest.raises(ConvertError, match="can't be read"):
        export_hf(opened, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(ConvertError, match="exists already"):
        export_hf(opened, tmp_path / "out")


@pytest.mark.parametrize("rope", ["none", "dynamic", "static-ntk", "yarn"])
def test_stretched_models_agree_with_transformers_past_the_trained_length(rope: str, tmp_path: Path) -> None:
    model = theirs("llama with biases")
    model.config.max_position_embeddings = 64
    model.save_pretrained(tmp_path / "theirs")
    opened = open_foreign(tmp_path / "theirs")
    export_hf(opened, tmp_path / "ours", rope=rope, max_length=256 if rope in ("static-ntk", "yarn") else None)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    check(our_logits(open_foreign(tmp_path / "ours"), TOKENS), again(TOKENS).logits)
    changed = not torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    assert changed == (rope != "none")


def test_a_stretch_needs_a_length(tmp_path: Path) -> None:
    write(tmp_path / "in", whole(), {})
    opened = open_foreign(tmp_path / "in")
    with pytest.raises(ConvertError, match=r"needs a max_length above the trained length, 128 tokens, not None"):
        export_hf(opened, tmp_path / "out", rope="yarn")
    with pytest.raises(ConvertError, match=r"max_length = 256 has no effect"):
        export_hf(opened, tmp_path / "out", max_length=256)


def test_yarn_without_a_factor_is_read_as_transformers_does(tmp_path: Path) -> None:
    model = theirs("llama with biases")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": None}
    config["rope_parameters"] |= {"original_max_position_embeddings": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    check(our_logits(open_foreign(tmp_path), TOKENS), again(TOKENS).logits)


def test_values_too_large_for_float16_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "in", {**whole(), "model.norm.weight": torch.full((64,), 1e6)}, {})
    with pytest.raises(ConvertError, match=r"model\.norm\.weight has values too large for torch\.float16"):
        export_hf(open_foreign(tmp_path / "in"), tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()


def test_another_stretch_than_the_trained_one_is_refused(tmp_path: Path) -> None:
    theirs("llama3").save_pretrained(tmp_path / "in")
    with pytest.raises(ConvertError, match="would take the place of the 'llama3' scaling"):
        export_hf(open_foreign(tmp_path / "in"), tmp_path / "out", rope="static-ntk", max_length=1024)


def test_dynamic_scaling_keeps_the_length_at_which_it_begins(tmp_path: Path) -> None:
    model = theirs("llama with biases")
    model.save_pretrained(tmp_path / "in")
    opened = open_foreign(tmp_path / "in")
    scaling = {"kind": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}
    config = opened.config.model_copy(update={"rope_scaling": RopeScaling(**scaling), "max_position_embeddings": 512})
    export_hf(replace(opened, config=config), tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    check(our_logits(replace(opened, config=config), TOKENS), again(TOKENS).logits)
