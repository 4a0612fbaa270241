"""OpenAI endpoints and a load in, a folder of records out: one for each request, before any statistic.

Closed loop: so many clients, each of which asks again as soon as it has its answer. Open loop: requests arrive when they do,
whether others are answered or not, and wait from then on; so a server that stalls is charged for all that it keeps waiting.

    for each turn, for each load, for each arm in changing order: ask, until all are answered

so that a drift of the machine meets all alike.

- `OUTPUT_DIR/records/part-00000.parquet` ...: see `load_records.LoadRecord`; a part is one load in one turn.
- `OUTPUT_DIR/load.json`: how it came about.
- `OUTPUT_DIR/summary.json`: what `write_load_summary` makes of the records, and of nothing else.
- `OUTPUT_DIR/load.png`: a chart of that, where matplotlib is installed.
"""

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from specdecode.config import check_config
from specdecode.errors import ConfigError
from specdecode.evaluation.datasets import Dataset
from specdecode.evaluation.endpoint import BadAnswerError, Endpoint
from specdecode.evaluation.load_analysis import LoadSummary, summarise_load
from specdecode.evaluation.load_plan import LoadConfig, Plan, Planned
from specdecode.evaluation.load_records import LoadRecord
from specdecode.evaluation.machine import machine, versions
from specdecode.parts import part_path
from specdecode.rows import read_rows, write_rows

LOAD, RECORDS, SUMMARY, CHART = "load.json", "records", "summary.json", "load.png"
Tell = Callable[[int, int], None]
"""Hears how many parts are there, and of how many."""


def run_load(config: LoadConfig, tell: Tell = lambda *_: None) -> None:
    """Asks what was not asked yet, and writes down what became of it.

    Raises:
        ConfigError: an endpoint cannot be reached or does not answer as it should, a data set is not there, or the folder holds
            the records of another configuration.
    """
    plan = Plan(config, None if config.dataset is None else Dataset(config.dataset))
    if missing := _missing(config):
        asyncio.run(_run(config, plan, missing, tell))


def is_load(folder: str | Path) -> bool:
    """Whether a folder holds the results of a load."""
    return (Path(folder) / LOAD).exists()


def read_load(folder: str | Path) -> tuple[LoadConfig, list[LoadRecord]]:
    """A finished load's configuration and its records.

    Raises:
        ConfigError: the folder holds none, or one that is not finished.
    """
    config = _config(folder).model_copy(update={"output_dir": str(folder)})  # which may have been moved
    if missing := _missing(config):
        raise ConfigError(
            f"{folder}: expected a finished load, but {len(missing)} of {config.num_parts} parts are missing: run it again"
        )
    paths = [_part_path(folder, number) for number in range(config.num_parts)]
    try:
        return config, [record for path in paths for record in read_rows(path, LoadRecord)]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: cannot be read as records: {str(error).splitlines()[0]}") from error


def write_load_summary(folder: str | Path) -> LoadSummary:
    """Writes summary.json and the chart of a finished load's records; raises as `read_load` does."""
    config, records = read_load(folder)
    found = summarise_load(records, config.goodput)
    (Path(folder) / SUMMARY).write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")
    if find_spec("matplotlib") is not None:
        from specdecode.evaluation.load_chart import draw_load  # matplotlib is an extra

        draw_load(found, Path(folder) / CHART)
    return found


def _config(folder: str | Path) -> LoadConfig:
    path = Path(folder) / LOAD
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["config"]
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{folder}: expected the results of a load, but {LOAD} cannot be read: {error}") from error
    return check_config(values, LoadConfig, where=str(path))


def _missing(config: LoadConfig) -> list[int]:
    """Which parts are not there."""
    same = {"output_dir": config.output_dir}
    if is_load(config.output_dir) and _config(config.output_dir).model_copy(update=same) != config:
        raise ConfigError(f"output_dir: {config.output_dir} holds a load of another configuration: expected a new folder")
    return [number for number in range(config.num_parts) if not _part_path(config.output_dir, number).exists()]


def _part_path(folder: str | Path, number: int) -> Path:
    return part_path(Path(folder) / RECORDS, number)


