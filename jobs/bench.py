"""An application that runs on this machine, and the clients that ask it: what the drills and the soak break, and watch."""

from serve.local import Deployment, started  # isort: skip  # before all else that imports Ray

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from jobs.load import Attempt, Load, Records
from jobs.observation import HOST, PROXIES, Application, attempt
from jobs.requests import ENDLESS, PROBE, Library, Question, use_threads
from serve.config import DraftConfig, DraftModelConfig, ServeConfig
from specdecode.config import StrictModel

logger = logging.getLogger("jobs.bench")

_APPLICATION = "bench"
_START_TIMEOUT_S = 300.0


class LoadConfig(StrictModel):
    """Who asks what."""

    concurrency: int = Field(gt=0, description="how many clients there are, each of which always waits for an answer")
    num_each: int = Field(default=2, gt=0, description="how many requests there are of each kind")
    seed: int = Field(default=0, description="of all that is random")


@dataclass
class Incident:
    """One fault at one moment.

    Attributes:
        number: counts them.
        fault: its kind.
        struck: when it began, on the clock of `time.time`.
        num_running: requests that were under way then.
        recovery_s: until all was as before; None if that never came.
        num_leases, num_rows: what was leaked.
        notes: what went wrong besides.
    """

    number: int
    fault: str
    struck: float = 0.0
    num_running: int = 0
    recovery_s: float | None = None
    num_leases: int = 0
    num_rows: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass
class Bench:
    """What the faults are done to.

    Attributes:
        application: its configuration is what it should be now.
        load: the clients.
        probes: for each draft a question with a short answer, to see that it works.
        endless: a question with a long answer.
        deadline_s: how long a target waits for a draft.
        burst: how many requests come at once where there are too many.
        rng: chooses whom a fault hits.
        drafts: all that the application may have.
        overrides: deployments' options that differ from the configuration's.
        gone: processes that have been killed.
    """

    application: Application
    load: Load
    probes: dict[str, Question]
    endless: Question
    deadline_s: float
    burst: int
    rng: np.random.Generator
    drafts: dict[str, DraftConfig]
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)

    def strike(self, incident: Incident, *, cuts: bool = False) -> None:
        """Notes that it happens now; `cuts`: it ends connections of clients."""
        incident.struck, incident.num_running = time.time(), len(self.load.running)
        self.load.strike(incident.number, cuts=cuts)

    def choose(self, pids: list[int]) -> int:
        """One of them, at random."""
        return int(self.rng.choice(sorted(pids)))

    @property
    def removable(self) -> str:
        """The draft that the application may do without."""
        return [name for name, draft in self.drafts.items() if isinstance(draft, DraftModelConfig) and draft.is_deployed][-1]

    def other_k(self) -> int:
        """A k that requests do not get now."""
        k = self.overrides.get("Router", {}).get("user_config", {}).get("k", self.application.config.k)
        return int(k - 1 if k > 1 and k % 2 == 0 else k + 1)

    async def busy_drafts(self) -> dict[int, str]:
        """The draft replicas that work for a target, with their drafts' names."""
        view = await asyncio.to_thread(self.application.view)
        return {state.pid: name for name, states in view.drafts.items() for state in states if state.num_sessions}

    async def deploy(self, config: ServeConfig) -> None:
        """Changes the application while it runs, as `serve deploy` does; does not wait for it."""
        self.application.config = config
        await asyncio.to_thread(self.application.deploy, self.overrides)

    async def is_well(self) -> bool:
        """Whether every replica is there, every target has its drafts, and every draft is used for a right answer."""
        if not await asyncio.to_thread(attempt, self._is_complete):
            return False
        probes = [self.probes[name] for name in self.application.config.drafts]
        answers = await asyncio.gather(*(self.load.ask(probe) for probe in probes))
        return all(answer.outcome == "right" and answer.num_drafted > 0 for answer in answers)

    def _is_complete(self) -> bool:
        """Whether all replicas and leases are there."""
        if not self.application.has_all_replicas():
            return False
        pids = self.application.pids()
        if {name: len(found) for name, found in pids.items()} != self.application.num_replicas():
            return False
        view = self.application.view()
        seen = {target.pid for target in view.targets}
        return (
            not self.gone.intersection(pid for found in pids.values() for pid in found)
            and seen == set(pids["Target"])
            and view.is_connected(self.application.draft_names)
            and view.leaks().num_leases == 0
        )

    async def until_well(self, timeout_s: float) -> bool:
        """Waits for that; returns whether it came."""
        end = time.monotonic() + timeout_s
        while not await self.is_well():
            if time.monotonic() > end:
                return False
            await asyncio.sleep(0.05)
        return True


@contextmanager
def recorded(path: str) -> Iterator[Records]:
    """Records in a new file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("w", encoding="utf-8") as file:
        yield Records(file)


def known_questions(config: ServeConfig, num_each: int) -> list[Question]:
    """Questions to the application, with the answers of the library."""
    use_threads(1)
    started = time.monotonic()
    questions = Library(config).questions(num_each, config.k)
    logger.info("the library has answered %d questions in %.0f s", len(questions), time.monotonic() - started)
    return questions


@contextmanager
def running(config: ServeConfig) -> Iterator[Application]:
    """Runs the application on a local Ray, or on the cluster at RAY_ADDRESS."""
    application = Application(_APPLICATION, config, _free_port())
    deployment = Deployment(_APPLICATION, "/", config, HOST, application.port, PROXIES, {})
    with started(deployment, quiet=True):
        application.deploy({})
        yield application


async def open_bench(
    application: Application,
    questions: list[Question],
    load: LoadConfig,
    record: Callable[[Attempt], None],
    burst: int = 0,
    leave_rate: float = 0.0,
) -> Bench:
    """The bench for an application that has just been started; its clients do not ask yet."""
    [endless] = [question for question in questions if question.form.name == ENDLESS]
    probes = {question.form.draft: question for question in questions if question.form.name == PROBE}
    asked = [question for question in questions if question.form.name not in (ENDLESS, PROBE)]
    drafts = application.config.draft_models.values()
    bench = Bench(
        application=application,
        load=Load(application.url, asked, load.concurrency, load.seed, record, leave_rate),
        probes=probes,
        endless=endless,
        deadline_s=max(draft.deadline_s for draft in drafts),
        burst=burst,
        rng=np.random.default_rng(load.seed),
        drafts=application.config.drafts,
    )
    if not await bench.until_well(_START_TIMEOUT_S):
        raise TimeoutError(f"the application is not ready after {_START_TIMEOUT_S:g} s")
    return bench


def _free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
