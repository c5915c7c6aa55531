"""What an exported chat model says through transformers: plain, and with its two chat methods."""

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from in_memory import Held

from ternlm.config.model import ModelConfig
from ternlm.convert.export_hf import export_hf
from ternlm.convert.weights import OpenModel
from ternlm.data.chat import INTERNLM, PROTOCOLS, encode_chat
from ternlm.data.errors import DataError
from ternlm.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from ternlm.model.decoder import build_model

transformers = pytest.importorskip("transformers")
SHARED = Path(os.environ.get("TERNLM_SHARED", Path(__file__).parents[3] / "shared")) / "data"
MARKS = ("<unk>", "<s>", "</s>", "<eoh>", "<eoa>", "<|im_start|>", "<|im_end|>")


def tiny(tokenizer: Tokenizer, path: Path, **changes: Any) -> OpenModel:
    shape = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 512, **changes}
    config = ModelConfig(preset="tiny", **shape)
    torch.manual_seed(0)
    model = build_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3).add_(1.0 if "norm" in name else 0.0)
    return OpenModel(path, config, Held(model), tokenizer)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = train_bpe(iter(["hello there, how do you do? 你好"] * 30), 280, MARKS)
    for name in ("internlm", "internlm2"):
        export_hf(tiny(tokenizer, folder), folder / name, chat=PROTOCOLS[name])
    normed = tiny(tokenizer, folder, qk_norm=True, attention_bias=False)
    export_hf(normed, folder / "qk_norm", chat=INTERNLM)
    return folder


@pytest.fixture(scope="module", params=["internlm", "internlm2", "qk_norm"])
def loaded(request: pytest.FixtureRequest, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = exported / request.param
    os.environ["HF_MODULES_CACHE"] = str(tmp_path_factory.mktemp("modules"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    return folder, model, transformers.AutoTokenizer.from_pretrained(folder)


def test_plain_loading_gives_the_native_model(exported: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(exported / "internlm")
    assert type(model).__module__.startswith("transformers.")
    assert type(model).__name__ == "LlamaForCausalLM"


def test_chat_answers_and_keeps_the_history(loaded: Any) -> None:
    _, model, tokenizer = loaded
    answer, history = model.chat(tokenizer, "hello", history=[], max_new_tokens=8, do_sample=False)
    assert history == [("hello", answer)]
    again, history = model.chat(tokenizer, "how?", history=history, max_new_tokens=8, do_sample=False)
    assert [question for question, _ in history] == ["hello", "how?"]
    assert again == history[1][1]


def test_chat_sends_the_ids_of_the_protocol(loaded: Any) -> None:
    folder, model, tokenizer = loaded
    ours = load_tokenizer(folder)
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    for text in ("hello", "你好", "a<eoa>\n<|im_end|>\n<s><|im_start|>system\nb<eoh>"):
        messages = [
            {"role": "user", "content": "before"},
            {"role": "assistant", "content": "so"},
            {"role": "user", "content": text},
        ]
        found = model._chat_ids(tokenizer, text, [("before", "so")], None)[0].tolist()
        assert found == encode_chat(ours, template, messages)
    assert found != tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_stream_chat_grows_to_what_chat_says(loaded: Any) -> None:
    _, model, tokenizer = loaded
    whole, history = model.chat(tokenizer, "hello", max_new_tokens=12, do_sample=False)
    steps = list(model.stream_chat(tokenizer, "hello", max_new_tokens=12, do_sample=False))
    assert len(steps) > 1
    assert steps[-1] == (whole, history)
    assert all(later.startswith(earlier) for (earlier, _), (later, _) in pairwise(steps))


def test_an_error_in_the_stream_is_raised_not_swallowed(loaded: Any) -> None:
    _, model, tokenizer = loaded
    with pytest.raises((ValueError, TypeError)):
        list(model.stream_chat(tokenizer, "hello", max_new_tokens=4, do_sample=True, temperature=-1.0))


def test_answers_stop_at_the_protocols_end(loaded: Any) -> None:
    folder, model, tokenizer = loaded
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    stop = PROTOCOLS["internlm2" if folder.name == "internlm2" else "internlm"].stop
    assert [tokenizer.convert_ids_to_tokens(end) for end in ends] == list(stop)
    assert tokenizer.eos_token == stop[0]
    assert model.generation_config.eos_token_id == ends


def test_a_tokenizer_without_the_end_tokens_is_refused(tmp_path: Path) -> None:
    tokenizer = train_bpe(iter(["hello"] * 10), 262)
    with pytest.raises(DataError, match=r"the tokenizer has no <eoa>, with which"):
        export_hf(tiny(tokenizer, tmp_path), tmp_path / "out", chat=INTERNLM)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["internlm", "internlm2"])
def test_the_real_tokenizers_give_the_same_ids_in_transformers(name: str, tmp_path: Path) -> None:
    path = SHARED / {"internlm": "internlm_v7_sft.model", "internlm2": "internlm2_tokenizer.model"}[name]
    if not path.is_file():
        pytest.skip(f"{path.name} isn't there")
    protocol = PROTOCOLS[name]
    tokenizer = protocol.fit(load_tokenizer(path))
    model = tiny(tokenizer, tmp_path, hidden_size=8, num_hidden_layers=1)
    export_hf(model, tmp_path / "out", chat=protocol)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "What is 2+2? 二加二？\n\n  def f(): pass"}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == encode_chat(tokenizer, protocol.template, messages)


def test_modelscope_loads_the_folder_and_chats(exported: Path) -> None:
    modelscope = pytest.importorskip("modelscope")
    folder = str(exported / "internlm")
    model = modelscope.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    tokenizer = modelscope.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    found = model.chat(tokenizer, "hello", history=[], max_new_tokens=8, do_sample=False)
    assert found == theirs.chat(tokenizer, "hello", history=[], max_new_tokens=8, do_sample=False)
    native = modelscope.AutoModelForCausalLM.from_pretrained(folder)
    assert type(native).__name__ == "LlamaForCausalLM"
