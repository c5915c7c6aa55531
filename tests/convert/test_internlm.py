"""The ancestor's training checkpoints: read back bit for bit from any number of files, and refused with a reason."""

import os
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ternlm.config import ModelConfig
from ternlm.convert.internlm import open_internlm
from ternlm.convert.weights import ConvertError, model_shapes
from ternlm.model.decoder import CausalLM, build_model
from ternlm.ops.attention import make_segment_attend

CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=5,
    num_attention_heads=4,
    intermediate_size=256,
    attention_bias=True,
    rms_norm_eps=1e-5,
)
SPLITS = {1: (0, 5), 2: (0, 2, 5), 3: (0, 1, 3, 5)}
SETTINGS = {
    "num_attention_heads": 4,
    "hidden_size": 32,
    "num_layers": 5,
    "vocab_size": 96,
    "layer_norm_epsilon": 1e-5,
    "dtype": torch.float32,
    "use_flash_attn": True,
}
Folder = Path


@pytest.fixture(scope="module")
def model() -> CausalLM:
    """A random model, biases and norms too."""
    torch.manual_seed(3)
    built = build_model(CONFIG)
    with torch.no_grad():
        for name, value in built.named_parameters():
            value.normal_(std=0.05).add_(1.0 if "norm" in name else 0.0)
    return built


def part_of(model: CausalLM, layers: range, tp: int, rank: int, hidden_cut: bool = True) -> dict[str, Tensor]:
    """Return what the ancestor's rank would hold of these layers, numbered from 0."""
    ours = {name: value.detach() for name, value in model.named_parameters()}

    def own(value: Tensor, dim: int) -> Tensor:
        return value.chunk(tp, dim)[rank].clone()

    held: dict[str, Tensor] = {}
    if layers.start == 0:
        name = "embedding.weight" if hidden_cut else "embedding.word_embeddings.weight"
        held[name] = own(ours["model.embed_tokens.weight"], 1 if hidden_cut else 0)
    for number, layer in enumerate(layers):
        theirs, prefix = f"blocks.{number}.", f"model.layers.{layer}."
        for kind in ("weight", "bias"):
            fused = torch.stack([ours[f"{prefix}self_attn.{letter}_proj.{kind}"] for letter in "qkv"])
            heads = fused.view(3, 4, 8, *fused.shape[2:])  # (three, heads, d, ...), heads shared out over ranks
            held[f"{theirs}mixer.Wqkv.{kind}"] = own(heads, 1).flatten(0, 2)
        held[f"{theirs}mixer.out_proj.weight"] = own(ours[f"{prefix}self_attn.o_proj.weight"], 1)
        if rank == 0:
            held[f"{theirs}mixer.out_proj.bias"] = ours[f"{prefix}self_attn.o_proj.bias"].clone()
        for name, dim, mine in (("w1", 0, "gate"), ("w2", 0, "up"), ("w3", 1, "down")):
            held[f"{theirs}mlp.{name}.weight"] = own(ours[f"{prefix}mlp.{mine}_proj.weight"], dim)
        held[f"{theirs}norm1.weight"] = ours[f"{prefix}input_layernorm.weight"].clone()
        held[f"{theirs}norm2.weight"] = ours[f"{prefix}post_attention_layernorm.weight"].clone()
    if layers.stop == CONFIG.num_hidden_layers:
        held["norm.weight"] = ours["model.norm.weight"].clone()
        held["head.weight"] = own(ours["lm_head.weight"], 0)
    return held


def write(
    folder: Path, model: CausalLM, tp: int = 1, pp: int = 1, prefix: str = "model.", hidden_cut: bool = True
) -> Path:
    """Write a checkpoint as the ancestor would have."""
    folder.mkdir(exist_ok=True)
    for stage, (start, stop) in enumerate(pairwise(SPLITS[pp])):
        for rank in range(tp):
            held = part_of(model, range(start, stop), tp, rank, hidden_cut)
            states = OrderedDict((prefix + name, value) for name, value in held.items())
            torch.save(states, folder / f"model_tp{rank}_pp{stage}.pt")
    return folder


