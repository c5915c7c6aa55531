"""The verb `tern client`: the terminal's conversation with a model that a server has."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

from ternlm.cli.options import Penalty, Temperature, TopK, TopP

ApiKey = Annotated[
    str | None, typer.Option(help="Key that the server wants.", envvar="TERNLM_API_KEY", show_default="none")
]
_NEUTRAL = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "top_p": 1.0}
"""What servers that don't know a setting do anyway: it isn't sent then."""


def client(
    url: Annotated[str, typer.Argument(help="Of a server with OpenAI's interface: http://host:8000, with /v1 or not.")],
    model: Annotated[str | None, typer.Option(help="As the server names it.", show_default="its first")] = None,
    api_key: ApiKey = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest answer, in tokens.", min=1, show_default="as the server has it")
    ] = None,
    temperature: Temperature = 0.8,
    top_k: TopK = 0,
    top_p: TopP = 0.8,
    min_p: Annotated[float, typer.Option(help="Leave out tokens below this share of the likeliest one's.")] = 0.0,
    repetition_penalty: Penalty = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Taken off the logits of tokens that were said.")] = 0.0,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same text.", show_default="another each time")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds until an answer's next piece.", min=0.1)] = 600.0,
) -> None:
    """Talk with a model on a server: as `tern chat`; Ctrl-C ends an answer, on the server, too."""
    from ternlm.cli.terminal import Conversation, talk
    from ternlm.config.section import ConfigError

    try:
        from ternlm.web.api import Server, ServerError
    except ImportError as error:
        raise ConfigError(f"tern client needs {error.name}; pip install 'ternlm[web]'") from error
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for each request, else
    try:
        server = Server(url, api_key, timeout=timeout)
        names = server.models()
    except ServerError as error:
        raise ConfigError(str(error)) from error
    if model is not None and model not in names:
        raise ConfigError(f"--model {model} isn't at {server.url}; there are {', '.join(names)}")
    settings = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "seed": seed,
    }
    optional = {"max_tokens": int, "seed": int}
    talk(Conversation(_answerer(server, model or names[0]), settings, system, optional=optional))


def _answerer(server: Any, model: str) -> Any:
    """Return how a server's model answers in a terminal."""
    from ternlm.cli.terminal import Aside

    def answer(messages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Iterator[str | Aside]:
        asked = {name: value for name, value in settings.items() if value != _NEUTRAL.get(name)}
        thinks = False
        with contextlib.closing(server.chat(messages, model, asked)) as pieces:
            for piece in pieces:
                if piece.thought:
                    yield Aside(piece.thought if thinks else f"[thinks] {piece.thought}")
                    thinks = True
                if piece.text:
                    if thinks:
                        yield Aside("\n[says] ")
                        thinks = False
                    yield piece.text
                if piece.finish == "length":
                    yield Aside(" [cut: it became too long]")

    return answer
