"""`specdecode push` beside a stand-in for the Hub's API: what it sends is what is there, and a refusal is one line."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from specdecode.errors import ConfigError
from specdecode.training import hub

TOKEN = "hf_of_the_test"
FILES = {
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 40,
    "tokenizer_config.json": b"{}",
    "README.md": b"---\ntags:\n- speculative-decoding\n---\n# A draft\n",
}


class Hub(ThreadingHTTPServer):
    """Takes repositories and commits of small files."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: list[dict[str, Any]] = []
        self.commits: list[tuple[str, dict[str, Any], dict[str, bytes]]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid credentials in Authorization header"})
        elif self.path == "/api/repos/create":
            told = json.loads(body)
            self.server.repositories.append(told)
            self._send(200, {"url": f"{self.server.address}/me/{told['name']}", "id": f"me/{told['name']}"})
        elif self.path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self._send(200, {"files": [{**file, "shouldIgnore": False} for file in files]})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            [header] = [line["value"] for line in lines if line["key"] == "header"]
            files = {v["path"]: base64.b64decode(v["content"]) for v in (li["value"] for li in lines if li["key"] == "file")}
            self.server.commits.append((self.path, header, files))
            self._send(200, {"commitUrl": f"{self.server.address}/me/draft/commit/1", "commitOid": "1", "success": True})
        else:
            self._send(404, {"error": f"unknown: {self.path}"})

    def _send(self, status: int, told: dict[str, Any]) -> None:
        content = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    yield hub
    hub.shutdown()
    thread.join()
    hub.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "best"
    path.mkdir()
    for name, content in FILES.items():
        (path / name).write_bytes(content)
    return path


def push(address: str, *arguments: str, token: str | None = TOKEN, home: Path) -> subprocess.CompletedProcess[str]:
    """Runs the command, as the Hub's address is read when its library is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-m", "specdecode.cli", "push", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_every_file_arrives_as_it_is_in_one_commit(server: Hub, folder: Path, tmp_path: Path) -> None:
    done = push(server.address, str(folder), "me/draft", "--private", "--message", "The best", home=tmp_path)

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{server.address}/me/draft/commit/1"
    assert [(told["name"], told["organization"]) for told in server.repositories] == [("draft", "me")]
    assert server.repositories[0].get("private") or server.repositories[0].get("visibility") == "private"
    [(path, header, files)] = server.commits
    assert path == "/api/models/me/draft/commit/main"
    assert header["summary"] == "The best"
    assert files == FILES


def test_another_branch_and_a_public_repository(server: Hub, folder: Path, tmp_path: Path) -> None:
    assert push(server.address, str(folder), "me/draft", "--revision", "v2", home=tmp_path).returncode == 0
    assert not server.repositories[0].get("private")
    assert server.commits[0][0] == "/api/models/me/draft/commit/v2"
    assert server.commits[0][1]["summary"] == "Upload best"


@pytest.mark.parametrize("missing", FILES)
def test_half_a_model_is_refused(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(ConfigError, match=f"there is no .*{Path(missing).suffix}"):
        hub.push(folder, "me/draft")


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("me/draft", None, "there is no token for the Hub: expected one in HF_TOKEN"),
        ("me/draft", "hf_of_another", "me/draft: the Hub does not take it: "),
        ("me/draft/code", TOKEN, "me/draft/code: expected a repository's name, such as me/draft-code"),
    ],
)
def test_a_refusal_is_one_line(server: Hub, folder: Path, tmp_path: Path, name: str, token: str | None, message: str) -> None:
    done = push(server.address, str(folder), name, token=token, home=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not server.commits


def test_a_hub_that_is_not_there_is_one_line(folder: Path, tmp_path: Path) -> None:
    done = push("http://127.0.0.1:9", str(folder), "me/draft", home=tmp_path)
    assert done.returncode == 2
    assert "me/draft: the Hub does not take it" in done.stderr
    assert len(done.stderr.splitlines()) == 1
