"""A conversation in a terminal: lines in, an answer that appears as it is made."""

import sys

from ternlm.config.section import UserError
from ternlm.infer.chat import Chat


def talk(chat: Chat) -> None:
    """Ask for lines until the input ends; "/new" forgets the conversation, Ctrl-C ends an answer."""
    interactive = sys.stdin.isatty()
    system = [message for message in chat.messages if message["role"] == "system"]
    if interactive:
        print("A line is a question. /new: begin anew; Ctrl-C: end an answer; Ctrl-D: end.", file=sys.stderr)
    while True:
        try:
            line = input("> " if interactive else "").encode(errors="replace").decode().strip()  # what isn't UTF-8
        except (EOFError, KeyboardInterrupt):
            return
        if line == "/new":
            chat.messages = list(system)
        elif line:
            _answer(chat, line)


def _answer(chat: Chat, line: str) -> None:
    try:
        chat.ask(line, lambda piece: print(piece, end="", flush=True))
    except KeyboardInterrupt:
        print(" [ended; this question and answer are forgotten]", end="")
    except UserError as trouble:
        print(f"[{trouble}]", end="")
    print()
