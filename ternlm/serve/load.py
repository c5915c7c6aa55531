"""Measure an OpenAI-compatible server under load: requests that arrive as real ones would, timed token by token.

Needs httpx. What is sent is drawn from a seed, so that two servers get the same requests at the same moments.
"""

import asyncio
import json
import math
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

from ternlm.config.section import ConfigError, UserError

# fmt: off
_WORDS = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state",
    "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system",
    "question", "work", "government", "number", "night", "point", "home", "water", "room", "mother", "area", "money",
    "story", "fact", "month", "lot", "right", "study", "book", "eye", "job", "word", "business", "issue", "side",
    "kind", "head", "house", "service", "friend", "father", "power", "hour", "game", "line", "end", "member", "law",
    "car", "city", "community", "name", "president", "team", "minute", "idea", "body", "information",
)
# fmt: on
_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Mix:
    """What requests look like; lengths are drawn evenly from least to most."""

    prompt_words: tuple[int, int] = (32, 256)
    output_tokens: tuple[int, int] = (32, 128)
    shared_words: int = 0
    """Words that all prompts begin with, as a system prompt would be."""

    def __post_init__(self) -> None:
        for name in ("prompt_words", "output_tokens"):
            least, most = getattr(self, name)
            if not 1 <= least <= most:
                raise ConfigError(
                    f"{name} = {least} to {most} must be two numbers of at least 1, the smaller one first"
                )
        if self.shared_words < 0:
            raise ConfigError(f"shared_words = {self.shared_words} must be at least 0")


@dataclass(frozen=True)
class Asked:
    """One request."""

    prompt: str
    max_tokens: int


@dataclass
class Answered:
    """What became of a request; times in seconds from the test's start."""

    sent: float
    first: float | None = None
    last: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Report:
    """Figures of a test. Times in seconds; percentiles by number."""

    requests: int
    failed: int
    seconds: float
    requests_per_second: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    output_tokens_per_second: float
    time_to_first_token: dict[str, float]
    time_per_output_token: dict[str, float]
    """Of a request, after its first one."""
    latency: dict[str, float]
    errors: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return asdict(self)


def draw(num_requests: int, mix: Mix, seed: int) -> list[Asked]:
    """Return requests of words in any order."""
    rng = random.Random(seed)
    shared = " ".join(rng.choices(_WORDS, k=mix.shared_words))
    asked = []
    for _ in range(num_requests):
        own = " ".join(rng.choices(_WORDS, k=rng.randint(*mix.prompt_words)))
        asked.append(Asked(f"{shared} {own}".strip(), rng.randint(*mix.output_tokens)))
    return asked


def arrivals(num_requests: int, rate: float, seed: int) -> list[float]:
    """Return when each request is sent, in seconds: so many a second on the average, at random (a Poisson process)."""
    rng, now, times = random.Random(f"{seed} arrivals"), 0.0, []
    for _ in range(num_requests):
        times.append(now)
        now += rng.expovariate(rate) if math.isfinite(rate) else 0.0
    return times


