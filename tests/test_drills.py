"""The drills break what they say they break, count what they say they count, and find an application that only gets slower."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import pytest
import yaml

from jobs.bench import Incident
from jobs.drills import DrillsConfig, describe, summarise
from jobs.faults import FAULTS
from jobs.interference import TROUBLES, Proxy, Trouble
from jobs.load import Attempt, Load, Outcome
from jobs.observation import Leaks, View
from jobs.requests import Answer, Form, Question
from jobs.soak import Course, Sample, SoakConfig, is_good, measure_growth
from serve.draft import DraftState
from serve.target import TargetState
from serve.worker import EngineThread
from specdecode.backends.table import TableModel, random_table
from specdecode.config import load_config
from specdecode.decoding.drafters import ModelDrafter, NoDrafter
from specdecode.decoding.engine import Engine
from specdecode.decoding.sequence import Route, SamplingParams, Sequence
from specdecode.exchange.channel import TcpChannel
from specdecode.exchange.listener import Listener
from specdecode.exchange.messages import ModelTokens
from specdecode.exchange.remote import RemoteDrafter
from specdecode.exchange.scheduler import DraftScheduler

ROOT = Path(__file__).parents[1]
T = TypeVar("T")
MODEL = TableModel(random_table(13, 1))
DEADLINE_S = 0.5


class Line:
    """A drafter that is connected to a draft through the drills' proxy."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._listener = Listener(DraftScheduler(lambda _: ModelDrafter(MODEL)))
        self._proxy = Proxy()
        self._leases: list[Future[Any]] = []
        self.drafter = RemoteDrafter("draft", MODEL.vocab_size, deadline_s=DEADLINE_S)

    def connect(self) -> None:
        """Takes a lease, and connects."""
        key: Future[bytes] = Future()

        async def hold() -> None:
            async with self._listener.admit() as ticket:
                key.set_result(ticket.key)
                await asyncio.wrap_future(ticket.ended)

        host, port = self._listener.listen("127.0.0.1")
        near = self._run(self._proxy.open(host, port)).result()
        self._leases.append(self._run(hold()))
        tokens = ModelTokens.of(MODEL)
        self.drafter.connect(TcpChannel.connect((host, near), key.result(5), tokens, timeout_s=5))

    def interfere(self, trouble: Trouble) -> "Future[bool]":
        """Does that to the next frame."""
        asked = self._run(self._proxy.interfere(trouble, 1.5 * DEADLINE_S, 5.0))
        self._run(asyncio.sleep(0)).result()  # the order stands before anything is sent
        return asked

    def wait_until_ended(self) -> None:
        """Waits until no session is left."""
        for lease in self._leases:
            lease.result(10)
        assert self._listener.num_sessions == 0

    def close(self) -> None:
        """Ends all of it."""
        self.drafter.disconnect()
        self.wait_until_ended()
        self._listener.close()
        self._run(self._wind_up()).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _wind_up(self) -> None:
        self._proxy.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait_for(asyncio.gather(*others), 5)

    def _run(self, coroutine: Any) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)


@pytest.fixture
def line() -> Iterator[Line]:
    line = Line()
    yield line
    line.close()


def sequence() -> Sequence:
    return Sequence([1, 2, 3], SamplingParams(max_tokens=50, ignore_eos=True), Route("draft", 4))


