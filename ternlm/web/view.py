"""The messages of a conversation as they are shown, and what can be done with each."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import streamlit as st

from ternlm.web.answering import Progress
from ternlm.web.rendering import for_streamlit, plain, split_thoughts
from ternlm.web.session import Session, Wanted
from ternlm.web.talk import Entry
from ternlm.web.words import Words

_AVATARS = {"user": ":material/person:", "assistant": ":material/flight:", "tool": ":material/build:"}


class View:
    """How a conversation is drawn."""

    def __init__(self, session: Session, words: Words, wanted: Callable[[], Wanted], is_idle: bool) -> None:
        """wanted: how answers are asked for now. is_idle: questions can be asked."""
        self._session, self._words, self._wanted, self._is_idle = session, words, wanted, is_idle
        self._talk = session.current

    def show(self) -> None:
        """Draw all that was said."""
        for place, entry in enumerate(list(self._talk.entries)):
            self._entry(place, entry)

    def show_end(self) -> None:
        """Draw what stands behind the last answer: an error, results that are missing, what can be done."""
        talk, words = self._talk, self._words
        if talk.error:
            told = {"url": self._session.server.url, "words": plain(str(talk.error["words"]))}
            st.error(words(f"error_{talk.error['fault']}", **told), icon=":material/error:")
        if talk.open_calls() and not talk.error:
            self._results()
        with st.container(horizontal=True, key="actions"):
            if talk.last_question():
                is_answered = talk.entries[-1].role == "assistant" and not talk.error
                self._action("regenerate", "refresh", self._regenerate, "regenerate" if is_answered else "retry")
            if talk.before:
                self._action("swap", "history", self._session.swap, help=words("swap_help"))

    def show_progress(self, progress: Progress) -> None:
        """Draw what has come of an answer."""
        with st.chat_message("assistant", avatar=_AVATARS["assistant"]):
            if progress.is_empty:
                st.caption(self._words("waiting"))
                return
            self._said(progress.thought, progress.text + " ▌", progress.calls, is_going_on=True)

    def _action(
        self, key: str, icon: str, do: Callable[[], None], label: str | None = None, help: str | None = None
    ) -> None:
        text, disabled = self._words(label or key), not self._is_idle
        st.button(text, key=key, icon=f":material/{icon}:", on_click=do, type="tertiary", help=help, disabled=disabled)

    def _regenerate(self) -> None:
        self._session.regenerate(self._wanted())

    def _entry(self, place: int, entry: Entry) -> None:
        with st.chat_message(entry.role, avatar=_AVATARS[entry.role]):
            if entry.role == "user":
                self._question(place, entry)
            elif entry.role == "tool":
                self._result(place, entry)
            else:
                is_empty = not (entry.text.strip() or entry.calls)
                text = f"*{self._words('empty_answer')}*" if is_empty else entry.text
                self._said(str(entry.message.get("reasoning_content") or ""), text, entry.calls)
                if note := note_of(entry.note, self._words):
                    st.caption(note)

    def _question(self, place: int, entry: Entry) -> None:
        state, editing = st.session_state, f"editing-{self._talk.id}-{place}"

        def set_to(value: bool) -> None:
            state[editing] = value

        if not state.get(editing):
            label, key, disabled = self._words("edit"), f"edit-{self._talk.id}-{place}", not self._is_idle
            with st.container(horizontal=True, wrap=False):
                st.markdown(for_streamlit(entry.text, keep_breaks=True), width="stretch")
                icon = ":material/edit:"
                st.button(label, key, icon=icon, type="tertiary", disabled=disabled, on_click=set_to, args=(True,))
            return
        field = f"draft-{self._talk.id}-{place}"
        st.text_area(self._words("edit"), entry.text, key=field, label_visibility="collapsed")

        def send() -> None:
            if state[field].strip():
                state[editing] = False
                self._session.edit(place, state[field], self._wanted())

        with st.container(horizontal=True):
            label, disabled = self._words("send"), not self._is_idle
            st.button(label, f"send-{field}", type="primary", on_click=send, disabled=disabled)
            st.button(self._words("cancel"), f"cancel-{field}", on_click=set_to, args=(False,))

    def _said(self, thought: str, text: str, calls: list[dict[str, Any]], is_going_on: bool = False) -> None:
        own, text = split_thoughts(text)
        if thought := (thought or own).strip():
            with st.expander(self._words("thoughts"), icon=":material/psychology:", expanded=is_going_on and not text):
                st.markdown(for_streamlit(thought))
        if text.strip():
            st.markdown(for_streamlit(text))
        for call in calls:
            function = call["function"]
            label = self._words("call", name=f"**{plain(function['name'])}**")
            with st.expander(label, icon=":material/build:", expanded=True):
                st.code(pretty(function["arguments"]), language="json", wrap_lines=True)

    def _result(self, place: int, entry: Entry) -> None:
        id = entry.message.get("tool_call_id")
        calls = (call for before in reversed(self._talk.entries[:place]) for call in before.calls)
        name = next((call["function"]["name"] for call in calls if call["id"] == id), str(id))
        with st.expander(self._words("result_of", name=f"**{plain(name)}**"), expanded=True):
            st.code(entry.text, language=None, wrap_lines=True)

    def _results(self) -> None:
        """Ask for the results of tools."""
        state, words, calls = st.session_state, self._words, self._talk.open_calls()
        keys = [f"result-{self._talk.id}-{number}" for number in range(len(calls))]

        def give() -> None:
            results = {call["id"]: state[key] for call, key in zip(calls, keys, strict=True)}
            self._session.give_results(results, self._wanted())

        with st.form(f"results-{self._talk.id}"):
            for call, key in zip(calls, keys, strict=True):
                name = plain(call["function"]["name"])
                st.text_area(words("result_of", name=name), key=key, help=words("result_help"))
            st.form_submit_button(words("give_results"), on_click=give, type="primary", disabled=not self._is_idle)


def note_of(note: Mapping[str, Any], words: Words) -> str:
    """Tell tokens, their speed, and why an answer ended early."""
    parts = []
    usage, first = note.get("usage") or {}, note.get("seconds_to_first")
    tokens = usage.get("completion_tokens")
    if tokens is not None:
        parts.append(words("note_usage", prompt=usage.get("prompt_tokens", 0), completion=tokens))
    elif note.get("pieces"):
        tokens = note["pieces"]
        parts.append(words("note_pieces", pieces=tokens))
    if tokens and first is not None:
        seconds = note.get("seconds", 0.0) - first
        if tokens > 1 and seconds > 0:
            parts.append(words("note_speed", speed=(tokens - 1) / seconds))
        parts.append(words("note_first", seconds=first))
    if note.get("finish") in ("length", "stopped", "error"):
        parts.append(words(f"note_{note['finish']}"))
    return " · ".join(parts)


def pretty(arguments: str) -> str:
    """Return JSON to be read; what isn't JSON, or not yet, as it is."""
    try:
        return json.dumps(json.loads(arguments), ensure_ascii=False, indent=2)
    except (ValueError, RecursionError):
        return arguments
