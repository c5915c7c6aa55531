"""What stands beside the conversation: the language, the list, and how answers are asked for."""

from collections.abc import Sequence
from typing import Any

import streamlit as st

from ternlm.web.rendering import plain
from ternlm.web.session import Session, Wanted
from ternlm.web.talk import Talk, as_line, as_markdown, read_tools
from ternlm.web.words import Mistake, Words

_SHOWN_AT_FIRST = 20
_SETTINGS: dict[str, dict[str, Any]] = {
    "temperature": {"min_value": 0.0, "max_value": 2.0, "value": 0.7, "step": 0.05},
    "top_p": {"min_value": 0.05, "max_value": 1.0, "value": 0.9, "step": 0.05},
    "top_k": {"min_value": 0, "max_value": 200, "value": 0, "step": 1},
    "min_p": {"min_value": 0.0, "max_value": 1.0, "value": 0.0, "step": 0.01},
    "repetition_penalty": {"min_value": 0.5, "max_value": 2.0, "value": 1.0, "step": 0.05},
    "presence_penalty": {"min_value": -2.0, "max_value": 2.0, "value": 0.0, "step": 0.1},
    "frequency_penalty": {"min_value": -2.0, "max_value": 2.0, "value": 0.0, "step": 0.1},
}
_NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0} | dict.fromkeys(
    ("presence_penalty", "frequency_penalty"), 0.0
)
"""What servers do anyway: it isn't sent, since not all of them know each setting."""


def choose_language(languages: dict[str, Words]) -> Words:
    """Let the reader choose; at first it is the browser's language."""
    state = st.session_state
    if "language" not in state:
        locale = str(getattr(st.context, "locale", None) or "")
        state["language"] = next((code for code in languages if locale.startswith(code)), "en")
    words = languages[state["language"]]
    st.segmented_control(
        words("language"),
        list(languages),
        key="language",
        format_func=lambda code: languages[code]("language_name"),
        required=True,
        label_visibility="collapsed",
        width="stretch",
    )
    return words


def list_talks(session: Session, words: Words) -> None:
    """Draw the conversations there are."""
    state = st.session_state
    st.button(words("new"), key="new", icon=":material/add:", on_click=session.new, width="stretch")
    talks, shown = session.listed(), state.get("shown", _SHOWN_AT_FIRST)
    if not talks:
        return
    st.caption(words("conversations"))
    with st.container(key="talks", gap="xxsmall"):
        for talk in talks[:shown]:
            is_current = talk is session.current
            st.button(
                plain(talk.name or words("untitled")),
                key=f"show-{talk.id}",
                type="secondary" if is_current else "tertiary",
                icon=":material/pending:" if session.progress(talk) else None,
                on_click=session.show,
                args=(talk.id,),
                width="stretch",
            )
        if len(talks) > shown:
            more = {"shown": shown + 50}
            st.button(words("more"), key="more", type="tertiary", on_click=lambda: state.update(more))


def describe_talk(session: Session, words: Words) -> str:
    """Let the reader tell the model something and give it tools; return what is wrong with them, if anything."""
    state, talk = st.session_state, session.current
    system, tools = f"system-{talk.id}", f"tools-{talk.id}"

    def describe() -> None:
        session.describe(talk, state[system], state[tools])

    wrong = ""
    with st.expander(words("system"), icon=":material/tune:", expanded=bool(talk.system)):
        help = words("system_help")
        label = words("system")
        st.text_area(label, talk.system, key=system, help=help, on_change=describe, label_visibility="collapsed")
    with st.expander(words("tools"), icon=":material/build:", expanded=bool(talk.tools)):
        example = '[{"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]'
        st.text_area(
            words("tools"), talk.tools, key=tools, help=words("tools_help"), on_change=describe, placeholder=example
        )
        try:
            read_tools(talk.tools)
        except Mistake as mistake:
            wrong = words.of(mistake)
            st.error(plain(wrong))
        st.selectbox(
            words("tool_choice"),
            ("auto", "none", "required"),
            key="tool_choice",
            format_func=lambda choice: words(f"tool_choice_{choice}"),
        )
    return wrong


