"""The jobs of training, on Ray: they read, ask the target, train on several processes, survive, and refuse what cannot work."""

from serve.cluster import connected  # isort: skip  # before all else that imports Ray

import filecmp
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import ray
import torch
import yaml
from transformers import AutoModelForCausalLM, TrainerState, TrainingArguments

from jobs import cache_teacher, train_draft, train_target
from jobs.generate_data import generate_completions
from jobs.reading import read
from jobs.training import Reporter
from specdecode.backends.backend import create_backend
from specdecode.config import check_config
from specdecode.decoding.drafters import NoDrafter
from specdecode.decoding.sequence import SamplingParams
from specdecode.embedded import resolve_model
from specdecode.errors import ConfigError
from specdecode.training.completions import CompletionJobConfig, complete
from specdecode.training.data import DataConfig
from specdecode.training.draft import DraftTrainingConfig
from tests.serve.serving import free_port

pytestmark = pytest.mark.filterwarnings("default")  # those of Ray and its libraries, in all their processes

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
TARGET, DRAFT = "tiny/target", "tiny/draft-generic"
QUESTIONS = [
    {"question": f"How many apples are {a} apples and {b} apples?", "answer": f"There are {a + b}."}
    for a in range(20)
    for b in range(10)
]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One Ray for all of them, whose training looks after its workers more often than is usual."""
    quick = {
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    before = {name: os.environ.get(name) for name in quick}
    os.environ.update(quick)
    with connected():
        yield
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, QUESTIONS)), encoding="utf-8")
    return path


@pytest.fixture
def values(questions: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": {"draft_model": DRAFT, "target_model": TARGET},
        "data": {"domain": "reasoning", "dataset_name": str(questions)},
        "training": {
            "output_dir": str(tmp_path / "draft"),
            "num_train_steps": 8,
            "per_device_batch_size": 2,
            "sequence_length": 48,
            "learning_rate": 0.001,
            "num_warmup_steps": 2,
            "validate_every": 4,
            "log_every": 1,
            "num_validation_blocks": 4,
            "num_workers": 0,
            "device": "cpu",
            "precision": "float32",
        },
        "distillation": {"enabled": True, "completions": {"num_prompts": 12, "max_new_tokens": 10, "batch": 6, "part": 6}},
    }


def config_of(values: dict[str, Any]) -> DraftTrainingConfig:
    return check_config(values, DraftTrainingConfig, where="test")


def run(job: Any, values: dict[str, Any], folder: Path, *arguments: str) -> int:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return int(job.main(["--config", str(path), *arguments]))


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [*QUESTIONS, {"question": "", "answer": "4"}, {"question": "How?", "answer": None}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = DataConfig(domain="reasoning", dataset_name=str(path))
    reading = read(config, resolve_model(DRAFT))
    assert sum(len(part[str(path)]) for part in (reading.training, reading.held_out)) == len(QUESTIONS)
    assert reading.unusable == {"without text": 2}
    again = read(config, resolve_model(DRAFT))
    for one, other in zip(reading.training[str(path)], again.training[str(path)], strict=True):
        assert one.ids.tolist() == other.ids.tolist()


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        ("", None, "does not load: it is empty"),
        ('{"text": "a"}\n', None, r"has no column answer, question; it has \['text'\]"),
        ("not json\n", None, "does not load"),
    ],
)
def test_data_that_cannot_be_used_are_one_clear_error(
    tmp_path: Path, content: str, columns: dict[str, str] | None, message: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read(DataConfig(domain="reasoning", dataset_name=str(path), columns=columns), resolve_model(DRAFT))


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_other_files_read_alike(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    rows = pd.DataFrame(QUESTIONS[:60])
    rows.to_parquet(path) if suffix == "parquet" else rows.to_csv(path, index=False)
    reading = read(DataConfig(domain="reasoning", dataset_name=str(path)), resolve_model(DRAFT))
    assert len(reading.training[str(path)]) + len(reading.held_out[str(path)]) == 60


def completion_config(questions: Path, folder: Path, **changes: Any) -> CompletionJobConfig:
    settings = {"num_prompts": 10, "max_new_tokens": 8, "batch": 4, "part": 4, "sampled_share": 0.5, **changes}
    values = {
        "target": {"model": TARGET},
        "draft": {"model": DRAFT},
        "data": {"domain": "reasoning", "dataset_name": str(questions)},
        "completions": settings,
        "output_dir": str(folder),
    }
    return check_config(values, CompletionJobConfig, where="test")


def test_the_target_answers_as_it_does_alone_and_only_what_is_missing(questions: Path, tmp_path: Path) -> None:
    folder = tmp_path / "answers"
    answers = generate_completions(completion_config(questions, folder))
    assert len(answers) == 10
    target = create_backend(TARGET)
    greedy = complete([a.prompt for a in answers], target, NoDrafter(), lambda _: SamplingParams(max_tokens=8))
    same = [one.tokens == other.tokens for one, other in zip(answers, greedy, strict=True)]
    assert 0 < sum(same) < 10  # the others are sampled

    (folder / "part-00001.parquet").unlink()
    kept = (folder / "part-00000.parquet").stat().st_mtime_ns
    assert generate_completions(completion_config(questions, folder, batch=2, num_actors=2)) == answers
    assert (folder / "part-00000.parquet").stat().st_mtime_ns == kept
    with pytest.raises(ConfigError, match="made with another configuration"):
        generate_completions(completion_config(questions, folder, temperature=0.5))


def test_a_draft_is_distilled_and_another_run_does_not_overwrite_it(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(train_draft, values, tmp_path) == 0
    assert "best checkpoint at step" in capsys.readouterr().out
    output = Path(values["training"]["output_dir"])
    model = AutoModelForCausalLM.from_pretrained(output / "best", dtype=torch.float32)
    assert model.config.num_hidden_layers == 1
    about = json.loads((output / "run.json").read_text())
    assert about["config"]["data"]["domain"] == "reasoning"
    assert {"loss", "acceptance", "accepted_length", "answers_acceptance"} <= about["result"]["validation"].keys()

    assert run(train_draft, values, tmp_path) == 2
    assert "holds a run: expected another folder, or --resume" in capsys.readouterr().err
    shutil.rmtree(output / "trainer" / "checkpoint-8")  # as if it had been stopped after the fourth step
    shutil.rmtree(output / "best")
    assert run(train_draft, values, tmp_path, "--resume") == 0
    again = json.loads((output / "run.json").read_text())["result"]
    assert again["validation"] == pytest.approx(about["result"]["validation"])
    assert again["num_steps"] == 8
    values["training"]["learning_rate"] = 0.1
    assert run(train_draft, values, tmp_path, "--resume") == 2
    assert "has another configuration" in capsys.readouterr().err
    values["training"]["output_dir"] += "-other"
    assert run(train_draft, values, tmp_path, "--resume") == 2
    assert "holds no run" in capsys.readouterr().err


def test_training_from_a_cache_needs_no_target(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(cache_teacher, values, tmp_path) == 2
    assert "with a teacher_cache to write and a loss.top_k" in capsys.readouterr().err
    values["distillation"] |= {"teacher_cache": str(tmp_path / "cache"), "loss": {"top_k": 8}}
    assert run(train_draft, values, tmp_path) == 2
    assert "holds no cache" in capsys.readouterr().err
    assert run(cache_teacher, values, tmp_path) == 0
    rows = pq.read_table(tmp_path / "cache" / "training.parquet").to_pylist()
    assert len(rows) == 16
    assert {len(row["teacher_ids"]) for row in rows} == {48 * 8}
    assert run(train_draft, values, tmp_path) == 0
    values["training"] |= {"seed": 4, "output_dir": str(tmp_path / "other")}
    assert run(train_draft, values, tmp_path) == 2
    assert "was made with another blocks" in capsys.readouterr().err


def test_a_killed_worker_is_replaced_and_two_are_as_good_as_one_with_twice_the_batch(
    values: dict[str, Any], tmp_path: Path
) -> None:
    values["distillation"] |= {"target_share": 0.0}
    values["training"] |= {"num_train_steps": 12, "per_device_batch_size": 4}
    alone = train_draft.train_draft(config_of(values))

    values["training"] |= {"num_workers": 2, "per_device_batch_size": 2, "output_dir": str(tmp_path / "two")}
    output = Path(values["training"]["output_dir"])
    killed: list[int] = []

    def kill() -> None:
        while not list(output.glob("ray/checkpoint*")):  # the first validation has been
            time.sleep(0.05)
        workers = [int(p.name) for p in Path("/proc").glob("[0-9]*") if b"RayTrainWorker" in _command_line(p)]
        if workers:
            os.kill(workers[-1], signal.SIGKILL)
            killed.append(workers[-1])

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    two = train_draft.train_draft(config_of(values))
    assert killed, "nobody was killed"
    assert two.num_steps == 12
    # What was half handed over when the worker was killed may lie there too: nobody goes on from it.
    kept = json.loads((output / "ray/checkpoint_manager_snapshot.json").read_text())["checkpoint_results"]
    assert len(kept) == 2
    for folder in (output / "ray" / result["checkpoint_dir_name"] for result in kept):  # as it was written, by both processes
        step = json.loads((folder / "trainer_state.json").read_text())["global_step"]
        written = output / "trainer" / f"checkpoint-{step}"
        names = [file.name for file in written.iterdir()]
        assert {"optimizer.pt", "rng_state_0.pth", "rng_state_1.pth"} <= set(names)
        assert filecmp.cmpfiles(folder, written, names, shallow=False)[1:] == ([], [])
    np.testing.assert_allclose(two.validation["loss"], alone.validation["loss"], rtol=1e-3)
    np.testing.assert_allclose(two.validation["acceptance"], alone.validation["acceptance"], rtol=1e-3)


def test_one_process_alone_hands_a_checkpoint_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others would copy what is half written: of Ray Train's own callback all do, and the last copy stays."""
    (tmp_path / "checkpoint-4").mkdir()
    reported: list[tuple[dict[str, float], Any]] = []
    monkeypatch.setattr(ray.train, "report", lambda figures, checkpoint: reported.append((figures, checkpoint)))
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    history = [{"loss": 2.0, "step": 3}, {"eval_loss": 1.5, "step": 4}]
    for is_first in (True, False):
        state = TrainerState(global_step=4, is_world_process_zero=is_first, log_history=history)
        Reporter().on_save(args, state, None)
    (figures, handed_over), (other, nothing) = reported
    assert figures == other == {"loss": 2.0, "eval_loss": 1.5, "step": 4}
    assert handed_over.path == str(tmp_path / "checkpoint-4")
    assert nothing is None


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def test_a_target_learns_from_scratch_and_goes_on_where_it_was(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {
        "tokenizer": resolve_model(TARGET),
        "architecture": {
            "num_layers": 1,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
        "data": {"domain": "generic", "dataset_name": str(questions), "learn_all": True}
        | {"columns": {"prompt": "question", "response": "answer"}},
        "training": {
            "output_dir": str(tmp_path / "target"),
            "num_train_steps": 30,
            "per_device_batch_size": 4,
            "sequence_length": 64,
            "learning_rate": 0.01,
            "num_warmup_steps": 2,
            "validate_every": 10,
            "num_validation_blocks": 2,
            "num_workers": 0,
            "precision": "float32",
        },
    }
    assert run(train_target, values, tmp_path) == 0
    result = json.loads((tmp_path / "target" / "run.json").read_text())["result"]
    assert result["validation"]["loss"] < 7  # the logarithm of 4,096 tokens is 8.3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "target" / "best", dtype=torch.float32)
    assert model.generation_config.eos_token_id == [4, 0]
    assert run(train_target, values, tmp_path) == 2
    assert "holds a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.device=cuda", "the cluster has 0"),
        ("training.num_workers=99", "ask for 99 CPU"),
        ("training.parallelism=fsdp", "expected ddp on CPUs, got fsdp"),
        ("model.draft_model=/nowhere/at/all", "/nowhere/at/all: does not load"),
        ("model.num_layers=99", "model.num_layers: expected at most the model's 1, got 99"),
        ("data.dataset_name=/nowhere.jsonl", "/nowhere.jsonl does not load"),
        ("logging.use_wandb=true", "expected wandb to be installed"),
        ("data={domain: code, sources: {nonsense: 1.0}}", "data source nonsense: unknown"),
        ("data.fim_rate=0.5", "expected a tokenizer with marks"),
    ],
)
def test_what_cannot_work_is_one_line_before_any_work(
    values: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    values["distillation"] = {}
    assert run(train_draft, values, tmp_path, "--set", change) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert not (tmp_path / "draft" / "config.json").exists()


@contextmanager
def own_head(log: Path) -> Iterator[str]:
    """A Ray that shares no port with others on this machine, as jobs are taken by an agent at a fixed one; its dashboard."""
    ports = {"port": 0, "dashboard-port": free_port(), "dashboard-agent-listen-port": free_port(), "num-cpus": 2}
    options = [f"--{name}={value}" for name, value in ports.items()]
    with tempfile.TemporaryDirectory(prefix="ray") as folder, log.open("wb") as file:
        command = [RAY, "start", "--head", "--block", f"--temp-dir={folder}", "--object-store-memory=100000000", *options]
        with subprocess.Popen(command, stdout=file, stderr=file) as process:
            try:
                yield f"http://127.0.0.1:{ports['dashboard-port']}"
            finally:
                process.terminate()


def submit(dashboard: str, job: list[str], timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Submits a job with the repository as its working directory, as soon as the cluster takes jobs; waits for its end."""
    command = [RAY, "job", "submit", "--address", dashboard, "--working-dir", ".", "--", *job]
    give_up_at = time.monotonic() + timeout_s
    while True:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        is_up = "No available agent" not in result.stderr and "Failed to connect" not in result.stderr
        if is_up or time.monotonic() > give_up_at:
            return result
        time.sleep(1)


def test_it_runs_as_a_submitted_job_that_the_dashboard_shows(questions: Path, tmp_path: Path) -> None:
    changes = {
        "data.sources": "{}",
        "data.dataset_name": questions,
        "data.columns": "{prompt: question, response: answer}",
        "model.draft_model": DRAFT,
        "model.target_model": TARGET,
        "training.output_dir": tmp_path / "submitted",
        "training.num_train_steps": 2,
        "training.per_device_batch_size": 2,
        "training.sequence_length": 48,
        "training.validate_every": 2,
        "training.log_every": 1,
        "training.resources_per_worker": "{CPU: 1}",
        "distillation.completions.num_prompts": 8,
        "distillation.completions.max_new_tokens": 8,
    }
    sets = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    job = [sys.executable, "-m", "jobs.train_draft", "--config", "configs/tiny/distill_code.yaml", *sets]
    with own_head(tmp_path / "head.txt") as dashboard:
        result = submit(dashboard, job)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
        token = Path("~/.ray/auth_token").expanduser().read_text().strip()
        shown = httpx.get(f"{dashboard}/api/train/v2/runs/v1", headers={"Authorization": f"Bearer {token}"}, timeout=60)
    assert "step 2 of 2" in result.stdout
    assert "best checkpoint at step 2" in result.stdout
    assert (tmp_path / "submitted" / "best" / "model.safetensors").exists()
    assert shown.status_code == 200, shown.text
    assert [run["status"] for run in shown.json()["train_runs"]] == ["FINISHED"]


def test_a_training_that_fails_is_one_line_and_can_go_on(
    values: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    values["training"]["output_dir"] = "draft"  # as users write it: seen from where they are
    values["training"] |= {"num_workers": 1, "max_failures": 0}
    values["distillation"] = {}
    blocked = tmp_path / "draft" / "trainer"  # a file where a folder should be, as good as a full disk
    blocked.parent.mkdir()
    blocked.write_text("")
    assert run(train_draft, values, tmp_path) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: training failed: ")
    assert "--resume goes on" in error
    blocked.unlink()
    assert run(train_draft, values, tmp_path, "--resume") == 0
