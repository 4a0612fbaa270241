"""Faults, one function each: what breaks, and what is to be seen before it counts as mended."""

import asyncio
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable, Mapping

from jobs.bench import Bench, Incident
from jobs.interference import Trouble
from jobs.load import Attempt
from jobs.observation import replica_logs
from jobs.requests import Question

_INTERFERE_TIMEOUT_S = 10.0
_LOG_TIMEOUT_S = 20.0
_CHANGE_TIMEOUT_S = 300.0
_NUM_PROBES_OF_K = 6  # each goes to one of the routers at random


async def kill_draft(bench: Bench, incident: Incident) -> None:
    """A draft's replica is killed."""
    pid = bench.choose(list(await bench.busy_drafts()))
    bench.strike(incident)
    _kill(bench, pid)


async def stop_draft(bench: Bench, incident: Incident) -> None:
    """A draft's replica stands still for longer than its targets wait, and goes on then."""
    pid = bench.choose(list(await bench.busy_drafts()))
    bench.strike(incident)
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(1.5 * bench.deadline_s)
    finally:
        os.kill(pid, signal.SIGCONT)


async def kill_target(bench: Bench, incident: Incident) -> None:
    """A target's replica is killed in the middle of its answers."""
    pid = bench.choose((await asyncio.to_thread(bench.application.pids))["Target"])
    bench.strike(incident)
    _kill(bench, pid)


async def kill_decoder(bench: Bench, incident: Incident) -> None:
    """A target's decoder is killed in the middle of its answers, and takes the replica with it."""
    view = await asyncio.to_thread(bench.application.view)
    decoders = {target.decoder_pid: target.pid for target in view.targets}
    pid = bench.choose(list(decoders))
    bench.gone.add(decoders[pid])
    bench.strike(incident)
    _kill(bench, pid)


async def kill_router(bench: Bench, incident: Incident) -> None:
    """A router's replica is killed, and the connections of its clients end."""
    pid = bench.choose((await asyncio.to_thread(bench.application.pids))["Router"])
    bench.strike(incident, cuts=True)
    _kill(bench, pid)


async def leave(bench: Bench, incident: Incident) -> None:
    """A client leaves in the middle of a stream; what counts is when the target has noticed."""
    bench.strike(incident)
    left = await bench.load.ask(bench.endless, leave_after=int(bench.rng.integers(3, 20)))
    if left.outcome != "left":
        incident.notes.append(f"the client could not leave: {left.outcome} {left.detail}")
        return
    cancelled = await _cancelled_at(bench, left)
    if cancelled is None:
        incident.notes.append("no target has noticed")
    else:
        incident.recovery_s = max(0.0, cancelled - left.ended)


async def read_slowly(bench: Bench, incident: Incident) -> None:
    """A client reads a byte now and then."""
    bench.strike(incident)
    answer = await bench.load.ask(bench.endless, slow_s=float(bench.rng.uniform(2, 4)))
    if answer.outcome != "right":
        incident.notes.append(f"the slow client: {answer.outcome} {answer.detail}")


async def burst(bench: Bench, incident: Incident) -> None:
    """More requests than there is room for come at once; some of them are asked to come again."""
    num_refused = 0

    async def ask(question: Question) -> None:
        nonlocal num_refused
        while (answer := await bench.load.ask_once(question)).outcome == "refused":
            num_refused += 1
            await asyncio.sleep(float(bench.rng.uniform(0.5, 1.5)))
        if answer.outcome != "right":
            incident.notes.append(f"a request of the burst: {answer.outcome} {answer.detail}")

    probes = [bench.probes[name] for name in bench.application.config.drafts]
    bench.strike(incident)
    await asyncio.gather(*(ask(probes[number % len(probes)]) for number in range(bench.burst)))
    if not num_refused:
        incident.notes.append("nobody was refused: the burst is too small")


