"""One server for all tests, started as a user starts it; and the same models in this process, to compare with."""

import os
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
from openai import OpenAI

from specdecode import create_backend, speculative_decode
from specdecode.backends.backend import ModelBackend
from specdecode.evaluation.prompts import Prompt, load_prompts
from specdecode.text import Tokenizer

CONFIG = "configs/tiny/serve.yaml"
ROOT = Path(__file__).parents[2]
DRAFTS = ("generic", "code", "chat", "reasoning")
DEFAULT_K = 4

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
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [sys.executable, "-m", "specdecode.cli", "serve", "--config", CONFIG, "--port", str(port)]
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
def expect(models: dict[str, ModelBackend], tokenizer: Tokenizer) -> Expect:
    """Says what the library answers to a prompt, given as ids, with the same draft, seed and temperature."""

    def answer(tokens: list[int], draft: str | None = None, *, max_tokens: int = 24, **options: float) -> str:
        drafter = models[draft] if draft else None
        output, _ = speculative_decode(models["target"], drafter, torch.tensor([tokens]), max_tokens, K=DEFAULT_K, **options)
        return tokenizer.decode(output[0, len(tokens) :].tolist())

    return answer
