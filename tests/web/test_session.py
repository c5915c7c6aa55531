"""What a reader can do, against a real server: ask, stop, regenerate, edit, give results of tools; nothing is lost."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Served, wait_until

from ternlm.web.answering import Answering
from ternlm.web.api import CallPiece, Piece, Server, ServerError
from ternlm.web.history import History
from ternlm.web.session import Session, Wanted
from ternlm.web.talk import Entry
from ternlm.web.words import Mistake

SHORT = Wanted("tiny", {"max_tokens": 6, "temperature": 0, "ignore_eos": True})
LONG = Wanted("tiny", {"max_tokens": 450, "temperature": 0, "ignore_eos": True})
WRONG = Wanted("tiny", {"temperature": 9})


@pytest.fixture
def session(server: Served, tmp_path: Path) -> Session:
    return Session(Server(server.url), History(tmp_path))


def finish(session: Session) -> list[str]:
    wait_until(lambda: session.progress(session.current) is None)
    return [entry.role for entry in session.current.entries]


def test_a_conversation_goes_on_and_is_kept(session: Session, server: Served, tmp_path: Path) -> None:
    session.ask("one", SHORT)
    session.ask("at the same time", SHORT)  # is passed over
    assert finish(session) == ["user", "assistant"]
    session.ask("two", SHORT)
    assert finish(session) == ["user", "assistant"] * 2
    note = session.current.entries[3].note
    assert (note["finish"], note["model"], note["usage"]["completion_tokens"]) == ("length", "tiny", 6)
    assert 0 < note["seconds_to_first"] <= note["seconds"]
    again = Session(Server(server.url), History(tmp_path))
    assert [talk.entries for talk in again.listed()] == [session.current.entries]


def test_a_stopped_answer_stops_the_server_and_is_kept_as_far_as_it_came(session: Session, server: Served) -> None:
    session.ask("one", LONG)
    wait_until(lambda: (session.progress(session.current) or Entry({})).text)  # type: ignore[arg-type]
    session.stop(session.current)
    wait_until(server.is_free)
    assert finish(session) == ["user", "assistant"]
    answer = session.current.entries[1]
    assert answer.note["finish"] == "stopped"
    assert 0 < answer.note["pieces"] < 450


def test_an_answer_is_made_anew_and_the_old_one_stays_at_hand(session: Session) -> None:
    session.ask("one", SHORT)
    finish(session)
    old = list(session.current.entries)
    session.regenerate(Wanted("tiny", {"max_tokens": 3, "temperature": 0, "ignore_eos": True}))
    assert finish(session) == ["user", "assistant"]
    new = list(session.current.entries)
    assert old[1].text.startswith(new[1].text)
    session.swap()
    assert session.current.entries == old
    session.swap()
    assert session.current.entries == new


def test_an_earlier_question_is_changed(session: Session) -> None:
    session.ask("one", SHORT)
    finish(session)
    session.ask("two", SHORT)
    finish(session)
    session.edit(0, "three", SHORT)
    assert finish(session) == ["user", "assistant"]
    assert session.current.entries[0].text == "three"
    assert [entry.text for entry in session.current.before][::2] == ["one", "two"]


def test_what_the_server_refuses_is_told_and_nothing_is_lost(session: Session) -> None:
    session.ask("one", WRONG)
    assert finish(session) == ["user"]
    assert "temperature: Input should be less than" in session.current.error["words"]
    assert session.current.error["fault"] == "refused"
    session.regenerate(SHORT)
    assert finish(session) == ["user", "assistant"]
    assert session.current.error == {}
    whole = list(session.current.entries)
    session.regenerate(WRONG)
    finish(session)
    session.regenerate(WRONG)
    assert finish(session) == ["user"]
    session.swap()
    assert session.current.entries == whole


def test_a_server_that_is_gone_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    session = Session(Server(url))
    session.ask("one", SHORT)
    assert finish(session) == ["user"]
    assert session.current.error["fault"] == "unreachable"


def test_conversations_run_beside_each_other(session: Session, server: Served) -> None:
    session.ask("one", LONG)
    first = session.current
    session.new()
    assert session.current.entries == []
    session.ask("two", SHORT)
    assert finish(session) == ["user", "assistant"]
    assert {talk.name for talk in session.listed()} == {"one", "two"}
    session.remove(first)
    wait_until(server.is_free)
    assert [talk.name for talk in session.listed()] == ["two"]
    time.sleep(0.1)
    assert len(session._history.load()[0]) == 1  # type: ignore[union-attr]
    session.remove(session.current)
    assert session.listed() == []
    assert session.current.entries == []


def test_titles_prompts_and_imports(session: Session, tmp_path: Path) -> None:
    session.describe(session.current, "Be kind.", "")
    assert session.listed() == []
    session.ask("one", SHORT)
    finish(session)
    session.rename(session.current, "  My\ntalk ")
    assert session.current.name == "My talk"
    lines = (json.dumps({"messages": [{"role": "user", "content": text}]}) for text in "ab")
    session.take_in("\n".join(lines))
    assert session.current.name == "a"
    assert [talk.name for talk in session.listed()][-1] in ("My talk", "a", "b")
    assert len(session.listed()) == len(session._history.load()[0]) == 3  # type: ignore[union-attr]
    session.show(session.listed()[1].id)
    with pytest.raises(Mistake):
        session.take_in("{")
    session.describe(session.current, "", "{")
    with pytest.raises(Mistake, match="tools_not_json"):
        session.ask("two", SHORT)
    assert session.progress(session.current) is None


def test_a_folder_that_went_away_is_told(session: Session, tmp_path: Path) -> None:
    for file in tmp_path.iterdir():
        file.unlink()
    tmp_path.rmdir()
    session.ask("one", SHORT)
    assert finish(session) == ["user", "assistant"]
    assert "No such file" in session.unsaved


TOOL = '[{"name": "weather", "parameters": {"type": "object", "properties": {}, "additionalProperties": false}}]'


def test_calls_wait_for_all_their_results(session: Session) -> None:
    session.describe(session.current, "", TOOL)
    calls = [{"id": id, "type": "function", "function": {"name": "weather", "arguments": "{}"}} for id in ("c1", "c2")]
    asked = {"role": "assistant", "content": "", "tool_calls": calls}
    session.current.entries = [Entry({"role": "user", "content": "one"}), Entry(asked)]
    session.give_results({"c1": "sunny"}, SHORT)
    assert len(session.current.entries) == 2
    session.give_results({"c1": "sunny", "c2": "rainy"}, SHORT)
    assert finish(session) == ["user", "assistant", "tool", "tool", "assistant"]
    assert session.current.error == {}


def test_a_model_is_made_to_call(session: Session) -> None:
    pytest.importorskip("llguidance")
    session.describe(session.current, "", TOOL)
    session.ask("one", Wanted("tiny", {"max_tokens": 100, "temperature": 0}, "required"))
    assert finish(session) == ["user", "assistant"]
    (call, *_) = session.current.open_calls()
    assert call["function"]["name"] == "weather"


class Spoken:
    """As an answer: what a list has, then an error if it is one."""

    def __init__(self, *pieces: Any, pause: float = 0.0) -> None:
        self.pieces, self.pause, self.closed = pieces, pause, False

    def __iter__(self) -> Iterator[Piece]:
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            if self.closed:
                return
            yield piece
            time.sleep(self.pause)

    def close(self) -> None:
        self.closed = True


def ended(*pieces: Any, **more: Any) -> Any:
    got: list[Any] = []
    answering = Answering(Spoken(*pieces), got.append, **more)  # type: ignore[arg-type]
    answering.start()
    answering.wait(10)
    assert answering.look().is_done
    return got[0]


def test_pieces_become_a_message() -> None:
    calls = (CallPiece(1, "b", "g"), CallPiece(0, "a", "f", "{"), CallPiece(0, arguments="}"))
    texts = (Piece(thought="h"), Piece(thought="m"), Piece("\ud83d"), Piece("\udc26!"))
    ends = (Piece(finish="tool_calls"), Piece(usage={"completion_tokens": 9}))
    parts = (*texts, Piece(calls=calls[:1]), Piece(calls=calls[1:]), *ends)
    progress = ended(*parts)
    message = progress.message()
    assert (message["content"], message["reasoning_content"]) == ("🐦!", "hm")
    assert [call["id"] for call in message["tool_calls"]] == ["a", "b"]
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert progress.note()["usage"] == {"completion_tokens": 9}


def test_half_a_character_is_shown_as_a_mark_and_errors_of_any_kind_end() -> None:
    assert ended(Piece("a\ud83d")).text == "a?"
    broken = ended(Piece("a"), ServerError("broken", "it broke"))
    assert (broken.text, broken.note()["finish"]) == ("a", "error")
    assert "ZeroDivisionError" in ended(ZeroDivisionError()).error.words
    assert "has the index 1000000" in ended(Piece(calls=(CallPiece(10**6),))).error.words


def test_an_answer_that_nobody_looks_at_is_stopped() -> None:
    got: list[Any] = []
    spoken = Spoken(*[Piece("a")] * 1000, pause=0.01)
    answering = Answering(spoken, got.append, patience=0.05)  # type: ignore[arg-type]
    answering.start()
    answering.wait(10)
    assert got[0].is_stopped
    assert spoken.closed
