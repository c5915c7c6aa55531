"""Chat protocols: templates that turn conversations into text, and the tokens that end an answer.

They are data: `chat` renders and encodes with them, exports write them into models. Jinja, as exported tokenizers
carry it: given `messages`, `tools`, `add_generation_prompt`, `bos_token` and `eos_token`.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ternlm.data.errors import DataError
from ternlm.data.tokenizer import CONFIG_FILE, Tokenizer


@dataclass(frozen=True)
class ChatProtocol:
    """How a family of models is spoken with."""

    template: str
    """Jinja, given `messages`, `tools`, `add_generation_prompt`, `bos_token` and `eos_token`."""
    stop: tuple[str, ...]
    """Tokens that end an answer."""
    names: Mapping[int, str] = field(default_factory=dict)
    """What ids are called that the family's base tokenizer leaves unused."""
    after_end: bool = False
    """Whether what the template puts after the end token is trained too."""
    document_end: bool = False
    """Whether a training sample ends with the tokenizer's eos, trained."""

    def fit(self, tokenizer: Tokenizer) -> Tokenizer:
        """Return the tokenizer with the protocol's tokens; raises DataError where it has no room for them."""
        if not any(self is known for known in PROTOCOLS.values()):
            return tokenizer  # a model's own template goes with its tokenizer
        lacks = [token for token in self.stop if token not in tokenizer.markup_in(token)]
        if not lacks:
            return tokenizer
        if not self.names or not all(
            index < tokenizer.vocab_size and "UNUSED" in tokenizer.token_of(index) for index in self.names
        ):
            raise DataError(
                f"the tokenizer has no {' and no '.join(lacks)}, with which the chat protocol ends an answer; choose "
                "the protocol that the model was trained with"
            )
        return tokenizer.renamed(self.names)


INTERNLM = ChatProtocol(
    template=(
        "{%- if tools -%}{{ raise_exception('InternLM of 2023 has no tools') }}{%- endif -%}"
        "{%- set turn = namespace(newest=0) -%}"
        "{%- for message in messages if message.role == 'user' -%}{%- set turn.newest = loop.index -%}{%- endfor -%}"
        "{%- set asked = namespace(count=0) -%}"
        "{%- for message in messages -%}"
        "{%- if message.tool_calls -%}{{ raise_exception('InternLM of 2023 has no tools to call') }}{%- endif -%}"
        "{%- if message.role == 'user' -%}{%- set asked.count = asked.count + 1 -%}"
        # The text begins with <s>, and so does every turn of the past; not the newest.
        "{%- if loop.first or (asked.count > 1 and asked.count < turn.newest) -%}{{ '<s>' }}{%- endif -%}"
        "{{ '<|User|>:' + message.content + '<eoh>\n' }}"
        "{%- elif message.role == 'assistant' -%}{{ '<|Bot|>:' + message.content + '<eoa>\n' }}"
        "{%- elif message.role == 'system' and loop.first -%}{{ '<s><|System|>:' + message.content + '<eoh>\n' }}"
        "{%- else -%}{{ raise_exception('roles are system (first), user and assistant, not ' + message.role) }}"
        "{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|Bot|>:' }}{%- endif -%}"
    ),
    stop=("<eoa>", "</s>"),
    # As InternLM's own tool made its samples.
    after_end=True,
    document_end=True,
)
"""InternLM chat (2023): `<s><|User|>:question<eoh>\\n<|Bot|>:answer<eoa>\\n`."""

_INTERNLM2_TOOLS = (
    "{%- set functions = namespace(all=[]) -%}"
    "{%- for tool in tools -%}{%- set functions.all = functions.all + [tool.function or tool] -%}{%- endfor -%}"
    "{{ '<|im_start|>system name=<|plugin|>\n' + functions.all | tojson + '<|im_end|>\n' }}"
)

