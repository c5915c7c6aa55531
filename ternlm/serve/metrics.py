"""What a server measures, for Prometheus: requests, tokens, times, and how busy the engine is."""

import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ternlm.infer.answer import Delta
from ternlm.infer.worker import Load

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """Counts of one server."""

    def __init__(self, load: Callable[[], Load]) -> None:
        self._registry = CollectorRegistry()
        own, labels = self._registry, ["route", "status"]

        def count(name: str, text: str) -> Counter:
            return Counter(f"ternlm_{name}_tokens", text, registry=own)

        def times(name: str, text: str) -> Histogram:
            return Histogram(f"ternlm_{name}_seconds", text, registry=own, buckets=_SECONDS)

        self._requests = Counter("ternlm_requests", "Requests that were answered", labels, registry=own)
        self._prompt = count("prompt", "Tokens of prompts")
        self._cached = count("cached", "Tokens of prompts that were found stored")
        self._output = count("output", "Tokens that were generated")
        self._first = times("time_to_first_token", "From a request to a text's first token")
        self._each = times("time_per_token", "Between tokens of a text, its mean")
        self._whole = times("request", "From a request to the end of a text")
        self._registry.register(_Busy(load))

    def answered(self, route: str, status: int) -> None:
        """Count a request."""
        self._requests.labels(route, str(status)).inc()

    def watch(self, num_prompt_tokens: int) -> "TextWatch":
        """Begin to measure a text."""
        return TextWatch(self, num_prompt_tokens)

    def text(self) -> bytes:
        """Return all of it as Prometheus reads it."""
        return generate_latest(self._registry)

    def begun(self, prompt: int, cached: int, seconds: float) -> None:
        """Count a text that has its first token."""
        self._prompt.inc(prompt)
        self._cached.inc(cached)
        self._first.observe(seconds)

    def ended(self, tokens: int, seconds: float, seconds_after_first: float) -> None:
        """Count a text that has ended."""
        self._whole.observe(seconds)
        if tokens > 1:
            self._each.observe(seconds_after_first / (tokens - 1))

    def generated(self, tokens: int) -> None:
        """Count tokens."""
        self._output.inc(tokens)


class TextWatch:
    """Measures one text."""

    def __init__(self, metrics: Metrics, num_prompt_tokens: int) -> None:
        self._metrics, self._prompt = metrics, num_prompt_tokens
        self._began, self._first = time.perf_counter(), 0.0
        self.num_tokens = self.num_cached = 0

    def take(self, delta: Delta) -> None:
        """Go on by what is new of it."""
        now = time.perf_counter()
        self.num_tokens += delta.num_tokens
        if not self._first:
            self._first, self.num_cached = now, delta.num_cached
            self._metrics.begun(self._prompt, delta.num_cached, now - self._began)
        self._metrics.generated(delta.num_tokens)
        if delta.finish is not None:
            self._metrics.ended(self.num_tokens, now - self._began, now - self._first)


class _Busy(Collector):
    """How busy the engine is at the moment when somebody asks."""

    def __init__(self, load: Callable[[], Load]) -> None:
        self._load = load

    def collect(self) -> Iterable[Metric]:
        load = self._load()
        yield GaugeMetricFamily("ternlm_texts_running", "Texts that are being continued", value=load.running)
        yield GaugeMetricFamily("ternlm_texts_waiting", "Texts that wait for their turn", value=load.waiting)
        yield GaugeMetricFamily("ternlm_blocks_used", "Blocks of keys and values in use", value=load.used_blocks)
        yield GaugeMetricFamily("ternlm_blocks", "Blocks of keys and values in all", value=load.num_blocks)
        yield CounterMetricFamily("ternlm_preemptions", "Texts that gave their blocks back", value=load.preemptions)
        yield CounterMetricFamily("ternlm_steps", "Forward passes", value=load.steps)