def change(folder: Path, file: str, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    states = torch.load(folder / file)
    edit(states)
    torch.save(states, folder / file)


def check_equal(folder: Path, model: CausalLM, **options: Any) -> None:
    """Compare each tensor bit for bit, and what is derived."""
    opened = open_internlm(folder, **options)
    assert opened.config == CONFIG
    assert list(opened.weights.names()) == list(model_shapes(CONFIG))
    for name, value in model.named_parameters():
        assert opened.weights.shape(name) == tuple(value.shape)
        assert torch.equal(opened.weights.read(name), value), name


@pytest.mark.parametrize("told", [True, False], ids=["model_config", "heads"])
@pytest.mark.parametrize("pp", [1, 2, 3])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_tensor_is_read_back(model: CausalLM, tmp_path: Path, tp: int, pp: int, told: bool) -> None:
    folder = write(tmp_path / "1000", model, tp, pp)
    if told:
        torch.save(SETTINGS, folder / "model_config.pt")
    check_equal(folder, model, **({} if told else {"heads": 4}))


def test_parts_of_tensors_are_the_slices_of_the_whole(model: CausalLM, tmp_path: Path) -> None:
    weights = open_internlm(write(tmp_path / "c", model, 4, 2), heads=4).weights
    for name in weights.names():
        whole = weights.read(name)
        for low, high in ((0.0, 0.3), (0.2, 0.8), (0.7, 1.0), (0.5, 0.5), (0.0, 1.0)):
            offset = tuple(int(low * size) for size in whole.shape)
            shape = tuple(int(high * size) - start for size, start in zip(whole.shape, offset, strict=True))
            slices = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
            assert torch.equal(weights.read(name, offset, shape), whole[slices]), (name, offset, shape)


def test_what_is_read_is_not_the_file(model: CausalLM, tmp_path: Path) -> None:
    weights = open_internlm(write(tmp_path / "c", model), heads=4).weights
    before = weights.read("model.norm.weight").clone()
    weights.read("model.norm.weight").zero_()
    assert torch.equal(weights.read("model.norm.weight"), before)


def test_logits_are_the_original_models(model: CausalLM, tmp_path: Path) -> None:
    opened = open_internlm(write(tmp_path / "c", model, 2, 3), heads=4)
    other = build_model(opened.config)
    other.load_state_dict({name: opened.weights.read(name) for name in opened.weights.names()})
    tokens = torch.randint(0, 96, (2, 7))
    positions = torch.arange(7).expand(2, 7)
    attend = make_segment_attend([[7], [7]], torch.device("cpu"))
    with torch.no_grad():
        wanted, found = (each.lm_head(each(tokens, positions, attend)) for each in (model, other))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_names_with_and_without_the_wrappers_prefix(model: CausalLM, tmp_path: Path, prefix: str) -> None:
    check_equal(write(tmp_path / "c", model, 2, 2, prefix), model, heads=4)


def test_an_embedding_cut_over_the_vocabulary(model: CausalLM, tmp_path: Path) -> None:
    check_equal(write(tmp_path / "c", model, 4, 1, hidden_cut=False), model, heads=4)


def test_chunks_of_an_interleaved_pipeline_are_put_in_order(model: CausalLM, tmp_path: Path) -> None:
    for part, chunks in enumerate([(range(0, 1), range(2, 4)), (range(1, 2), range(4, 5))]):
        for rank in range(2):
            states = {
                f"{chunk}.model.{name}": value
                for chunk, layers in enumerate(chunks)
                for name, value in part_of(model, layers, 2, rank).items()
            }
            torch.save(states, tmp_path / f"model_tp{rank}_pp{part}.pt")
    check_equal(tmp_path, model, heads=4)


def test_bfloat16_stays_bfloat16(model: CausalLM, tmp_path: Path) -> None:
    folder = write(tmp_path / "c", model, 2)
    for rank in range(2):
        change(folder, f"model_tp{rank}_pp0.pt", lambda s: s.update({k: v.bfloat16() for k, v in s.items()}))
    weights = open_internlm(folder, heads=4).weights
    assert {weights.read(name).dtype for name in weights.names()} == {torch.bfloat16}


def test_an_output_bias_on_every_rank_counts_once(model: CausalLM, tmp_path: Path) -> None:
    folder = write(tmp_path / "c", model, 2)
    first = torch.load(folder / "model_tp0_pp0.pt")
    biases = {name: value for name, value in first.items() if name.endswith("out_proj.bias")}
    change(folder, "model_tp1_pp0.pt", lambda s: s.update(biases))
    check_equal(folder, model, heads=4)


def test_rotary_buffers_tell_the_heads(model: CausalLM, tmp_path: Path) -> None:
    folder = write(tmp_path / "c", model)
    buffers = {f"model.blocks.{i}.mixer.rotary_emb.inv_freq": torch.rand(4) for i in range(5)}
    change(folder, "model_tp0_pp0.pt", lambda s: s.update(buffers))
    check_equal(folder, model)
    with pytest.raises(ConvertError, match="8 by the argument heads, 4 by mixer"):
        open_internlm(folder, heads=8)


@pytest.fixture
def their_settings() -> Iterator[type]:
    """The class in which the ancestor kept settings, importable for as long as a test writes with it."""

    class Config(dict):
        def __getattr__(self, key: str) -> Any:
            try:
                return self[key]
            except KeyError:
                raise AttributeError(key) from None

    name = "internlm.core.context.parallel_context"
    Config.__module__, Config.__qualname__ = name, "Config"
    names = [name.rsplit(".", up)[0] if up else name for up in range(4)]
    for place in names:
        sys.modules[place] = ModuleType(place)
    sys.modules[name].Config = Config  # type: ignore[attr-defined]
    yield Config
    for place in names:
        sys.modules.pop(place, None)


def test_settings_in_the_ancestors_class_are_read_without_it(
    model: CausalLM, tmp_path: Path, their_settings: type
) -> None:
    folder = write(tmp_path / "c", model)
    torch.save(their_settings(SETTINGS | {"moe": their_settings({"top_k": 2})}), folder / "model_config.pt")
    del sys.modules["internlm.core.context.parallel_context"]
    check_equal(folder, model)


def test_the_configs_text_tells_heads_and_length(model: CausalLM, tmp_path: Path) -> None:
    folder = write(tmp_path / "c", model)
    text = "import os\nJOB = os.environ['JOB']\nL = 5\ndata = dict(seq_len=2048 * 4)\n"
    text += "model = dict(num_attention_heads=4, num_layers=L, layer_norm_epsilon=1e-6, rope_base=1000000)\n"
    torch.save(text, folder / "config_file.pt")
    config = open_internlm(folder).config
    told = config.num_attention_heads, config.max_position_embeddings, config.rms_norm_eps, config.rope_theta
    assert told == (4, 8192, 1e-6, 1e6)


def test_dynamic_rope_keeps_the_trained_length(model: CausalLM, tmp_path: Path) -> None:
    folder = write(tmp_path / "c", model)
    torch.save(SETTINGS | {"use_dynamic_ntk_rope": True, "max_position_embeddings": 4096}, folder / "model_config.pt")
    config = open_internlm(folder).config
    assert (config.rope_scaling.kind, config.rope_original_length) == ("dynamic", 4096)


def test_progress_is_told(model: CausalLM, tmp_path: Path) -> None:
    folder = write(tmp_path / "c", model, 2, 3)
    torch.save({"step_count": 20, "num_consumed_tokens": np.int64(81920), "batch_count": 19}, folder / "context.pt")
    training = open_internlm(folder, heads=4).facts["training"]
    assert training == {"tensor": 2, "pipeline": 3, "steps": 20, "tokens": 81920}


def test_norms_that_ranks_disagree_about_are_refused_or_averaged(model: CausalLM, tmp_path: Path) -> None:
    folder = write(tmp_path / "c", model, 2)
    name = "model.blocks.1.norm2.weight"
    change(folder, "model_tp1_pp0.pt", lambda s: s[name].add_(0.5))
    with pytest.raises(ConvertError, match=r"disagree about norm2.weight, by up to 0.5.*norms='mean'"):
        open_internlm(folder, heads=4)
    mean = open_internlm(folder, heads=4, norms="mean").weights.read("model.layers.1.post_attention_layernorm.weight")
    torch.testing.assert_close(mean, model.model.layers[1].post_attention_layernorm.weight.detach() + 0.25)


class Touch:
    """A pickle that makes a file when it is read by running it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("file", ["model_tp0_pp1.pt", "model_config.pt", "context.pt", "config_file.pt"])
def test_code_in_a_file_is_refused_and_not_run(model: CausalLM, tmp_path: Path, file: str) -> None:
    folder, made = write(tmp_path / "c", model, 1, 2), tmp_path / "made"
    torch.save({"model.norm.weight": Touch(made)}, folder / file)
    with pytest.raises(ConvertError, match=rf"{file}: holds .*mkdir beside .*nothing was run"):
        open_internlm(folder, heads=4)
    (folder / file).write_bytes(pickle.dumps(Touch(made), protocol=2))
    with pytest.raises(ConvertError, match=file):
        open_internlm(folder, heads=4)
    assert not made.exists()
    pickle.loads((folder / file).read_bytes())  # as it would have gone
    assert made.exists()


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def edit(file: str, change_states: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    return lambda folder: change(folder, file, change_states)


def shorten(folder: Path) -> None:
    path = folder / "model_tp1_pp0.pt"
    path.write_bytes(path.read_bytes()[:-2000])


def only_first_ranks(folder: Path) -> None:
    for part in range(2):
        (folder / f"model_tp1_pp{part}.pt").unlink()


def only_first_part(folder: Path) -> None:
    for rank in range(2):
        (folder / f"model_tp{rank}_pp1.pt").unlink()


def settings(**told: Any) -> Callable[[Path], None]:
    return lambda folder: torch.save(SETTINGS | told, folder / "model_config.pt")


ERRORS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a gap": (remove("model_tp1_pp0.pt"), "model_tp1_pp0.pt is missing of 2 tensor-parallel ranks x 2 pipeline"),
    "no second rank": (only_first_ranks, r"1 tensor-parallel rank\(s\) hold 16 of 32 rows of q; 1 more"),
    "no last part": (only_first_part, "last pipeline part has no final norm, so model_tp0_pp1.pt is missing"),
    "cut short": (shorten, r"model_tp1_pp0.pt: can't be read .*copy it again"),
    "empty": (lambda f: (f / "model_tp0_pp0.pt").write_bytes(b""), r"model_tp0_pp0.pt: isn't a file of torch.save"),
    "a list": (lambda f: torch.save([1], f / "model_tp0_pp0.pt"), "holds no weights by name, but list"),
    "a number": (edit("model_tp0_pp0.pt", lambda s: s.update({"model.x": 3})), "'model.x' is int, not a tensor"),
    "integers": (
        edit("model_tp0_pp0.pt", lambda s: s.update({"model.norm.weight": torch.ones(3, dtype=torch.int)})),
        "model.norm.weight isn't a plain tensor of floating-point",
    ),
    "another rank's shape": (
        edit("model_tp1_pp0.pt", lambda s: s.update({"model.blocks.0.mlp.w1.weight": torch.zeros(64, 32)})),
        r"model_tp1_pp0.pt: model.blocks.0.mlp.w1.weight is \(64, 32\), .* rank 0",
    ),
    "another rank's names": (
        edit("model_tp1_pp0.pt", lambda s: s.pop("model.blocks.1.norm1.weight")),
        "model_tp1_pp0.pt: has no model.blocks.1.norm1.weight",
    ),
    "wrong shape everywhere": (
        lambda folder: [
            edit(f"model_tp{t}_pp1.pt", lambda s: s.update({"model.blocks.0.mlp.w3.weight": torch.zeros(32, 64)}))(
                folder
            )
            for t in range(2)
        ],
        r"model.layers.2.mlp.down_proj.weight is \(32, 128\), and its configuration makes it \(32, 256\)",
    ),
    "no layer": (
        lambda folder: [
            edit(f"model_tp{t}_pp1.pt", lambda s: [s.pop(k) for k in list(s) if "blocks.1." in k])(folder)
            for t in range(2)
        ],
        "model_tp0_pp1.pt: has no layer 1",
    ),
    "disagreement": (
        edit("model_tp1_pp0.pt", lambda s: s.update({"model.blocks.0.mixer.out_proj.bias": torch.ones(32)})),
        "ranks disagree about mixer.out_proj.bias, by up to .*one checkpoint",
    ),
    "LayerNorm": (
        edit("model_tp0_pp0.pt", lambda s: s.update({"model.blocks.0.norm1.bias": torch.ones(32)})),
        "belongs to LayerNorm",
    ),
    "InternLM2": (
        edit("model_tp0_pp0.pt", lambda s: s.update({"model.layers.0.attention.wqkv.weight": torch.ones(3)})),
        "belongs to InternLM2",
    ),
    "other settings": (settings(num_layers=6), "num_layers = 6, and the model files make it 5"),
    "a reward model": (settings(is_reward=True), "is a reward model"),
    "odd heads": (settings(num_attention_heads=5), "hidden_size = 32 must be a multiple of num_attention_heads = 5"),
    "no number": (settings(layer_norm_epsilon="x"), "layer_norm_epsilon = 'x' must be a positive number"),
    "heads unknown": (remove("model_config.pt"), "nothing tells the number of attention heads"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_is_wrong_is_named(model: CausalLM, tmp_path: Path, case: str) -> None:
    folder = write(tmp_path / "c", model, 2, 2)
    torch.save(SETTINGS, folder / "model_config.pt")
    spoil, message = ERRORS[case]
    spoil(folder)
    with pytest.raises(ConvertError, match=message) as caught:
        open_internlm(folder)
    assert str(folder) in str(caught.value)


def test_a_folder_of_checkpoints_names_them(model: CausalLM, tmp_path: Path) -> None:
    for step in ("100", "20"):
        write(tmp_path / step, model)
    with pytest.raises(ConvertError, match=r"checkpoints of steps 20, 100: give one, .*/100"):
        open_internlm(tmp_path)
    with pytest.raises(ConvertError, match="no such folder"):
        open_internlm(tmp_path / "none")