INTERNLM2 = ChatProtocol(
    template=(
        "{{ bos_token }}"
        "{%- if tools and not (messages and messages[0].role == 'system') -%}" + _INTERNLM2_TOOLS + "{%- endif -%}"
        "{%- for message in messages -%}"
        "{%- set role = 'environment name=<|plugin|>' if message.role == 'tool' else message.role -%}"
        "{{ '<|im_start|>' + role + '\n' + message.content }}"
        "{%- for call in message.tool_calls or [] -%}"
        "{%- set called = call.function or call -%}"
        "{{ '<|action_start|><|plugin|>\n' + {'name': called.name, 'parameters': called.arguments} | tojson"
        " + '<|action_end|>' }}"
        "{%- endfor -%}"
        "{{ '<|im_end|>' + '\n' }}"
        "{%- if tools and loop.first and message.role == 'system' -%}" + _INTERNLM2_TOOLS + "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    ),
    stop=("<|im_end|>", "</s>"),
    names={
        92538: "<|plugin|>",
        92539: "<|interpreter|>",
        92540: "<|action_end|>",
        92541: "<|action_start|>",
        92542: "<|im_end|>",
        92543: "<|im_start|>",
    },
)
"""InternLM2 chat: ChatML after `<s>`; tools are plugins, and a call stands between action tokens."""

CHATML = ChatProtocol(
    template=(
        "{%- set system = messages[0].content if messages and messages[0].role == 'system' else none -%}"
        "{%- if tools -%}"
        "{{ '<|im_start|>system\n' + (system + '\n\n' if system else '') + 'You can call these functions:\n<tools>' }}"
        "{%- for tool in tools -%}{{ '\n' + tool | tojson }}{%- endfor -%}"
        "{{ '\n</tools>\nTo call one, write its name and its arguments as JSON:\n<tool_call>\n"
        '{"name": name, "arguments": {argument: value}}'
        "\n</tool_call><|im_end|>\n' }}"
        "{%- elif system is not none -%}{{ '<|im_start|>system\n' + system + '<|im_end|>\n' }}{%- endif -%}"
        "{%- for message in messages -%}"
        "{%- if message.role == 'system' and loop.first -%}"
        "{%- elif message.role == 'tool' -%}"  # results that follow each other are one turn of the user
        "{%- if loop.first or loop.previtem.role != 'tool' -%}{{ '<|im_start|>user' }}{%- endif -%}"
        "{{ '\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
        "{%- if loop.last or loop.nextitem.role != 'tool' -%}{{ '<|im_end|>\n' }}{%- endif -%}"
        "{%- else -%}"
        "{{ '<|im_start|>' + message.role + '\n' + message.content }}"
        "{%- for call in message.tool_calls or [] -%}"
        "{%- set called = call.function or call -%}"
        "{{ ('\n' if message.content or not loop.first else '') + '<tool_call>\n'"
        " + {'name': called.name, 'arguments': called.arguments} | tojson + '\n</tool_call>' }}"
        "{%- endfor -%}"
        "{{ '<|im_end|>\n' }}"
        "{%- endif -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    ),
    stop=("<|im_end|>",),
)
"""ChatML without bos, and without a system message of its own; tools as Hermes and Qwen write them."""

_LLAMA3_TOOLS = (
    "{{ 'Environment: ipython\n\nYou can call these functions:\n\n' }}"
    "{%- for tool in tools -%}{{ tool | tojson(indent=4) + '\n\n' }}{%- endfor -%}"
    '{{ \'To call one, answer with nothing but {"name": name, "parameters": {argument: value}}.\n\n\' }}'
)

LLAMA3 = ChatProtocol(
    template=(
        "{{ bos_token }}"
        "{%- set system = messages[0].content if messages and messages[0].role == 'system' else none -%}"
        "{%- if tools or system is not none -%}{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}"
        "{%- if tools -%}" + _LLAMA3_TOOLS + "{%- endif -%}"
        "{{ (system or '') | trim + '<|eot_id|>' }}{%- endif -%}"
        "{%- for message in (messages if system is none else messages[1:]) -%}"
        "{%- set role = 'ipython' if message.role == 'tool' else message.role -%}"
        "{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}"
        "{%- if message.tool_calls -%}"
        "{%- if message.tool_calls | length > 1 or message.content | trim -%}"
        "{{ raise_exception('Llama 3 calls one function at a time, and says nothing beside it') }}{%- endif -%}"
        "{%- set called = message.tool_calls[0].function or message.tool_calls[0] -%}"
        "{{ {'name': called.name, 'parameters': called.arguments} | tojson }}"
        "{%- else -%}{{ message.content | trim }}{%- endif -%}"
        "{{ '<|eot_id|>' }}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"
    ),
    stop=("<|eot_id|>", "<|end_of_text|>"),
)
"""Llama 3: a header for each message; a call of a tool is JSON, as Llama 3.1 writes it."""

PROTOCOLS = {"internlm": INTERNLM, "internlm2": INTERNLM2, "chatml": CHATML, "llama3": LLAMA3}


def protocol_for(
    chat: str, tokenizer: Tokenizer, own_template: str | None = None, own_stop: Collection[str] = ()
) -> ChatProtocol:
    """Find the protocol that `chat` names: one of `PROTOCOLS`, a file of a Jinja template, or "auto".

    auto: the model's own template, which ends answers with `own_stop`; else the protocol whose tokens the tokenizer
    has. A file's answers end with `own_stop` and those of the known end tokens that it writes.
    """
    if chat in PROTOCOLS:
        return PROTOCOLS[chat]
    choices = " or ".join(PROTOCOLS)
    if chat != "auto":
        path = Path(chat)
        if not path.is_file():
            raise DataError(f"chat = {chat!r} is no protocol and no file; choose {choices}, auto, or a .jinja file")
        try:
            template = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: can't be read as a chat template ({error}); give a text file, UTF-8") from error
        return ChatProtocol(template, _ends(tokenizer, template, own_stop))
    if own_template:
        return ChatProtocol(own_template, _ends(tokenizer, own_template, own_stop))
    for protocol in PROTOCOLS.values():
        if all(token in tokenizer.markup_in(token) for token in (*protocol.stop, *protocol.names.values())):
            return protocol
    raise DataError(
        f"the model doesn't tell how it was trained to chat; choose a protocol, {choices}, or give a .jinja file"
    )


def read_template(tokenizer: str | Path) -> str | None:
    """Read the chat template that lies beside a tokenizer, in its folder, if one does."""
    path = Path(tokenizer)
    folder = path if path.is_dir() else path.parent
    file, config = folder / "chat_template.jinja", folder / CONFIG_FILE
    try:
        if file.is_file():
            return file.read_text("utf-8")
        written = json.loads(config.read_text("utf-8")).get("chat_template") if config.is_file() else None
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{folder}: its chat template can't be read ({error}); name a protocol") from error
    return written if isinstance(written, str) else None


def _ends(tokenizer: Tokenizer, template: str, own: Collection[str]) -> tuple[str, ...]:
    """List what ends an answer: what is known to, the known end tokens that a template writes, and eos."""
    known = {token for protocol in PROTOCOLS.values() for token in protocol.stop}
    written = {token for token in known if token in template and token in tokenizer.markup_in(token)}
    eos = set() if tokenizer.eos_id is None else {tokenizer.token_of(tokenizer.eos_id)}

    def place(token: str) -> tuple[bool, bool, bool, str]:
        """Put first what engines are to look for: what the template writes, what the model tells, then eos."""
        return token not in template, token not in own, token not in eos, token

    return tuple(sorted({*own, *written, *eos}, key=place))