def choose_settings(words: Words) -> None:
    """Let the reader choose how answers are drawn."""
    with st.expander(words("sampling"), icon=":material/casino:"):
        for name, range in _SETTINGS.items():
            st.slider(words(name), key=name, help=words(f"{name}_help"), **range)
        whole: dict[str, Any] = {"value": None, "step": 1}
        st.number_input(words("max_tokens"), key="max_tokens", help=words("max_tokens_help"), min_value=1, **whole)
        st.number_input(words("seed"), key="seed", help=words("seed_help"), **whole)
        st.text_area(words("stop_strings"), key="stop_strings", help=words("stop_strings_help"), height=80)


def wanted_now(models: Sequence[str]) -> Wanted:
    """Return how answers are asked for, as the widgets say."""
    state = st.session_state
    settings = {name: state.get(name) for name in (*_SETTINGS, "max_tokens", "seed")}
    settings = {name: value for name, value in settings.items() if value != _NEUTRAL.get(name)}
    stop = [line for line in (state.get("stop_strings") or "").splitlines() if line]
    if stop:
        settings["stop"] = stop
    choice = state.get("tool_choice")
    return Wanted(state.get("model") or models[0], settings, None if choice == "auto" else choice)


def take_in(session: Session, words: Words) -> None:
    """Let the reader import conversations."""
    with st.expander(words("import"), icon=":material/upload:"):
        state = st.session_state
        file = st.file_uploader(
            words("import"), ["jsonl", "json"], key=f"import-{state.get('imports', 0)}", help=words("import_help")
        )
        if file is not None:
            try:
                talks = session.take_in(file.getvalue().decode())
            except UnicodeDecodeError:
                st.error(words("import_not_text"))
            except Mistake as mistake:
                st.error(plain(words.of(mistake)))
            else:
                state["imports"] = state.get("imports", 0) + 1  # an empty field
                state["notice"] = words("import_done", number=len(talks))
                st.rerun()


def manage_talk(session: Session, words: Words) -> None:
    """Let the reader rename, export and delete the conversation."""
    state, talk = st.session_state, session.current
    name = talk.name or words("untitled")
    with st.popover(words("more"), icon=":material/more_horiz:", type="tertiary"):
        field = f"title-{talk.id}"
        st.text_input(
            words("title"),
            talk.title,
            key=field,
            placeholder=name,
            on_change=lambda: session.rename(talk, state[field]),
        )
        _download(words("export_markdown"), as_markdown(talk, words), f"{_file_name(talk)}.md", "text/markdown")
        help = words("export_line_help")
        _download(words("export_line"), as_line(talk), f"{_file_name(talk)}.jsonl", "application/jsonl", help)
        _delete(session, words, name)


def _delete(session: Session, words: Words, name: str) -> None:
    """Let the reader delete the conversation, after a second press."""
    state, talk = st.session_state, session.current
    label, deleting = words("delete"), f"deleting-{talk.id}"

    def set_to(value: bool) -> None:
        state[deleting] = value

    if not state.get(deleting):
        st.button(label, key="delete", icon=":material/delete:", width="stretch", on_click=set_to, args=(True,))
        return
    st.warning(words("delete_sure", name=plain(name)))
    st.button(label, key="delete-sure", type="primary", width="stretch", on_click=session.remove, args=(talk,))
    st.button(words("cancel"), key="delete-not", width="stretch", on_click=set_to, args=(False,))


def _download(label: str, text: str, name: str, kind: str, help: str | None = None) -> None:
    icon = ":material/download:"
    st.download_button(
        label, text.encode("utf-8", "replace"), name, kind, help=help, on_click="ignore", icon=icon, width="stretch"
    )


def _file_name(talk: Talk) -> str:
    kept = "".join(letter if letter.isalnum() else "-" for letter in talk.name.rstrip("…"))
    return "-".join(part for part in kept.split("-") if part)[:60] or talk.id