def interfere(*troubles: Trouble) -> "Strike":
    """The fault that one of the troubles befalls the next frame between a target and a draft."""

    async def strike(bench: Bench, incident: Incident) -> None:
        trouble = troubles[int(bench.rng.integers(len(troubles)))]
        drafts = await bench.busy_drafts()
        pid = bench.choose(list(drafts))
        arguments = (pid, trouble, 1.5 * bench.deadline_s, _INTERFERE_TIMEOUT_S)
        asked = asyncio.to_thread(bench.application.ask, f"Draft-{drafts[pid]}", "interfere", *arguments)
        bench.strike(incident)
        if not any(await asked):
            incident.notes.append("no frame came by")
        if trouble == "withhold replies":
            await asyncio.sleep(bench.deadline_s)

    return strike


async def change_settings(bench: Bench, incident: Incident) -> None:
    """The routers' k is changed by their user_config; nothing is restarted."""
    k = bench.other_k()
    bench.strike(incident)
    bench.overrides = {"Router": {"user_config": {"k": k}}}
    await bench.deploy(bench.application.config)
    await _until_k(bench, incident, k)


async def change_arguments(bench: Bench, incident: Incident) -> None:
    """The application is deployed with another k: every replica is replaced."""
    k = bench.other_k()
    bench.strike(incident)
    bench.overrides = {}
    await bench.deploy(bench.application.config.model_copy(update={"k": k}))
    await _until_k(bench, incident, k)


async def change_drafts(bench: Bench, incident: Incident) -> None:
    """A draft is taken out of the application, or put back: every replica is replaced."""
    config, name = bench.application.config, bench.removable
    bench.strike(incident)
    bench.overrides = {}
    if name in config.drafts:
        bench.load.without = {name}
        await bench.deploy(config.model_copy(update={"drafts": {k: d for k, d in config.drafts.items() if k != name}}))
    else:
        await bench.deploy(config.model_copy(update={"drafts": bench.drafts}))
    if not await bench.until_well(_CHANGE_TIMEOUT_S):
        incident.notes.append("not well with other drafts")
    bench.load.without = {name} - bench.application.config.drafts.keys()


Strike = Callable[[Bench, Incident], Awaitable[None]]

FAULTS: Mapping[str, Strike] = {
    "draft killed": kill_draft,
    "draft stopped": stop_draft,
    "target killed": kill_target,
    "decoder killed": kill_decoder,
    "router killed": kill_router,
    "client leaves": leave,
    "slow client": read_slowly,
    "burst": burst,
    "reply late": interfere("delay reply"),
    "frame lost": interfere("lose request", "lose reply"),
    "frame twice": interfere("repeat request", "repeat reply"),
    "garbage": interfere("garble reply"),
    "other version": interfere("change version"),
    "no reply ever": interfere("withhold replies"),
    "reset in mid-frame": interfere("reset in mid-frame"),
    "k by user_config": change_settings,
    "k by arguments": change_arguments,
    "draft removed or added": change_drafts,
}


async def _until_k(bench: Bench, incident: Incident, k: int) -> None:
    """Waits until routers give requests that k."""
    probe = bench.probes[bench.application.draft_names[0]]
    end = time.monotonic() + _CHANGE_TIMEOUT_S
    while True:
        answers = await asyncio.gather(*(bench.load.ask(probe) for _ in range(_NUM_PROBES_OF_K)))
        if all(answer.k == k for answer in answers):
            return
        if time.monotonic() > end:
            incident.notes.append(f"k is not {k} everywhere")
            return


async def _cancelled_at(bench: Bench, left: Attempt) -> float | None:
    """When a target has dropped that request, by its log."""
    pattern = re.compile(rf"(\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{{3}}) .*generation id={left.id}-\S+ ending=cancelled")
    end = time.monotonic() + _LOG_TIMEOUT_S
    while time.monotonic() < end:
        for log in replica_logs(bench.application.name, "Target"):
            if found := pattern.search(await asyncio.to_thread(log.read_text, errors="replace")):
                return time.mktime(time.strptime(found.group(1), "%Y-%m-%d %H:%M:%S")) + int(found.group(2)) / 1000
        await asyncio.sleep(0.1)
    return None


def _kill(bench: Bench, pid: int) -> None:
    bench.gone.add(pid)
    os.kill(pid, signal.SIGKILL)
