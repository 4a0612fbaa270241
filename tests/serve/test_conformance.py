"""Every field of OpenAI's API, through OpenAI's own client; against this server, or any other one.

`CONFORMANCE_URL=http://127.0.0.1:8001/v1 CONFORMANCE_MODEL=NAME pytest tests/serve/test_conformance.py` asks another server,
and leaves out what only this one does; without a model it asks one of ours that runs already.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai import OpenAI

from tests.serve.conformance import CASES, Caller, Case, table

URL, FOREIGN_MODEL = os.environ.get("CONFORMANCE_URL"), os.environ.get("CONFORMANCE_MODEL")
MODEL = FOREIGN_MODEL or "tiny"
DOCUMENT = Path(__file__).parents[2] / "docs" / "api.md"

only_here = pytest.mark.skipif(FOREIGN_MODEL is not None, reason="this is not what other servers do")


@pytest.fixture(scope="module")
def api(request: pytest.FixtureRequest) -> Iterator[OpenAI]:
    url = URL or f"{request.getfixturevalue('server_url')}/v1"
    with OpenAI(base_url=url, api_key=os.environ.get("CONFORMANCE_KEY", "none"), max_retries=0, timeout=60) as client:
        yield client


def combinations() -> Iterator[object]:
    for case in CASES:
        for endpoint in case.endpoints:
            for is_stream in (False, True):
                name = f"{case.name.replace('`', '')}-{endpoint}-{'stream' if is_stream else 'whole'}"
                yield pytest.param(case, endpoint, is_stream, id=name, marks=[only_here] if case.is_ours else [])


@pytest.mark.parametrize(("case", "endpoint", "is_stream"), list(combinations()))
def test_a_field(api: OpenAI, case: Case, endpoint: str, is_stream: bool) -> None:
    case.check(Caller(api, MODEL, endpoint, is_stream))


def test_the_models_are_listed_and_described(api: OpenAI) -> None:
    names = [model.id for model in api.models.list()]
    assert MODEL in names
    assert [api.models.retrieve(name).id for name in names] == names


@only_here
def test_every_model_that_is_listed_answers(api: OpenAI) -> None:
    models = {model.id: model.to_dict() for model in api.models.list()}
    assert next(iter(models)) == "tiny"
    assert models.keys() == {"tiny", "generic", "code", "chat", "reasoning"}
    assert all(model["max_model_len"] == 2048 for model in models.values())
    answers = {
        name: api.completions.create(model=name, prompt="def ", max_tokens=12, temperature=0).choices[0].text for name in models
    }
    assert len(set(answers.values())) > 2  # each is of its own mind


def test_a_model_that_is_not_there_is_404(api: OpenAI) -> None:
    for is_stream in (False, True):
        with pytest.raises(openai.NotFoundError):
            api.chat.completions.create(model="nobody", messages=[{"role": "user", "content": "a"}], stream=is_stream)


@only_here
def test_a_prompt_that_is_too_long_has_openais_code(api: OpenAI) -> None:
    for is_stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            api.completions.create(model=MODEL, prompt="a " * 5000, stream=is_stream)
        assert caught.value.code == "context_length_exceeded"
        assert "maximum context length" in caught.value.message


@only_here
def test_a_request_that_is_named_keeps_its_name(api: OpenAI) -> None:
    answer = api.completions.with_raw_response.create(
        model=MODEL, prompt="a", max_tokens=1, extra_headers={"X-Request-Id": "mine"}
    )
    assert (answer.headers["x-request-id"], answer.parse().id) == ("mine", "cmpl-mine")
    assert api.completions.create(model=MODEL, prompt="a", max_tokens=1)._request_id


def test_the_document_has_the_same_table() -> None:
    assert table() in DOCUMENT.read_text(encoding="utf-8")