CAUSES: dict[Trouble, str | None] = {
    "delay reply": "late",
    "lose request": "late",
    "lose reply": "late",
    "repeat request": None,
    "repeat reply": None,
    "garble reply": "garbled",
    "change version": "refused",
    "withhold replies": "late",
    "reset in mid-frame": "gone",
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_trouble_with_a_frame_is_noticed_for_what_it_is_and_leaves_nothing(line: Line, trouble: Trouble) -> None:
    line.connect()
    expected = line.drafter.propose([sequence()])[0].tokens
    assert len(expected) == 4
    asked = line.interfere(trouble)
    [draft] = line.drafter.propose([sequence()])
    assert asked.result(5)
    cause = CAUSES[trouble]
    assert draft.tokens == ([] if cause else expected)
    assert dict(line.drafter.metrics.num_fallbacks) == ({cause: 1} if cause else {})
    if cause:
        line.wait_until_ended()
        line.connect()
    for _ in range(3):
        assert line.drafter.propose([sequence()])[0].tokens == expected


def test_trouble_that_meets_no_frame_is_reported_and_forgotten(line: Line) -> None:
    line.connect()
    asked = asyncio.run_coroutine_threadsafe(line._proxy.interfere("lose reply", 0.0, 0.05), line._loop)
    assert asked.result(5) is False
    assert line.drafter.propose([sequence()])[0].tokens


def question(answer: Answer, *, depends_on_drafts: bool = False) -> Question:
    return Question(Form("form", "draft", {}), "/v1/completions", {}, [answer], depends_on_drafts)


def test_an_answer_that_differs_is_wrong() -> None:
    right = Answer("abc", "stop", [-1.0, -2.0])
    assert question(right).difference([right]) is None
    assert question(right).difference([Answer("abc", "stop", [-1.0, -2.0 + 1e-5])]) is None
    for wrong in (
        Answer("abd", "stop", [-1.0, -2.0]),
        Answer("abc", "length", [-1.0, -2.0]),
        Answer("abc", "stop", [-1.0, -2.1]),
        Answer("abc", "stop", [-1.0]),
    ):
        assert question(right).difference([wrong])


def test_a_seeded_answer_is_compared_until_a_round_had_another_draft() -> None:
    right = Answer("abcdef", "length", rounds=[(2, "ab"), (2, "abcd"), (2, "abcdef")])
    asked = question(right, depends_on_drafts=True)
    assert asked.difference([right]) is None
    assert asked.difference([Answer("abxyz", "length", rounds=[(2, "ab"), (0, "abx"), (2, "abxyz")])]) is None
    assert asked.difference([Answer("axxyz", "length", rounds=[(2, "ax"), (0, "axx"), (2, "axxyz")])])
    assert asked.difference([Answer("abcdxx", "length", rounds=[(2, "ab"), (2, "abcd"), (2, "abcdxx")])])
    assert asked.difference([Answer("abcd", "stop", rounds=[(2, "ab"), (2, "abcd")])])


def http(status: str, body: str, *headers: str, length: int | None = None) -> bytes:
    """An HTTP answer; one of another length than its body is cut off."""
    fields = [f"HTTP/1.1 {status}", "Connection: close", f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join([*fields, "", body]).encode()


EVENT = {
    "choices": [{"index": 0, "text": "abc", "finish_reason": "stop"}],
    "speculative_decoding": {"num_draft_tokens": 3, "K": 4},
}
STREAM = f"data: {json.dumps(EVENT)}\n\ndata: [DONE]\n\n"
RIGHT = http("200 OK", STREAM)
REFUSED = http("429 Too Many Requests", "{}", "Retry-After: 1")
CUT_OFF = http("200 OK", STREAM[:30], length=1000)
OF_PROXY = http("500 Internal Server Error", "Internal Server Error")
OF_ROUTER = http("503 Service Unavailable", '{"error": {}}')
STREAMED = Question(Form("form", "draft", {}), "/v1/completions", {"stream": True}, [Answer("abc", "stop")], False)


def ask(*script: bytes, is_cutting: bool = False, **options: Any) -> list[Attempt]:
    """Asks a server whose answers, one for each connection, are known; returns all that was recorded."""
    answers, recorded = iter(script), list[Attempt]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        [length] = [int(line.split(b":")[1]) for line in head.lower().splitlines() if line.startswith(b"content-length")]
        await reader.readexactly(length)
        writer.write(next(answers))
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    async def run() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        load = Load(url, [STREAMED], 1, 0, recorded.append)
        load.strike(7, cuts=is_cutting)
        await load.ask(STREAMED, **options)
        assert not load.running
        await load.end()
        server.close()
        await server.wait_closed()

    asyncio.run(run())
    assert all(attempt.faults == [7] and attempt.ended >= attempt.started for attempt in recorded)
    return recorded


@pytest.mark.parametrize(
    ("script", "is_cutting", "outcomes"),
    [
        ([RIGHT], False, ["right"]),
        ([RIGHT.replace(b"abc", b"abd")], False, ["wrong"]),
        ([REFUSED, RIGHT], False, ["refused", "right"]),
        ([http("429 Too Many Requests", "{}")], False, ["failed"]),
        ([CUT_OFF], False, ["failed"]),
        ([CUT_OFF, RIGHT], True, ["cut", "right"]),
        ([OF_PROXY], False, ["failed"]),
        ([OF_PROXY, RIGHT], True, ["cut", "right"]),
        ([OF_ROUTER], True, ["failed"]),
        ([http("200 OK", STREAM[:-16])], True, ["failed"]),
    ],
)
def test_what_became_of_a_request(script: list[bytes], is_cutting: bool, outcomes: list[Outcome]) -> None:
    recorded = ask(*script, is_cutting=is_cutting)
    assert [attempt.outcome for attempt in recorded] == outcomes
    if outcomes[-1] == "right":
        assert (recorded[-1].num_drafted, recorded[-1].k) == (3, 4)


def test_a_client_may_leave_or_read_slowly() -> None:
    assert [attempt.outcome for attempt in ask(RIGHT, leave_after=1)] == ["left"]
    [slow] = ask(RIGHT, slow_s=0.3)
    assert slow.outcome == "right"
    assert slow.ended - slow.started >= 0.3
    assert [attempt.outcome for attempt in ask(CUT_OFF, slow_s=0.1)] == ["failed"]


def attempts(*outcomes: Outcome, faults: list[int]) -> list[Attempt]:
    return [Attempt("id", "form", 0.0, faults=list(faults), outcome=outcome) for outcome in outcomes]


def test_each_fault_answers_for_the_requests_that_met_it() -> None:
    killed = [Incident(0, "draft killed", num_running=4, recovery_s=1.0), Incident(2, "draft killed", recovery_s=3.0)]
    garbage = Incident(1, "garbage", recovery_s=0.5, num_leases=1)
    met = [
        *attempts("right", "wrong", faults=[0]),
        *attempts("failed", faults=[2, 1]),
        *attempts("cut", faults=[1]),
        *attempts("failed", "failed", faults=[]),
    ]
    rows = {row.fault: row for row in summarise(met, [killed[0], garbage, killed[1]], 0.1)}
    first, second, rest = rows["draft killed"], rows["garbage"], rows["(between them)"]
    assert (first.num_times, first.num_running, first.num_requests) == (2, 2.0, 3)
    assert (first.num_failed, first.num_wrong, first.num_cut, first.recovery_s) == (1, 1, 0, [1.0, 3.0])
    assert (second.num_failed, second.num_wrong, second.num_cut, second.num_leases) == (1, 0, 1, 1)
    assert (rest.num_failed, rest.num_requests) == (2, 2)
    assert not any(row.is_good for row in rows.values())
    assert "draft killed" in describe(list(rows.values()), 60.0)


@pytest.mark.parametrize(
    ("incident", "met", "is_expected"),
    [
        (Incident(0, "router killed", recovery_s=1.0), attempts("right", "cut", "refused", "left", faults=[0]), True),
        (Incident(0, "garbage", recovery_s=1.0), attempts("right", "wrong", faults=[0]), False),
        (Incident(0, "garbage", recovery_s=1.0), attempts("failed", faults=[0]), False),
        (Incident(0, "garbage", recovery_s=1.0, num_rows=1), [], False),
        (Incident(0, "garbage", recovery_s=1.0, num_leases=1), [], False),
        (Incident(0, "garbage", notes=["not recovered"]), [], False),
        (Incident(0, "client leaves", recovery_s=0.09), [], True),
        (Incident(0, "client leaves", recovery_s=0.11), [], False),
    ],
)
def test_a_fault_may_cost_time_only(incident: Incident, met: list[Attempt], is_expected: bool) -> None:
    assert summarise(met, [incident], max_leave_s=0.1)[0].is_good is is_expected


def target(**changes: Any) -> TargetState:
    values: dict[str, Any] = {
        "pid": 1,
        "decoder_pid": 2,
        "num_running": 0,
        "num_queued": 0,
        "num_streams": 0,
        "num_rows": 5,
        "num_rows_in_use": 0,
        "connected": {"code": True},
        "cache_fault": None,
    }
    return TargetState(**{**values, **changes})


def draft(**changes: Any) -> DraftState:
    values = {"pid": 2, "num_leases": 2, "num_sessions": 2, "num_sequences": 9, "num_pending": 0, "cache_fault": None}
    return DraftState(**{**values, **changes})


def test_what_is_held_beside_memos_and_one_lease_for_each_target_and_draft_is_leaked() -> None:
    def leaks(one: TargetState, *drafts: DraftState) -> Leaks:
        return View([one, target()], {"code": list(drafts)}).leaks()

    assert leaks(target(), draft()).is_clean
    assert leaks(target(), draft(num_leases=1, num_sessions=1), draft(num_leases=1, num_sessions=1)).is_clean
    assert leaks(target(), draft(num_leases=3, num_sessions=3)).num_leases == 1
    assert leaks(target(), draft(num_sessions=1)).num_leases == 1
    assert leaks(target(), draft(num_pending=1)).num_rows == 1
    for name in ("num_running", "num_queued", "num_streams", "num_rows_in_use"):
        assert leaks(target(**{name: 2}), draft()).num_rows == 2
    assert leaks(target(cache_fault="broken"), draft(cache_fault="worse")).faults == ["broken", "worse"]
    assert View([target()], {}).is_connected(["code"])
    assert not View([target(connected={"code": False})], {}).is_connected(["code"])
    assert not View([target()], {}).is_connected(["code", "chat"])


def test_an_engine_is_looked_at_between_two_rounds_and_does_not_mind_who_leaves() -> None:
    async def run() -> None:
        worker = EngineThread(Engine(MODEL, NoDrafter()))
        endless = Sequence([1], SamplingParams(max_tokens=10**6, ignore_eos=True))
        async with aclosing(worker.stream(endless)) as stream:
            while not await anext(stream):
                pass
            assert await worker.inspect(lambda engine: engine.running) == [endless]
            assert worker.num_streams == 1
            impatient = [asyncio.create_task(worker.inspect(lambda engine: engine.num_running)) for _ in range(20)]
            await asyncio.sleep(0)
            for task in impatient:
                task.cancel()
        assert await worker.inspect(lambda engine: engine.num_running + engine.num_queued) == 0
        assert worker.num_streams == 0
        with pytest.raises(ZeroDivisionError):
            await worker.inspect(lambda _: 1 / 0)
        worker.check()

    asyncio.run(run())


@pytest.fixture
def soak_config() -> SoakConfig:
    return load_config(ROOT / "configs/tiny/soak.yaml", SoakConfig, ["num_minutes=10"])


def series(pid: int, start_s: int, end_s: int, grow: float = 0.0, role: str = "Target") -> list[Sample]:
    """A process that takes its memory in its first minute, and grows by the share `grow` in each minute after that."""
    ages = range(0, end_s - start_s + 1, 5)
    return [
        Sample(start_s + age, role, pid, int(1e8 * min(1, (age + 1) / 60) * (1 + grow * max(0, age - 60) / 60))) for age in ages
    ]


def test_processes_that_come_and_go_and_stay_as_they_are_have_not_grown(soak_config: SoakConfig) -> None:
    samples = [*series(1, 0, 400), *series(2, 400, 600), *series(3, 0, 600), *series(4, 0, 30), *series(5, 560, 600)]
    [growth] = measure_growth(samples, soak_config)
    assert growth.num_processes == 3
    assert abs(growth.of_role) < 1e-3
    assert abs(growth.of_process) < 1e-3
    assert is_good(Course(), [growth], soak_config)


def test_a_process_that_grows_is_found_though_its_role_does_not_live_long(soak_config: SoakConfig) -> None:
    samples = [*series(1, 0, 300), *series(2, 300, 600, grow=0.03), *series(3, 0, 600, role="Router")]
    by_role = {growth.role: growth for growth in measure_growth(samples, soak_config)}
    assert by_role["Target"].of_process == pytest.approx(0.12, abs=0.01)
    assert by_role["Router"].of_process == pytest.approx(0, abs=1e-3)
    assert not is_good(Course(), list(by_role.values()), soak_config)


def test_a_soak_is_not_good_with_a_failure_a_wrong_answer_a_leak_or_a_loss(soak_config: SoakConfig) -> None:
    assert is_good(Course(attempts("right", "left", "cut", faults=[])), [], soak_config)
    for course in (
        Course(attempts("failed", faults=[])),
        Course(attempts("wrong", faults=[])),
        Course(leaks=Leaks(num_leases=1)),
        Course(leaks=Leaks(num_rows=1)),
        Course(incidents=[Incident(0, "draft killed")]),
    ):
        assert not is_good(course, [], soak_config)


def test_the_drills_of_the_file_are_all_there_are() -> None:
    config = load_config(ROOT / "configs/tiny/drills.yaml", DrillsConfig)
    assert (config.faults, config.num_times, config.load.concurrency) == (list(FAULTS), 5, 16)
    assert len(FAULTS) >= 12
    with pytest.raises(ValueError, match="faults: expected some of draft killed, "):
        load_config(ROOT / "configs/tiny/drills.yaml", DrillsConfig, ["faults=[flood]"])


def test_a_few_drills(tmp_path: Path) -> None:
    values = yaml.safe_load((ROOT / "configs/tiny/drills.yaml").read_text())
    values["load"] = {"concurrency": 8, "num_each": 1}
    faults = {"draft killed", "garbage"}
    values |= {"num_times": 1, "faults": sorted(faults), "output": str(tmp_path / "records.jsonl")}
    config = tmp_path / "drills.yaml"
    config.write_text(yaml.safe_dump(values))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "jobs.drills", "--config", str(config)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr[-4000:]
    assert "2 faults in " in run.stdout
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    incidents = [record for record in records if record["kind"] == "fault"]
    assert {incident["fault"] for incident in incidents} == faults
    assert all(incident["num_running"] == 8 and incident["recovery_s"] > 0 for incident in incidents)
    outcomes = Counter(record["outcome"] for record in records if record["kind"] == "request")
    assert outcomes.keys() == {"right"}
    assert outcomes["right"] > 30
