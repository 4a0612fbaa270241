"""Keeps an application busy and breaks it now and then: `python -m jobs.soak --config configs/tiny/soak.yaml`.

Clients ask all the time, some leave in the middle, and every minute a replica is killed. A table says what became of the
requests, what was leaked, and by how much the processes have grown; the exit status is 1 if it is more than nothing.
"""

import asyncio
import logging
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from pydantic import Field
from rich.table import Table

from jobs.bench import Bench, Incident, LoadConfig, known_questions, open_bench, recorded, running
from jobs.command import Verdict, as_text, run_job
from jobs.faults import FAULTS
from jobs.load import Attempt, Records
from jobs.observation import Leaks, attempt, resident_bytes, wait_for_leaks
from serve.config import ServeConfig
from specdecode.config import StrictModel

logger = logging.getLogger("jobs.soak")

_KILLS = ("draft killed", "target killed", "decoder killed", "router killed")


class SoakConfig(StrictModel):
    """How long, and how hard."""

    application: ServeConfig
    load: LoadConfig = LoadConfig(concurrency=8)
    num_minutes: float = Field(default=30.0, gt=0)
    leave_rate: float = Field(default=0.1, ge=0, le=1, description="the share of the streams that their client leaves")
    kill_every_s: float = Field(default=60.0, gt=0, description="from one killed replica to the next")
    sample_every_s: float = Field(default=5.0, gt=0, description="how often memory is measured")
    settle_s: float = Field(default=60.0, ge=0, description="the age at which a process has all that it needs")
    warm_up_s: float = Field(default=300.0, ge=0, description="the time after which a role must not grow any more")
    window_s: float = Field(default=60.0, gt=0, description="over how long a role's memory is averaged, then and at the end")
    max_growth: float = Field(default=0.05, ge=0, description="the share by which a process or a role may grow")
    recovery_timeout_s: float = Field(default=120.0, gt=0, description="what takes longer has not recovered")
    leak_timeout_s: float = Field(default=30.0, gt=0, description="how long what is left may take to go away")
    output: str = Field(default="results/soak.jsonl", description="a file with a line for each request, kill and sample")


@dataclass(frozen=True)
class Sample:
    """The resident memory of a process at a time.

    Attributes:
        at_s: since the load began.
        role: the deployment, or Decoder.
        pid: the process.
        num_bytes: its memory.
    """

    at_s: float
    role: str
    pid: int
    num_bytes: int


@dataclass
class Course:
    """All that a soak has seen."""

    attempts: list[Attempt] = field(default_factory=list)
    incidents: list[Incident] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    leaks: Leaks = field(default_factory=Leaks)
    elapsed_s: float = 0.0


@dataclass(frozen=True)
class Growth:
    """How a role's memory has changed.

    Attributes:
        role: the deployment.
        num_processes: how many processes were old enough to tell.
        first_bytes, last_bytes: of a process on average, after the warm-up and at the end; 0 if there is no telling.
        of_role: from the one to the other, as a share.
        of_process: the most that one process has grown since it had settled, as a share.
    """

    role: str
    num_processes: int
    first_bytes: float
    last_bytes: float
    of_role: float
    of_process: float


