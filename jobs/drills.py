"""Breaks a running application in many ways, under load: `python -m jobs.drills --config configs/tiny/drills.yaml`.

A table says for each kind of fault what became of the requests that met it, how long it took until all was as before, and what
was leaked; the exit status is 1 if any request failed or had a wrong answer, or anything leaked or did not recover.
"""

import asyncio
import logging
import statistics
import sys
import time
from dataclasses import dataclass

from pydantic import Field, field_validator
from rich.table import Table

from jobs.bench import Bench, Incident, LoadConfig, known_questions, open_bench, recorded, running
from jobs.command import Verdict, as_text, run_job
from jobs.faults import FAULTS
from jobs.load import Attempt
from jobs.observation import wait_for_leaks
from serve.config import ServeConfig
from specdecode.config import StrictModel

logger = logging.getLogger("jobs.drills")

_NO_FAULT = "(between them)"
_LEAVING = "client leaves"
_MIN_WAIT_S, _MAX_WAIT_S = 0.3, 1.5  # from all clients asking to the fault


class DrillsConfig(StrictModel):
    """What is broken, and how often."""

    application: ServeConfig
    load: LoadConfig = LoadConfig(concurrency=16)
    faults: list[str] = Field(default=list(FAULTS), min_length=1, description="all of them if unset")
    num_times: int = Field(default=5, gt=0, description="how often each happens")
    burst: int = Field(default=100, gt=0, description="how many requests come at once where there are too many")
    recovery_timeout_s: float = Field(default=120.0, gt=0, description="what takes longer has not recovered")
    leak_timeout_s: float = Field(default=20.0, gt=0, description="how long what is left may take to go away")
    max_leave_s: float = Field(
        default=0.1, gt=0, description="how long a target may go on for a client that has left; the median counts"
    )
    output: str = Field(default="results/drills.jsonl", description="a file with a line for each request and each fault")

    @field_validator("faults")
    @classmethod
    def _check_faults(cls, faults: list[str]) -> list[str]:
        for fault in faults:
            if fault not in FAULTS:
                raise ValueError(f"expected some of {', '.join(FAULTS)}, got {fault!r}")
        return faults


@dataclass(frozen=True)
class Row:
    """What a kind of fault has done, all times together."""

    fault: str
    num_times: int
    num_running: float
    num_requests: int
    num_failed: int
    num_wrong: int
    num_cut: int
    recovery_s: list[float]
    num_leases: int
    num_rows: int
    notes: list[str]

    @property
    def is_good(self) -> bool:
        """Whether it has cost time only."""
        return not (self.num_failed or self.num_wrong or self.num_leases or self.num_rows or self.notes)


def main(arguments: list[str] | None = None) -> int:
    """Runs the job and returns its exit status."""
    return run_job("drills", "Break a running application in many ways, under load.", DrillsConfig, _run, arguments)


def _run(config: DrillsConfig) -> Verdict:
    started = time.monotonic()
    attempts, incidents = run_drills(config)
    rows = summarise(attempts, incidents, config.max_leave_s)
    return Verdict(describe(rows, time.monotonic() - started), all(row.is_good for row in rows))


def run_drills(config: DrillsConfig) -> tuple[list[Attempt], list[Incident]]:
    """Deploys the application, and breaks it again and again; returns all requests and all faults."""
    questions = known_questions(config.application, config.load.num_each)
    attempts: list[Attempt] = []
    incidents: list[Incident] = []
    with recorded(config.output) as records, running(config.application) as application:

        def record(attempt: Attempt) -> None:
            attempts.append(attempt)
            records.add("request", attempt)

        async def drill() -> None:
            bench = await open_bench(application, questions, config.load, record, config.burst)
            faults = bench.rng.permutation([fault for fault in config.faults for _ in range(config.num_times)]).tolist()
            for number, fault in enumerate(faults):
                incident = Incident(number, fault)
                await meet(bench, incident, config)
                incidents.append(incident)
                records.add("fault", incident)
                logger.info("%d of %d: %s", number + 1, len(faults), incident)
            await bench.load.end()

        asyncio.run(drill())
    return attempts, incidents


async def meet(bench: Bench, incident: Incident, config: DrillsConfig) -> None:
    """Has a fault happen under load, waits until it is mended, and looks for what is left of it when nobody asks any more."""
    bench.load.begin()
    while len(bench.load.running) < config.load.concurrency:
        await asyncio.sleep(0.01)
    await asyncio.sleep(float(bench.rng.uniform(_MIN_WAIT_S, _MAX_WAIT_S)))
    try:
        await FAULTS[incident.fault](bench, incident)
    except Exception as error:  # the others are to be drilled all the same
        logger.exception("%s could not be done", incident.fault)
        incident.notes.append(f"could not be done: {error!r}")
    is_mended = await bench.until_well(config.recovery_timeout_s)
    if not is_mended:
        incident.notes.append(f"not recovered after {config.recovery_timeout_s:g} s")
    elif incident.recovery_s is None:
        incident.recovery_s = time.time() - incident.struck
    bench.load.recover()
    await bench.load.pause()
    leaks = await asyncio.to_thread(wait_for_leaks, bench.application, config.leak_timeout_s)
    incident.num_leases, incident.num_rows = leaks.num_leases, leaks.num_rows
    incident.notes += leaks.faults


def summarise(attempts: list[Attempt], incidents: list[Incident], max_leave_s: float) -> list[Row]:
    """One row for each kind of fault, in the order of `FAULTS`, and one for the requests that met none."""
    rows = []
    for fault in [*FAULTS, _NO_FAULT]:
        own = [incident for incident in incidents if incident.fault == fault]
        if not own and fault != _NO_FAULT:
            continue
        numbers = {incident.number for incident in own}
        met = [a for a in attempts if (numbers.intersection(a.faults) if own else not a.faults)]
        notes = [note for incident in own for note in incident.notes]
        recovery_s = [incident.recovery_s for incident in own if incident.recovery_s is not None]
        if fault == _LEAVING and recovery_s and statistics.median(recovery_s) > max_leave_s:
            notes.append(f"the median is more than {max_leave_s:g} s")
        rows.append(
            Row(
                fault,
                len(own),
                statistics.median(incident.num_running for incident in own) if own else 0,
                len(met),
                sum(attempt.outcome == "failed" for attempt in met),
                sum(attempt.outcome == "wrong" for attempt in met),
                sum(attempt.outcome == "cut" for attempt in met),
                recovery_s,
                sum(incident.num_leases for incident in own),
                sum(incident.num_rows for incident in own),
                notes,
            )
        )
    return rows


def describe(rows: list[Row], elapsed_s: float) -> str:
    """The table, and below it what there is to say of single faults."""
    table = Table(title=f"{sum(row.num_times for row in rows)} faults in {elapsed_s / 60:.1f} minutes", box=None)
    table.add_column("fault", no_wrap=True)
    headings = ("times", "in flight", "requests", "failed", "wrong", "cut", "recovery s", "at most", "leases", "rows leaked")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        recovery = (f"{statistics.median(row.recovery_s):.2f}", f"{max(row.recovery_s):.2f}") if row.recovery_s else ("", "")
        counts = (row.num_requests, row.num_failed, row.num_wrong, row.num_cut)
        table.add_row(
            row.fault,
            str(row.num_times),
            f"{row.num_running:g}",
            *map(str, counts),
            *recovery,
            str(row.num_leases),
            str(row.num_rows),
        )
    notes = [f"{row.fault}: {note}" for row in rows for note in row.notes]
    return as_text(table) + "\n".join(notes)


if __name__ == "__main__":
    sys.exit(main())
