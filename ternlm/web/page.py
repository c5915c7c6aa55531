"""The chat page, as Streamlit runs it from top to bottom for every change: beside, the conversation, the question."""

import os
from importlib.resources import files
from pathlib import Path

import streamlit as st

from ternlm.web import run, sidebar
from ternlm.web.api import Server, ServerError
from ternlm.web.history import History
from ternlm.web.rendering import plain
from ternlm.web.session import Session
from ternlm.web.view import View
from ternlm.web.words import Words, load_words

_LOOK_EVERY_SECONDS = 0.2
_STYLE = """<style>
.st-key-talks button, .st-key-talks button div { justify-content: flex-start; text-align: left; }
.st-key-talks button p { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
</style>"""


def main() -> None:
    """Draw the page."""
    icon = files("ternlm.web").joinpath("tern.svg")
    st.set_page_config("TernLM", page_icon=str(icon), initial_sidebar_state="expanded")
    st.html(_STYLE)
    languages = load_words()
    with st.sidebar:
        st.subheader("TernLM")
        words = sidebar.choose_language(languages)
        session = _session(words)
        sidebar.list_talks(session, words)
        models = _models(session, words)
        wrong = sidebar.describe_talk(session, words)
        sidebar.choose_settings(words)
        sidebar.take_in(session, words)
    _draw(session, words, models, wrong)


def _draw(session: Session, words: Words, models: list[str], wrong: str) -> None:
    """Draw the conversation, and the field for what is asked next."""
    talk = session.current
    is_busy = session.progress(talk) is not None
    can_ask = bool(models) and not wrong
    view = View(session, words, lambda: sidebar.wanted_now(models), can_ask and not is_busy)
    _tell(session, words)
    if talk.entries:
        with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
            st.markdown(f"**{plain(talk.name or words('untitled'))}**")
            sidebar.manage_talk(session, words)
        view.show()
    elif models:
        st.header(words("hello"))
        model = st.session_state.get("model") or models[0]
        st.caption(words("hello_more", model=plain(model), url=session.server.url))
    if is_busy:
        _follow(session, view, words)
    else:
        view.show_end()
    if wrong:
        st.error(plain(wrong))
    _ask(session, words, models, can_ask and not is_busy and not talk.open_calls())


def _session(words: Words) -> Session:
    """Return this reader's session."""
    state = st.session_state
    if "session" not in state:
        server = Server(os.environ.get(run.URL, run.USUAL_URL), os.environ.get(run.KEY), connect_timeout=5.0)
        folder, history = os.environ.get(run.HISTORY), None
        try:
            history = History(Path(folder)) if folder else None
        except OSError as error:
            state["notice_error"] = words("history_broken", words=error)
        state["session"] = Session(server, history)
    session: Session = state["session"]
    return session


def _models(session: Session, words: Words) -> list[str]:
    """Let the reader choose a model; none where the server can't be reached."""
    state = st.session_state
    if not state.get("models"):
        try:
            state["models"] = session.server.models()
        except ServerError as error:
            told = {"url": session.server.url, "words": plain(error.words)}
            st.error(words(f"error_{error.fault}", **told), icon=":material/error:")
            st.button(words("again"), key="again")
            return []
    models: list[str] = state["models"]
    st.selectbox(words("model"), models, key="model")
    return models


def _tell(session: Session, words: Words) -> None:
    """Tell what happened beside the conversation."""
    state = st.session_state
    if notice := state.pop("notice", None):
        st.toast(plain(notice), icon=":material/check:")
    if broken := state.get("notice_error"):
        st.error(plain(broken))
    if session.unsaved:
        st.error(words("unsaved", words=plain(session.unsaved)), icon=":material/error:")
    if session.unread:
        st.warning(words("unread", names=plain(", ".join(session.unread))))


@st.fragment(run_every=_LOOK_EVERY_SECONDS)
def _follow(session: Session, view: View, words: Words) -> None:
    """Show what has come of the answer, until it has ended; then the page is drawn anew."""
    talk = session.current
    progress = session.progress(talk)
    if progress is None:
        st.rerun()
    view.show_progress(progress)
    st.button(words("stop"), key="stop", icon=":material/stop_circle:", on_click=session.stop, args=(talk,))


def _ask(session: Session, words: Words, models: list[str], can_ask: bool) -> None:
    """Draw the field for a question."""
    state = st.session_state
    if not models:
        hint = words("ask_no_server")
    elif session.current.open_calls():
        hint = words("ask_waits")
    else:
        hint = words("ask", model=state.get("model") or models[0])

    def ask() -> None:
        if (state["ask"] or "").strip():
            session.ask(state["ask"].strip(), sidebar.wanted_now(models))

    st.chat_input(hint, key="ask", disabled=not can_ask, on_submit=ask)


if __name__ == "__main__":
    main()
