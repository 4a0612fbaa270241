"""One server for all tests, started as a user starts it; and the same models in this process, to compare with."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
import yaml
from openai import OpenAI
from transformers import AutoModelForCausalLM

from specdecode import DecodingMetrics, create_backend, speculative_decode
from specdecode.backends.backend import ModelBackend
from specdecode.decoding.drafters import Drafter, PromptLookupDrafter
from specdecode.embedded import resolve_model
from specdecode.evaluation.prompts import Prompt, load_prompts
from specdecode.text import Tokenizer

CONFIG = "configs/tiny/serve.yaml"
ROOT = Path(__file__).parents[2]
DRAFTS = ("generic", "code", "chat", "reasoning")
DEFAULT_K = 4

Library = Callable[..., tuple[list[int], DecodingMetrics]]
Expect = Callable[..., str]


@dataclass(frozen=True)
class Server:
    """A running server: where it answers, and the process that everything else of it descends from."""

    url: str
    pid: int


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("server")
    log, config = folder / "log.txt", folder / "serve.yaml"
    values = yaml.safe_load((ROOT / CONFIG).read_text())
    # Lengths that depend on measured times would make seeded answers depend on them too.
    arguments = values["applications"][0]["args"]
    arguments["target"]["engine"] = {"draft_length": "fixed"}
    arguments.setdefault("router", {})["demo"] = True
    config.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "specdecode.cli", "serve", "--config", str(config), "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_up(url, process, log)
        yield Server(url, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=120)
    assert status == 0, log.read_text()[-4000:]


@pytest.fixture(scope="session")
def server_url(server: Server) -> str:
    return server.url


def _wait_until_up(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(240):
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise TimeoutError(log.read_text()[-4000:])


@pytest.fixture(scope="session")
def http(server_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server_url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def client(server_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer("tiny/target")


@pytest.fixture(scope="session")
def models() -> dict[str, ModelBackend]:
    return {"target": create_backend("tiny/target"), **{name: create_backend(f"tiny/draft-{name}") for name in DRAFTS}}


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    return [prompt for domain in ("code", "chat", "reasoning") for prompt in load_prompts(domain)[:11]]


@pytest.fixture(scope="session")
def library(models: dict[str, ModelBackend], tokenizer: Tokenizer) -> Library:
    """Says what the library generates after a prompt, given as ids, and its figures."""
    drafters: dict[str, ModelBackend | Drafter] = {**models, "lookup": PromptLookupDrafter()}

    def decode(
        tokens: list[int], draft: str | None = None, *, max_tokens: int = 24, **options: object
    ) -> tuple[list[int], DecodingMetrics]:
        drafter = drafters[draft] if draft else None
        input_ids = torch.tensor([tokens])
        output, metrics = speculative_decode(
            models["target"], drafter, input_ids, max_tokens, DEFAULT_K, tokenizer=tokenizer, **options
        )
        return output[0, len(tokens) :].tolist(), metrics

    return decode


@pytest.fixture(scope="session")
def expect(library: Library, tokenizer: Tokenizer) -> Expect:
    """Says what the library answers to a prompt, as text."""
    return lambda tokens, draft=None, **options: tokenizer.decode(library(tokens, draft, **options)[0])


@pytest.fixture(scope="session")
def foreign_draft(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint like tiny/draft-code in which every token that is no special one has another id."""
    source, folder = Path(resolve_model("tiny/draft-code")), tmp_path_factory.mktemp("foreign")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    size, num_special = model.config.vocab_size, 5
    old_ids = [*range(num_special), *reversed(range(num_special, size))]
    weights = model.get_input_embeddings().weight.data  # the output's too
    weights.copy_(weights[old_ids].clone())
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    new_ids = {old: new for new, old in enumerate(old_ids)}
    tokenizer["model"]["vocab"] = {token: new_ids[old] for token, old in tokenizer["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return str(folder)
