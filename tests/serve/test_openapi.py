"""Requests made up from the application's own description: whatever is sent, nothing breaks."""

import pytest

pytest.importorskip("schemathesis")
import httpx
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from served import serving

pytestmark = pytest.mark.slow
NUM_CASES = 300


@pytest.fixture(scope="module")
def described():
    with serving(max_waiting=200) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json"), server


@pytest.fixture(scope="module")
def operations(described):
    schema, _ = described
    return {f"{each.ok().method} {each.ok().path}": each.ok() for each in schema.get_all_operations()}


@pytest.mark.parametrize(
    "name",
    [
        "POST /v1/chat/completions",
        "POST /v1/completions",
        "POST /tokenize",
        "POST /detokenize",
        "GET /v1/models",
        "GET /v1/models/{name}",
        "GET /health",
        "GET /metrics",
    ],
)
def test_no_request_is_answered_by_a_5xx(name, operations, described):
    from hypothesis import given

    _, server = described
    operation = next(each for key, each in operations.items() if key.lower() == name.lower())
    seen = set()
    for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=NUM_CASES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        def send(case):
            _bound(case)
            answer = case.call_and_validate(checks=[not_a_server_error])
            seen.add(answer.status_code)

        try:
            send()
        except Exception as error:
            if "Unsatisfiable" not in type(error).__name__:  # a route without input has none that is wrong
                raise
    assert all(status < 500 for status in seen)
    assert 200 in seen or "{name}" in name
    assert name.startswith("GET") or seen & {400, 404, 422}
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"


def _bound(case):
    """Name the model, so that more than its name is looked at, and ask for little, so that there is time for more."""
    if isinstance(case.body, dict):
        if isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny"
        if isinstance(case.body.get("max_tokens"), int) and case.body["max_tokens"] > 8:
            case.body["max_tokens"] = 8