async def run_load(
    url: str,
    asked: Sequence[Asked],
    *,
    model: str | None = None,
    api_key: str | None = None,
    rate: float = math.inf,
    clients: int | None = None,
    seed: int = 0,
    extra: dict[str, Any] | None = None,
    timeout: float = 600.0,
) -> tuple[Report, list[Answered]]:
    """Send requests to `url`/v1/completions, streaming; return the figures, and what became of each.

    rate: requests a second; infinite: all at once, or as clients are free. clients: so many at the same time at most.
    extra: fields that every request carries beside its own. Raises UserError where the server isn't there.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    # As of so many people, each with a connection; some servers close those that they have answered at any moment.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout, limits=limits) as client:
        name = model or await find_model(client)
        free = asyncio.Semaphore(clients or len(asked) or 1)
        answered = [Answered(0.0) for _ in asked]
        start = time.perf_counter()

        async def one(index: int, moment: float) -> None:
            await asyncio.sleep(max(start + moment - time.perf_counter(), 0))
            async with free:
                body = {"model": name, "temperature": 0, **(extra or {}), **_body(asked[index])}
                answered[index] = await _ask(client, body, start)

        await asyncio.gather(*(one(i, moment) for i, moment in enumerate(arrivals(len(asked), rate, seed))))
    return summarize(answered), answered


async def find_model(client: httpx.AsyncClient) -> str:
    """Return the first model that a server has."""
    try:
        answer = await client.get("/v1/models")
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except httpx.HTTPStatusError as error:
        raise UserError(f"{client.base_url}: answers /v1/models with {error.response.status_code}") from error
    except httpx.HTTPError as error:
        raise UserError(f"{client.base_url}: can't be reached ({error}); is the server up?") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{client.base_url}: names no model at /v1/models; name one: --model") from error


def _body(asked: Asked) -> dict[str, Any]:
    return {
        "prompt": asked.prompt,
        "max_tokens": asked.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _ask(client: httpx.AsyncClient, body: dict[str, Any], start: float) -> Answered:
    answered, pieces = Answered(time.perf_counter() - start), 0
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                answered.error = f"status {response.status_code}"
                return answered
            async for event in _events(response):
                if "error" in event:
                    answered.error = "error in the stream"
                    return answered
                if event.get("choices"):
                    now = time.perf_counter() - start
                    if event["choices"][0].get("text"):
                        pieces += 1
                        answered.first = answered.first or now
                    answered.last = now
                _note_usage(answered, event.get("usage"))
    except (httpx.HTTPError, ValueError) as error:
        answered.error = type(error).__name__
    if answered.error is None and answered.last is None:
        answered.error = "nothing came"
    answered.output_tokens = answered.output_tokens or pieces
    answered.first = answered.first or answered.last
    return answered


def _note_usage(answered: Answered, usage: dict[str, Any] | None) -> None:
    if usage:
        answered.prompt_tokens = usage.get("prompt_tokens", 0)
        answered.output_tokens = usage.get("completion_tokens", 0)
        answered.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0) or 0


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
            yield json.loads(data)


def summarize(answered: Sequence[Answered]) -> Report:
    """Return the figures of requests that were answered, and how many weren't, by reason."""
    good = [each for each in answered if each.error is None]
    errors: dict[str, int] = {}
    for each in answered:
        if each.error is not None:
            errors[each.error] = errors.get(each.error, 0) + 1
    firsts = [(each.first or 0.0) - each.sent for each in good]
    wholes = [(each.last or 0.0) - each.sent for each in good]
    paces = [
        ((each.last or 0.0) - (each.first or 0.0)) / (each.output_tokens - 1) for each in good if each.output_tokens > 1
    ]
    ends = [each.last or 0.0 for each in good]
    seconds = max(ends) - min(each.sent for each in answered) if ends else 0.0
    outputs = sum(each.output_tokens for each in good)
    return Report(
        requests=len(answered),
        failed=len(answered) - len(good),
        seconds=seconds,
        requests_per_second=len(good) / seconds if seconds else 0.0,
        prompt_tokens=sum(each.prompt_tokens for each in good),
        cached_tokens=sum(each.cached_tokens for each in good),
        output_tokens=outputs,
        output_tokens_per_second=outputs / seconds if seconds else 0.0,
        time_to_first_token=_spread(firsts),
        time_per_output_token=_spread(paces),
        latency=_spread(wholes),
        errors=errors,
    )


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Return mean and percentiles (the nearest value at or above)."""
    if not values:
        return {}
    ordered = sorted(values)
    found = {f"p{p}": ordered[max(math.ceil(p / 100 * len(ordered)) - 1, 0)] for p in _PERCENTILES}
    return {"mean": sum(values) / len(values), **found}


def format_report(report: Report) -> str:
    """Return the figures as lines of text."""
    lines = [
        f"requests              {report.requests:,}, of which {report.failed:,} failed, in {report.seconds:.1f} s",
        f"requests/s            {report.requests_per_second:.2f}",
        f"output tokens/s       {report.output_tokens_per_second:.1f}  ({report.output_tokens:,} tokens)",
        f"prompt tokens         {report.prompt_tokens:,}, of which {report.cached_tokens:,} were found stored",
        f"time to first token   {_milliseconds(report.time_to_first_token)}",
        f"time per output token {_milliseconds(report.time_per_output_token)}",
        f"latency               {_milliseconds(report.latency)}",
    ]
    if report.errors:
        lines.append("failed                " + ", ".join(f"{what}: {n:,}" for what, n in report.errors.items()))
    return "\n".join(lines)


def _milliseconds(spread: dict[str, float]) -> str:
    return ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in spread.items()) or "-"
