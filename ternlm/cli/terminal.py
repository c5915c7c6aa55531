"""A conversation in a terminal: lines in, answers that appear as they are made; with whom, it doesn't know."""

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Aside:
    """What is shown between an answer's pieces and isn't part of it."""

    text: str


Answer = Callable[[Sequence[Message], Mapping[str, Any]], Iterator[str | Aside]]
"""`(messages, settings) -> pieces of the answer`; closing the iterator ends it. An Exception it raises is told."""

_HELP = """\
A line is a question; \"\"\" begins and ends one of several lines. Ctrl-C ends an answer, Ctrl-D the conversation.
/new              forget the conversation
/system [TEXT]    tell the model something before the conversation, which begins anew; without TEXT: nothing
/regenerate       answer the last question again
/undo             forget the last question and its answer
/set [NAME VALUE] change how answers are drawn; without NAME: show it
/show             show the conversation
/save FILE        write it as a line of JSON, as `tern sft` takes it
/load FILE        go on with one that was saved
/help             this
/quit             end"""


@dataclass
class Conversation:
    """What was said, and how answers are drawn."""

    answer: Answer
    settings: dict[str, Any]
    """Those that the answers take, with their values; others can't be set."""
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    """Of user and assistant, in turns."""
    optional: Mapping[str, type] = field(default_factory=dict)
    """Settings that may be null, and what they are else."""

    def ask(self, text: str, write: Callable[[str], None]) -> None:
        """Answer a question. An answer that is interrupted is kept as far as it came; one that fails isn't, nor its
        question."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        question = {"role": "user", "content": text}
        pieces: list[str] = []
        with contextlib.closing(_as_generator(self.answer([*first, *self.messages, question], self.settings))) as said:
            try:
                for piece in said:
                    if isinstance(piece, Aside):
                        write(piece.text)
                        continue
                    pieces.append(piece)
                    write(piece)
            except KeyboardInterrupt:
                write(" [ended]")
        self.messages += [question, {"role": "assistant", "content": "".join(pieces)}]

    def undo(self) -> list[Message]:
        """Forget the last question and its answer; return them. Raises ValueError where there is none."""
        if not self.messages:
            raise ValueError("nothing was asked yet")
        last = self.messages[-2:]
        del self.messages[-2:]
        return last

    def set(self, name: str, text: str) -> None:
        """Change a setting; raises ValueError for one that isn't there, or a value of another kind."""
        if name not in self.settings:
            raise ValueError(f"there is no setting {name}; there are {', '.join(self.settings)}")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        was = self.settings[name]
        wanted = self.optional.get(name, type(was))
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted and not (value is None and name in self.optional):
            as_what = "or null" if name in self.optional else f"as {was!r} is"
            raise ValueError(f"{name} = {text} must be {_KINDS.get(wanted, wanted.__name__)}, {as_what}")
        self.settings[name] = value

    def save(self, file: Path) -> None:
        """Write the conversation as one record."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        file.write_text(json.dumps({"messages": [*first, *self.messages]}, ensure_ascii=False) + "\n", "utf-8")

    def load(self, file: Path) -> None:
        """Go on with a conversation that was saved; raises ValueError for another content."""
        record = json.loads(file.read_text("utf-8"))
        messages = record.get("messages") if isinstance(record, dict) else None
        if not isinstance(messages, list) or not all(_is_said(message) for message in messages):
            raise ValueError(f'{file}: not a conversation, which is {{"messages": [{{"role", "content"}}, ...]}}')
        system, others = None, messages
        if messages and messages[0]["role"] == "system":
            system, others = messages[0]["content"], messages[1:]
        if [message["role"] for message in others] != ["user", "assistant"] * (len(others) // 2):
            raise ValueError(f"{file}: questions of a user and answers of an assistant must come in turns")
        self.system, self.messages = system, others


_KINDS = {float: "a number", int: "a whole number", str: "a text", bool: "true or false"}


def talk(conversation: Conversation) -> None:
    """Ask for lines until the input ends."""
    if sys.stdin is None or sys.stdout is None:
        from ternlm.config.section import ConfigError

        raise ConfigError("a conversation needs a standard input and output, and one of them is closed; open both")
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # lets `input` edit lines and find earlier ones
        print("A line is a question. Ctrl-C ends an answer, Ctrl-D the conversation; /help says more.", file=sys.stderr)
    while True:
        try:
            line = _read(interactive)
        except (EOFError, KeyboardInterrupt):
            return
        if not line:
            continue
        if line.startswith("/"):
            if not _command(conversation, *line[1:].split(maxsplit=1)):
                return
        else:
            _ask(conversation, line)


def _read(interactive: bool) -> str:
    """Read a question or a command: a line, or several between lines of three quotes."""
    line = _line("> " if interactive else "")
    if not line.startswith('"""'):
        return line
    lines, line = [], line[3:]
    while not line.endswith('"""'):
        lines.append(line)
        try:
            line = _line("... " if interactive else "", strip=False)
        except EOFError:  # what was said isn't lost
            return "\n".join(lines).strip()
    return "\n".join([*lines, line[:-3]]).strip()


def _line(prompt: str, strip: bool = True) -> str:
    line = input(prompt).encode(errors="replace").decode()  # what isn't UTF-8
    return line.strip() if strip else line.rstrip()


def _ask(conversation: Conversation, text: str) -> None:
    try:
        conversation.ask(text, lambda piece: print(piece, end="", flush=True))
    except Exception as trouble:
        print(f"[{trouble}]", end="")
    print()


def _command(conversation: Conversation, name: str = "", rest: str = "") -> bool:
    """Do what a line with a slash says; return False where it ends the conversation."""
    rest = rest.strip()
    try:
        if name in ("quit", "exit", "bye"):
            return False
        match name:
            case "new":
                conversation.messages = []
            case "system":
                conversation.system, conversation.messages = rest or None, []
            case "undo":
                conversation.undo()
            case "regenerate":
                _regenerate(conversation)
            case "set":
                _set(conversation, rest)
            case "show":
                _show(conversation)
            case "save" | "load":
                if not rest:
                    raise ValueError(f"/{name} needs a file: /{name} talk.json")
                getattr(conversation, name)(Path(rest))
            case "help":
                print(_HELP)
            case _:
                print(f"[there is no /{name}; /help tells what there is]")
    except (OSError, ValueError, RecursionError) as trouble:
        print(f"[{trouble}]")
    return True


def _regenerate(conversation: Conversation) -> None:
    last = conversation.undo()
    before = len(conversation.messages)
    _ask(conversation, str(last[0]["content"]))
    if len(conversation.messages) == before:  # it failed: the old answer is better than none
        conversation.messages += last


def _set(conversation: Conversation, rest: str) -> None:
    if not rest:
        print("\n".join(f"{name} = {json.dumps(value)}" for name, value in conversation.settings.items()))
        return
    name, _, value = rest.partition(" ")
    if not value.strip():
        raise ValueError(f"/set {name} needs a value: /set {name} {conversation.settings.get(name, 'VALUE')}")
    conversation.set(name, value.strip())


def _show(conversation: Conversation) -> None:
    if conversation.system is not None:
        print(f"[system] {conversation.system}")
    for message in conversation.messages:
        print(f"[{message['role']}] {message['content']}")


def _is_said(message: Any) -> bool:
    roles = ("system", "user", "assistant")
    return isinstance(message, dict) and message.get("role") in roles and isinstance(message.get("content"), str)


def _as_generator(pieces: Iterator[str | Aside]) -> Any:
    """Return an iterator that can be closed."""
    return pieces if hasattr(pieces, "close") else (piece for piece in pieces)