async def _run(config: LoadConfig, plan: Plan, missing: list[int], tell: Tell) -> None:
    async with AsyncExitStack() as stack:
        arms = {}
        for name, arm in config.arms.items():
            body = {**config.extra_body, **arm.extra_body}
            key_name = arm.api_key_env or config.api_key_env
            opened = Endpoint.open(arm.url or config.url, key_name, arm.model or config.model, body, config.timeout_s)
            arms[name] = await stack.enter_async_context(opened)
        for name, endpoint in arms.items():
            await _warm_up(name, endpoint, plan.warm_up(name))
        _begin(config)
        for done, number in enumerate(missing, start=config.num_parts - len(missing)):
            tell(done, config.num_parts)
            write_rows(_part_path(config.output_dir, number), await _part(config, plan, arms, number), LoadRecord)
        tell(config.num_parts, config.num_parts)


def _begin(config: LoadConfig) -> None:
    """Writes down how a load comes about, unless it goes on."""
    if not is_load(config.output_dir):
        (Path(config.output_dir) / RECORDS).mkdir(parents=True, exist_ok=True)
        about = {"config": config.model_dump(mode="json"), "versions": versions(), "machine": machine()}
        (Path(config.output_dir) / LOAD).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


async def _warm_up(name: str, endpoint: Endpoint, requests: list[Planned]) -> None:
    """Asks once, so that what the endpoint does not take is said now, and then all else at once."""
    try:
        await endpoint.ask(requests[0].question)
    except BadAnswerError as error:
        raise ConfigError(f"{endpoint.url} does not answer the arm {name}: {error}") from error
    await ask_all(endpoint, requests[1:], len(requests), None, LoadRecord())


async def _part(config: LoadConfig, plan: Plan, arms: dict[str, Endpoint], number: int) -> list[LoadRecord]:
    """One load in one turn: all arms one after the other, of which another one is the first each time."""
    turn, place = divmod(number, len(config.points))
    point, names = config.points[place], list(arms)
    first = turn % len(names)
    num_clients = int(point.load) if point.kind == "concurrency" else config.max_concurrency
    records: list[LoadRecord] = []
    for arm in [*names[first:], *names[:first]]:
        about = LoadRecord(point.kind, point.load, turn, arm)
        records += await ask_all(arms[arm], plan.requests(number, arm), num_clients, config.duration_s, about)
    return records


async def ask_all(
    endpoint: Endpoint, requests: list[Planned], num_clients: int, duration_s: float | None, about: LoadRecord
) -> list[LoadRecord]:
    """Asks all of it, and waits for the answers.

    Args:
        endpoint: who is asked.
        requests: in the order in which they arrive.
        num_clients: so many wait for an answer at a time, at the most.
        duration_s: after that, what has no time of its own is not asked any more.
        about: what all records have in common.
    """
    records: list[LoadRecord] = []
    waiting = iter(requests)
    began = time.perf_counter()

    async def client() -> None:
        for request in waiting:  # which all clients share
            now_s = time.perf_counter() - began
            if request.at_s is None and duration_s is not None and now_s >= duration_s:
                return
            await asyncio.sleep(0 if request.at_s is None else max(0, request.at_s - now_s))
            records.append(await _ask(endpoint, request, began, about))

    await asyncio.gather(*(client() for _ in range(min(num_clients, len(requests)))))
    return sorted(records, key=lambda record: record.number)


async def _ask(endpoint: Endpoint, request: Planned, began: float, about: LoadRecord) -> LoadRecord:
    """Asks, and tells all times from `began` on."""
    started_s = time.perf_counter() - began
    scheduled_s = started_s if request.at_s is None else request.at_s
    record = replace(about, number=request.number, item=request.item, scheduled_s=scheduled_s, started_s=started_s)
    try:
        answer = await endpoint.ask(request.question)
    except BadAnswerError as error:
        return replace(record, ended_s=time.perf_counter() - began, error=str(error))
    return replace(
        record,
        first_s=answer.chunk_s[0] - began,
        ended_s=answer.ended_s - began,
        gaps_s=[later - earlier for earlier, later in pairwise(answer.chunk_s)],
        num_prompt_tokens=answer.num_prompt_tokens,
        num_tokens=answer.num_tokens,
    )
