"""What one reader of the page has: conversations, answers on their way, and what can be done with them. No widgets."""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ternlm.web.answering import Answering, Progress
from ternlm.web.api import Server, ServerError
from ternlm.web.history import History
from ternlm.web.talk import Entry, Talk, from_lines, read_tools


@dataclass(frozen=True)
class Wanted:
    """How answers are asked for."""

    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the request: temperature and the like."""
    tool_choice: str | None = None
    """With tools alone."""


class Session:
    """Conversations of one reader. Answers end in threads of their own, so that every change is under a lock."""

    def __init__(self, server: Server, history: History | None = None) -> None:
        """history: where conversations are kept, beside here."""
        self.server = server
        self._history, self._lock = history, threading.RLock()
        self._answering: dict[str, Answering] = {}
        self.unsaved: str = ""
        """Why the last conversation couldn't be written, if so."""
        talks, self.unread = history.load() if history else ([], [])
        self.talks = {talk.id: talk for talk in talks}
        self._current = Talk()

    @property
    def current(self) -> Talk:
        """The conversation that is shown; one in which nothing was said yet isn't in the list."""
        return self._current

    def listed(self) -> list[Talk]:
        """List the conversations, the last changed first."""
        with self._lock:
            return sorted(self.talks.values(), key=lambda talk: talk.changed, reverse=True)

    def show(self, id: str) -> None:
        """Go to another conversation."""
        self._current = self.talks[id]

    def new(self) -> None:
        """Go to a new conversation, with the system prompt and tools of this one."""
        self._current = Talk(system=self._current.system, tools=self._current.tools)

    def remove(self, talk: Talk) -> None:
        """Forget a conversation, and what is being answered in it."""
        self.stop(talk)
        with self._lock:
            self.talks.pop(talk.id, None)
            if self._history:
                try:
                    self._history.remove(talk)
                except OSError as error:
                    self.unsaved = str(error)
            if talk is self._current:
                self._current = Talk(system=talk.system, tools=talk.tools)

    def rename(self, talk: Talk, title: str) -> None:
        """Give a conversation a title; none: it is called by its first question."""
        talk.title = " ".join(title.split())
        self._keep(talk)

    def describe(self, talk: Talk, system: str, tools: str) -> None:
        """Set what a model is told before the conversation, and the tools that it may call."""
        if (talk.system, talk.tools) != (system, tools):
            talk.system, talk.tools = system, tools
            if talk.id in self.talks:
                self._keep(talk)

    def take_in(self, text: str) -> Sequence[Talk]:
        """Add conversations from lines of JSON, and show the first; raises Mistake where any isn't one."""
        talks = from_lines(text)
        with self._lock:
            for talk in reversed(talks):
                self._keep(talk)
            self._current = talks[0]
        return talks

    def ask(self, text: str, wanted: Wanted) -> None:
        """Ask a question. Raises Mistake for tools that are none."""
        talk = self._current
        self._begin(talk, wanted, len(talk.entries), [Entry({"role": "user", "content": text})])

    def regenerate(self, wanted: Wanted) -> None:
        """Answer anew what was asked last."""
        talk = self._current
        self._begin(talk, wanted, talk.last_question(), [])

    def edit(self, place: int, text: str, wanted: Wanted) -> None:
        """Ask another question in an earlier one's place, and go on from there."""
        self._begin(self._current, wanted, place, [Entry({"role": "user", "content": text})])

    def give_results(self, results: Mapping[str, str], wanted: Wanted) -> None:
        """Tell the results of the calls at the end by their ids; once all are there, the model goes on."""
        talk = self._current
        added = [
            Entry({"role": "tool", "content": results[call["id"]], "tool_call_id": call["id"]})
            for call in talk.open_calls()
            if call["id"] in results
        ]
        if len(added) == len(talk.open_calls()):
            self._begin(talk, wanted, len(talk.entries), added)

    def stop(self, talk: Talk) -> None:
        """End the answer that is on its way; what has come of it is kept."""
        if answering := self._answering.get(talk.id):
            answering.stop()
            answering.wait(5.0)

    def progress(self, talk: Talk) -> Progress | None:
        """Return what has come of a conversation's answer; None where there is none on its way."""
        answering = self._answering.get(talk.id)
        return answering.look() if answering else None

    def swap(self) -> None:
        """Go between what is there and what was there before the last change."""
        self._current.swap()
        self._keep(self._current)

    def _begin(self, talk: Talk, wanted: Wanted, length: int, added: Sequence[Entry]) -> None:
        """Cut a conversation, add to it, and ask for an answer."""
        if talk.id in self._answering:
            return  # a second press of a button
        tools = read_tools(talk.tools)
        settings = dict(wanted.settings)
        if tools and wanted.tool_choice:
            settings["tool_choice"] = wanted.tool_choice
        with self._lock:
            talk.cut(length)
            talk.entries += added
            talk.changed = time.time()
            self._keep(talk)
            answer = self.server.chat(talk.messages(), wanted.model, settings, tools)
            answering = Answering(answer, lambda progress: self._end(talk, wanted.model, progress))
            self._answering[talk.id] = answering
            answering.start()

    def _end(self, talk: Talk, model: str, progress: Progress) -> None:
        """Put an answer in its place."""
        with self._lock:
            if not (progress.is_empty and (progress.error or progress.is_stopped)):
                talk.entries.append(Entry(progress.message(), {**progress.note(), "model": model}))
            if progress.error:
                talk.error = _told(progress.error)
            talk.changed = time.time()
            if talk.id in self.talks:  # else it was removed meanwhile
                self._keep(talk)
            del self._answering[talk.id]

    def _keep(self, talk: Talk) -> None:
        with self._lock:
            self.talks[talk.id] = talk
            if self._history:
                try:
                    self._history.save(talk)
                    self.unsaved = ""
                except OSError as error:
                    self.unsaved = str(error)


def _told(error: ServerError) -> dict[str, Any]:
    return {"fault": error.fault, "words": error.words, "status": error.status}
