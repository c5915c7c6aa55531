"""Which tokens of which requests the next forward pass goes over.

Texts that are being continued come first, a token each, then pieces of prompts as far as the step's tokens reach. A
prompt begins once there are blocks for all of it. Where blocks run out, the newest text gives its own back and is
computed anew when there is room: nothing is lost but time.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from ternlm.infer.pages import BlockPool
from ternlm.infer.request import Request


@dataclass(frozen=True)
class Share:
    """What a request gets of a step: its tokens from the first that isn't stored yet."""

    request: Request
    tokens: Sequence[int]

    @property
    def is_last(self) -> bool:
        """Whether its next token follows from this step."""
        return self.request.num_stored + len(self.tokens) == self.request.num_tokens


class Scheduler:
    """Requests in the order of their arrival: waiting, or running with blocks of their own."""

    def __init__(self, pool: BlockPool, max_running: int, max_step_tokens: int) -> None:
        if max_running < 1 or max_step_tokens < 1:
            raise ValueError(f"max_running = {max_running} and max_step_tokens = {max_step_tokens} must be at least 1")
        self.pool = pool
        self.max_running, self.max_step_tokens = max_running, max_step_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0

    def add(self, request: Request) -> None:
        """Let a request wait for its turn."""
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Let go of a request, wherever it is."""
        if request.pages is not None:
            self.pool.end(request.pages)
            request.pages = None
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def plan(self) -> list[Share]:
        """Return the next step's shares; each has its blocks."""
        shares: list[Share] = []
        budget = self.max_step_tokens
        for request in [request for request in self.running if request.num_tokens - request.num_stored == 1]:
            if budget and request.pages is not None and self._make_room(request):
                budget -= self._take(request, 1, shares)
        for request in list(self.running):
            if budget and request.num_tokens - request.num_stored > 1:
                budget -= self._take(request, budget, shares)
        while budget and self.waiting and len(self.running) < self.max_running:
            request = self.waiting[0]
            if not self._begin(request):
                break
            self.waiting.popleft()
            self.running.append(request)
            budget -= self._take(request, budget, shares)
        return shares

    def _begin(self, request: Request) -> bool:
        """Give a request blocks for all of its tokens, those that hold its beginning already among them."""
        tokens = request.tokens()
        # Who wants to know how likely the prompt is needs a pass over all of it.
        findable = () if request.wants_prompt else tokens
        pages, found = self.pool.begin(findable, request.rope_length)
        # A block more for each running text: else it would be the next one to give its own back.
        missing = -(-len(tokens) // self.pool.block) - len(pages.blocks)
        fits = not self.running or missing + len(self.running) <= self.pool.num_free
        if not fits or not self.pool.grow(pages, len(tokens)):
            self.pool.end(pages)
            return False
        request.pages, request.num_stored = pages, found
        if not request.output:
            request.num_cached = found
        return True

    def _make_room(self, request: Request) -> bool:
        """Give a running text the block that its next token needs, if need be another's; False: it gave up its own."""
        assert request.pages is not None
        while not self.pool.grow(request.pages, request.num_stored + 1):
            newest = self.running[-1]
            self._preempt(newest)
            if newest is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        assert request.pages is not None
        self.pool.end(request.pages)
        request.pages, request.num_stored = None, 0
        self.running.remove(request)
        self.waiting.appendleft(request)
        self.num_preemptions += 1

    def _take(self, request: Request, most: int, shares: list[Share]) -> int:
        """Add a request's share of at most so many tokens; return how many.

        What it stores is told at once: in a forward pass all keys and values of a layer are stored before any are read,
        so that others may build on them in the same step.
        """
        assert request.pages is not None
        tokens = request.tokens()
        last = min(len(tokens), request.num_stored + most)
        share = Share(request, tokens[request.num_stored : last])
        shares.append(share)
        if not request.wants_prompt:
            self.pool.tell(request.pages, tokens, last)
        return len(share.tokens)