def main(arguments: list[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    return run_job("soak", "Keep an application busy, and break it now and then.", SoakConfig, _run, arguments)


def _run(config: SoakConfig) -> Verdict:
    course = run_soak(config)
    growths = measure_growth(course.samples, config)
    return Verdict(describe(course, growths), is_good(course, growths, config))


def run_soak(config: SoakConfig) -> Course:
    """Deploys the application, and keeps it busy for as long as configured."""
    questions = known_questions(config.application, config.load.num_each)
    course = Course()
    with recorded(config.output) as records, running(config.application) as application:

        def record(attempt: Attempt) -> None:
            course.attempts.append(attempt)
            records.add("request", attempt)

        async def soak() -> None:
            bench = await open_bench(application, questions, config.load, record, leave_rate=config.leave_rate)
            started = time.monotonic()
            bench.load.begin()
            watching = asyncio.create_task(_watch(bench, course, records, config, started))
            await _keep_killing(bench, course, records, config, started + 60 * config.num_minutes)
            watching.cancel()
            await bench.load.pause()
            course.leaks = await asyncio.to_thread(wait_for_leaks, application, config.leak_timeout_s)
            course.elapsed_s = time.monotonic() - started
            await bench.load.end()

        asyncio.run(soak())
    return course


async def _keep_killing(bench: Bench, course: Course, records: Records, config: SoakConfig, end: float) -> None:
    """Kills a replica every now and then, and sees that another one takes its place, and leaves the end in peace."""
    next_at = time.monotonic() + config.kill_every_s
    while next_at < end - config.kill_every_s / 2:
        await asyncio.sleep(max(0.0, next_at - time.monotonic()))
        next_at += config.kill_every_s
        incident = Incident(len(course.incidents), str(bench.rng.choice(_KILLS)))
        await FAULTS[incident.fault](bench, incident)
        if await bench.until_well(config.recovery_timeout_s):
            incident.recovery_s = time.time() - incident.struck
        else:
            incident.notes.append(f"not recovered after {config.recovery_timeout_s:g} s")
        bench.load.recover()
        course.incidents.append(incident)
        records.add("fault", incident)
        logger.info("%.0f s to the end: %s", end - time.monotonic(), incident)
    await asyncio.sleep(max(0.0, end - time.monotonic()))


async def _watch(bench: Bench, course: Course, records: Records, config: SoakConfig, started: float) -> None:
    """Measures the memory of all replicas and decoders, for ever."""
    while True:
        pids = await asyncio.to_thread(attempt, bench.application.pids) or {}
        view = await asyncio.to_thread(attempt, bench.application.view)
        decoders = {"Decoder": [target.decoder_pid for target in view.targets]} if view else {}
        for role, found in (pids | decoders).items():
            for pid in found:
                sample = Sample(time.monotonic() - started, role, pid, resident_bytes(pid))
                course.samples.append(sample)
                records.add("sample", sample)
        await asyncio.sleep(config.sample_every_s)


def measure_growth(samples: Iterable[Sample], config: SoakConfig) -> list[Growth]:
    """Compares each process with itself when it had settled, and each role after the warm-up with its end."""
    by_process: dict[tuple[str, int], list[Sample]] = {}
    for sample in samples:
        if sample.num_bytes:
            by_process.setdefault((sample.role, sample.pid), []).append(sample)
    settled = {
        key: [sample for sample in series if sample.at_s >= series[0].at_s + config.settle_s]
        for key, series in by_process.items()
    }
    end_s = max((series[-1].at_s for series in by_process.values()), default=0.0)
    growths = []
    for role in sorted({role for role, _ in by_process}):
        own = [series for (name, _), series in settled.items() if name == role and series]
        first = _mean(own, config.warm_up_s, config.warm_up_s + config.window_s)
        last = _mean(own, end_s - config.window_s, end_s)
        of_process = max((series[-1].num_bytes / series[0].num_bytes - 1 for series in own), default=0.0)
        growths.append(Growth(role, len(own), first, last, last / first - 1 if first and last else 0.0, of_process))
    return growths


def _mean(processes: list[list[Sample]], start_s: float, end_s: float) -> float:
    """What a process holds on average between two times; 0 if there was none."""
    values = [sample.num_bytes for series in processes for sample in series if start_s <= sample.at_s <= end_s]
    return statistics.mean(values) if values else 0.0


def is_good(course: Course, growths: list[Growth], config: SoakConfig) -> bool:
    """Whether no request failed or was answered wrongly, nothing is left, and nothing has grown."""
    outcomes = Counter(attempt.outcome for attempt in course.attempts)
    is_flat = all(max(growth.of_role, growth.of_process) <= config.max_growth for growth in growths)
    is_mended = all(incident.recovery_s is not None for incident in course.incidents)
    return not outcomes["failed"] and not outcomes["wrong"] and course.leaks.is_clean and is_flat and is_mended


def describe(course: Course, growths: list[Growth]) -> str:
    """The tables: requests, kills, memory."""
    outcomes = Counter(attempt.outcome for attempt in course.attempts)
    kills = Counter(incident.fault for incident in course.incidents)
    recovery_s = [incident.recovery_s for incident in course.incidents if incident.recovery_s is not None]
    requests = Table(title=f"{len(course.attempts)} requests in {course.elapsed_s / 60:.1f} minutes", box=None)
    for heading in ("right", "failed", "wrong", "left", "cut", "refused", "leases leaked", "rows leaked"):
        requests.add_column(heading, justify="right")
    counts = (outcomes[name] for name in ("right", "failed", "wrong", "left", "cut", "refused"))
    requests.add_row(*map(str, counts), str(course.leaks.num_leases), str(course.leaks.num_rows))
    faults = Table(title=f"{len(course.incidents)} kills", box=None)
    for heading in (*_KILLS, "recovery s", "at most"):
        faults.add_column(heading, justify="right")
    recovery = (f"{statistics.median(recovery_s):.2f}", f"{max(recovery_s):.2f}") if recovery_s else ("", "")
    faults.add_row(*(str(kills[name]) for name in _KILLS), *recovery)
    memory = Table(title="resident memory of a process, settled", box=None)
    for heading in ("role", "processes", "MB after the warm-up", "MB at the end", "growth of the role", "of a process at most"):
        memory.add_column(heading, justify="left" if heading == "role" else "right")
    for growth in growths:
        levels = (f"{level / 1e6:.1f}" if level else "" for level in (growth.first_bytes, growth.last_bytes))
        of_role = f"{growth.of_role:+.1%}" if growth.first_bytes and growth.last_bytes else ""
        memory.add_row(growth.role, str(growth.num_processes), *levels, of_role, f"{growth.of_process:+.1%}")
    notes = [f"{incident.fault}: {note}" for incident in course.incidents for note in incident.notes]
    notes += [f"{a.form}: {a.detail}" for a in course.attempts if a.outcome in ("failed", "wrong")][:20]
    return as_text(requests, faults, memory) + "\n".join([*notes, *course.leaks.faults])


if __name__ == "__main__":
    sys.exit(main())
