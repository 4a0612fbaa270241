"""What served requests came to, as records to learn from: off unless the configuration names a folder.

A line for each draft that guessed in a generation. The prompt's words are written down only if the configuration says so.
"""

import json
import logging
import os
import secrets
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

from serve.forecaster import Subject
from specdecode.decoding.metrics import DecodingMetrics, Verdicts
from specdecode.decoding.sequence import Route
from specdecode.routing.collection import as_record
from specdecode.routing.records import NONE, Record

logger = logging.getLogger("ray.serve")


class Recorder:
    """Appends to a file of its own, on a thread of its own: a disk that is full or slow holds no request up.

    Args:
        folder: where to.
        keeps_prompts: whether to write down what was asked.
    """

    def __init__(self, folder: str, *, keeps_prompts: bool) -> None:
        self._path = Path(folder) / f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
        self._keeps_prompts = keeps_prompts
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="recorder")
        self._is_failing = False

    def add(self, subject: Subject, route: Route, metrics: DecodingMetrics, request_id: str) -> None:
        """Takes what a generation came to."""
        if metrics.num_generated == 0:
            return
        text = subject.text if self._keeps_prompts else ""
        record = Record(request_id, "served", text, subject.is_chat, subject.num_tokens, NONE, mode="served")
        records = [as_record(record, metrics, route.k, arm) for arm in metrics.verdicts or [NONE]]
        self._thread.submit(self._write, [json.dumps(asdict(one), ensure_ascii=False) for one in records])

    def add_score(self, subject: Subject, draft: str, verdicts: Verdicts, request_id: str) -> None:
        """Takes how a draft would have done that had nothing to do with a generation."""
        text = subject.text if self._keeps_prompts else ""
        record = Record(request_id, "served", text, subject.is_chat, subject.num_tokens, draft, mode="scored")
        num_verdicts = verdicts.num_accepted + verdicts.num_rejected
        record = replace(record, acceptance=verdicts.acceptance, num_verdicts=num_verdicts)
        self._thread.submit(self._write, [json.dumps(asdict(record), ensure_ascii=False)])

    def _write(self, lines: list[str]) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))
            self._is_failing = False
        except OSError as error:
            if not self._is_failing:  # once, and not for each request
                logger.error("records of requests are lost: %s cannot be written: %s", self._path, error)
            self._is_failing = True
