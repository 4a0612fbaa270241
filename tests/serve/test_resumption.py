"""A target that dies in mid-answer costs its client nothing: another one goes on where it was."""

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import grpc
import httpx
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from serve.errors import UnavailableError
from serve.generation import Admission, Generation, Item, PromptLogprobs
from serve.resumption import Failover, Resumable
from serve.worker import EngineThread
from specdecode.backends.table import TableModel, random_table
from specdecode.decoding.drafters import Drafter, ModelDrafter, RoutedDrafter
from specdecode.decoding.engine import Engine, EngineConfig
from specdecode.decoding.sequence import Round, Route, SamplingParams
from specdecode.errors import OverloadedError, RequestError
from tests.serve.serving import Serving, field, logged_at, serving, small_config

PROMPT = [1, 2, 3]
FAILOVER = Failover(timeout_s=0.5, max_resumptions=3)


def unavailable() -> Exception:
    return ActorUnavailableError("gone", b"0" * 16)


def aborted(code: grpc.StatusCode) -> Exception:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata())


LOSSES: dict[str, Callable[[], BaseException | None]] = {
    "died": ActorDiedError,
    "unavailable": unavailable,
    "connection lost": lambda: aborted(grpc.StatusCode.UNAVAILABLE),
    "call taken back": lambda: aborted(grpc.StatusCode.CANCELLED),
    "cancelled over there": asyncio.CancelledError,
    "stream ended": lambda: None,
}


class Fake:
    """A target whose replicas follow a script: each entry says how many items one gives, and what happens then.

    What they say is what a real engine over a table says.
    """

    def __init__(self, script: list[tuple[int, BaseException | None]], target: "Target") -> None:
        self.script = script
        self.asked: list[Generation] = []
        self.num_open = 0
        self._target = target

    def remote(self, generation: Generation) -> "FakeStream":
        self.asked.append(generation)
        num_items, error = self.script[len(self.asked) - 1] if len(self.asked) <= len(self.script) else (10**6, None)
        self.num_open += 1
        return FakeStream(self, self._target.generate(generation), num_items, error)


class FakeStream:
    def __init__(self, owner: Fake, items: AsyncGenerator[Item, None], num_items: int, error: BaseException | None) -> None:
        self._owner, self._items, self._num_items, self._error = owner, items, num_items, error

    def __aiter__(self) -> AsyncIterator[Item]:
        return self

    async def __anext__(self) -> Item:
        if self._num_items == 0:
            if self._error is None:
                raise StopAsyncIteration
            raise self._error
        self._num_items -= 1
        return await anext(self._items)

    def cancel(self) -> None:
        self._owner.num_open -= 1
        asyncio.get_running_loop().create_task(self._items.aclose())


class Target:
    """An engine over table models, one round an item."""

    def __init__(self) -> None:
        drafters: dict[str, Drafter] = {"draft": ModelDrafter(TableModel(random_table(13, 2)))}
        model = TableModel(random_table(13, 1))
        self._engine = Engine(model, RoutedDrafter(drafters), EngineConfig(draft_length="fixed"))
        self.worker = EngineThread(self._engine)

    async def settle(self) -> None:
        """Waits until the thread has nothing to say to the event loop, which is about to end."""
        while self._engine.has_work:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)

    async def generate(self, generation: Generation) -> AsyncGenerator[Item, None]:
        async with aclosing(self.worker.stream(generation.sequence())) as stream:
            async for rounds in stream:
                if not rounds:
                    yield Admission("replica")
                for round in rounds:
                    if round.prompt_logprobs is not None:
                        yield PromptLogprobs(round.prompt_logprobs[:1])
                        yield PromptLogprobs(round.prompt_logprobs[1:])
                    yield [round]


def resume(
    script: list[tuple[int, BaseException | None]], generation: Generation, failover: Failover = FAILOVER
) -> tuple[list[Round], Fake, Resumable]:
    """All rounds of a generation while its replicas follow the script."""

    async def run() -> tuple[list[Round], Fake, Resumable]:
        target = Target()
        fake = Fake(script, target)
        resumable = Resumable(fake, generation, failover)
        try:
            return [round async for round in resumable.rounds()], fake, resumable
        finally:
            await target.settle()

    return asyncio.run(run())


def generation(**sampling: Any) -> Generation:
    options: dict[str, Any] = {"temperature": 1.0, "max_tokens": 40, "logprobs": 2, "prompt_logprobs": 1, **sampling}
    return Generation(PROMPT, SamplingParams(**options), Route("draft", 3), id="test", seed=99)


def tokens(rounds: list[Round]) -> list[int]:
    return [token for round in rounds for token in round.tokens]


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_another_replica_goes_on_as_the_lost_one_would_have(loss: Callable[[], BaseException | None]) -> None:
    whole, _, _ = resume([], generation())
    rounds, fake, resumable = resume([(5, loss()), (3, loss())], generation())
    assert [(round.tokens, round.num_accepted, round.logprobs) for round in rounds] == [
        (round.tokens, round.num_accepted, round.logprobs) for round in whole
    ]
    assert len(tokens(rounds)) == 40
    assert resumable.num_resumptions == 2
    assert fake.num_open == 0


@pytest.mark.parametrize("verifier", ["rejection", "block", "coupled"])
@pytest.mark.parametrize("place", range(1, 9))
def test_every_place_is_as_good(place: int, verifier: str) -> None:
    asked = generation(verifier=verifier, frequency_penalty=0.5, repetition_penalty=1.2, min_tokens=30, stop_token_ids=[4])
    whole, _, _ = resume([], asked)
    rounds, _, _ = resume([(place, unavailable())], asked)
    assert tokens(rounds) == tokens(whole)
    assert [round.prompt_logprobs for round in rounds] == [round.prompt_logprobs for round in whole]
    assert rounds[-1].finish_reason == whole[-1].finish_reason


def test_a_coupled_answer_is_the_same_though_another_draft_goes_on() -> None:
    asked = generation(verifier="coupled")
    alone = Generation(asked.tokens, asked.params, Route(), seed=asked.seed)
    assert tokens(resume([(6, unavailable())], asked)[0]) == tokens(resume([], alone)[0])


def test_what_is_asked_of_the_next_replica() -> None:
    rounds, fake, _ = resume([(6, unavailable())], generation())
    first, second = fake.asked
    before = second.tokens[len(PROMPT) :]
    assert before == tokens(rounds)[: len(before)]
    assert before
    assert second.num_prompt_tokens == len(PROMPT)
    assert (first.params.prompt_logprobs, second.params.prompt_logprobs) == (1, None)
    assert (first.seed, first.id) == (second.seed, second.id)
    assert second.params.max_tokens == 40
    assert sum(round.prompt_logprobs is not None for round in rounds) == 1


def test_a_replica_that_is_lost_before_its_first_round_is_asked_for_all_of_it_again() -> None:
    _, fake, resumable = resume([(2, unavailable())], generation())
    assert fake.asked[1] == fake.asked[0]
    assert resumable.num_resumptions == 1


def test_a_seed_of_our_own_leaves_draft_lengths_free() -> None:
    sequence = generation().sequence()
    assert sequence.seed == 99
    assert not sequence.params.depends_on_k
    named = generation(seed=5).sequence()
    assert named.seed == 5
    assert named.params.depends_on_k


def test_two_generations_of_one_name_are_two_sequences() -> None:
    assert generation().sequence().id != generation().sequence().id
    assert generation().sequence().id.startswith("test/")


@pytest.mark.parametrize(
    "error", [RequestError("no"), ValueError("broken"), RayTaskError("generate", "", RequestError("no"))], ids=repr
)
def test_the_requests_own_error_is_not_tried_again(error: Exception) -> None:
    with pytest.raises(ValueError, match=r"no|broken") as caught:
        resume([(2, error)], generation())
    assert not isinstance(caught.value, RayTaskError)


def test_a_target_that_reports_a_lost_actor_of_its_own_is_not_lost_itself() -> None:
    with pytest.raises(ActorUnavailableError):
        resume([(2, RayTaskError("generate", "", unavailable()))], generation())


def test_a_full_queue_refuses_a_new_generation_and_not_one_that_was_accepted() -> None:
    full = OverloadedError("full")
    with pytest.raises(OverloadedError):
        resume([(0, full)], generation())
    rounds, fake, resumable = resume([(4, unavailable()), (0, full), (0, full)], generation())
    assert len(tokens(rounds)) == 40
    assert len(fake.asked) == 4
    assert resumable.num_resumptions == 1


def test_only_so_many_replicas_may_be_lost() -> None:
    with pytest.raises(UnavailableError, match="lost 3 times"):
        resume([(3, unavailable())] * 3, generation(), Failover(1.0, max_resumptions=2))
    assert len(tokens(resume([(3, unavailable())] * 2, generation(), Failover(1.0, max_resumptions=2))[0])) == 40


class Nobody:
    """No replica takes anything on."""

    def __init__(self) -> None:
        self.is_cancelled = False

    def remote(self, _: Generation) -> "Nobody":
        return self

    def __aiter__(self) -> AsyncIterator[Item]:
        return self

    async def __anext__(self) -> Item:
        await asyncio.sleep(60)
        raise AssertionError

    def cancel(self) -> None:
        self.is_cancelled = True


@pytest.mark.parametrize("script", [[], [(4, unavailable())]])
def test_no_replica_is_not_waited_for_longer_than_said(script: list[tuple[int, BaseException | None]]) -> None:
    async def run() -> tuple[float, Nobody]:
        nobody, target = Nobody(), Target()
        fake = Fake(script, target)
        fake_remote = fake.remote
        fake.remote = lambda asked: fake_remote(asked) if len(fake.asked) < len(script) else nobody  # type: ignore[method-assign, assignment, return-value]
        started = time.perf_counter()
        with pytest.raises(UnavailableError, match="no replica"):
            async for _ in Resumable(fake, generation(), Failover(0.3, 3)).rounds():
                pass
        elapsed_s = time.perf_counter() - started
        await target.settle()
        return elapsed_s, nobody

    elapsed_s, nobody = asyncio.run(run())
    assert 0.3 <= elapsed_s < 1.5
    assert nobody.is_cancelled


def test_whoever_leaves_ends_the_generation() -> None:
    async def run() -> Fake:
        target = Target()
        fake = Fake([], target)
        rounds = Resumable(fake, generation(max_tokens=10**5, prompt_logprobs=None), FAILOVER).rounds()
        await anext(rounds)
        await rounds.aclose()
        assert not fake.num_open
        await target.settle()
        return fake

    assert len(asyncio.run(run()).asked) == 1


BODY: dict[str, Any] = {
    "model": "tiny",
    "prompt": "def read_lines(path):\n",
    "max_tokens": 300,
    "ignore_eos": True,
    "stream": True,
    "stream_options": {"include_usage": True},
}


@pytest.fixture(scope="module")
def two_targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    def change(args: dict[str, Any]) -> None:
        args["router"]["failover_timeout_s"] = 60.0

    with serving(tmp_path_factory.mktemp("two_targets"), small_config(change)) as server:
        yield server


def stream(server: Serving, body: dict[str, Any], id: str, seen: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
    """Reads a stream; `seen` hears how many events there are after each."""
    events: list[dict[str, Any]] = []
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers={"X-Request-Id": id}, timeout=90) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line.removeprefix("data: ")))
                seen(len(events))
    assert all("error" not in event for event in events), events[-1]
    choices = [event["choices"][0] for event in events if event["choices"]]
    usage = {name: count for name, count in events[-1]["usage"].items() if name != "prompt_tokens_details"}  # of one replica
    return {"text": "".join(choice["text"] for choice in choices), "events": events, "usage": usage}


@pytest.mark.parametrize("is_decoder", [False, True], ids=["replica", "decoder"])
@pytest.mark.parametrize(
    "sampling", [{"seed": 11}, {"speculative_decoding": {"verifier": "coupled"}}], ids=["fixed K", "coupled"]
)
def test_streams_of_a_target_that_is_killed_are_gapless(
    two_targets: Serving, sampling: dict[str, Any], is_decoder: bool
) -> None:
    two_targets.wait_for_targets(2)
    body = {**BODY, "temperature": 0.9, "seed": 3, **sampling}
    name = f"{min(sampling)}-{is_decoder}"
    expected = stream(two_targets, body, f"{name}-before")
    kill = threading.Event()

    def seen(number: int) -> None:
        if number == 10:
            kill.set()

    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(stream, two_targets, body, f"{name}-{number}", seen) for number in range(8)]
        assert kill.wait(60)
        processes = two_targets.decoders if is_decoder else two_targets.replicas("Target")
        os.kill(min(processes), signal.SIGKILL)  # the one that has been there longer
        results = [answer.result() for answer in answers]
    assert [result["text"] for result in results] == [expected["text"]] * 8
    assert [result["usage"] for result in results] == [expected["usage"]] * 8
    lines = [two_targets.wait_for_lines(f"request id={name}-{number} ")[0] for number in range(8)]
    assert sum(int(field(line, "resumptions")) for line in lines) > 0
    assert {field(line, "tokens") for line in lines} == {"300"}


def test_a_client_that_leaves_frees_its_row_within_100_ms(two_targets: Serving) -> None:
    delays_ms = []
    for number in range(7):
        id = f"leaving-{number}"
        with httpx.stream(
            "POST", f"{two_targets.url}/v1/completions", json={**BODY, "max_tokens": 1500}, headers={"X-Request-Id": id}
        ) as response:
            lines = response.iter_lines()
            for _ in range(12):
                next(lines)
            left_at = time.time()
        [line] = two_targets.wait_for_lines(f"generation id={id}-", "ending=cancelled")
        delays_ms.append(1e3 * (logged_at(line) - left_at))
    assert sorted(delays_ms)[1] < 100, delays_ms  # a machine that is busy with other things may be late at times
    assert max(delays_ms) < 10_000, delays_ms


def test_a_router_that_is_killed_leaves_nothing_running(two_targets: Serving) -> None:
    started = threading.Event()

    def read() -> None:
        with (
            pytest.raises(httpx.TransportError),
            httpx.stream(
                "POST",
                f"{two_targets.url}/v1/completions",
                json={**BODY, "max_tokens": 1500},
                headers={"X-Request-Id": "orphan"},
                timeout=60,
            ) as response,
        ):
            for _ in response.iter_lines():
                started.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert started.wait(30)
    os.kill(two_targets.replicas("Router")[0], signal.SIGKILL)
    [line] = two_targets.wait_for_lines("generation id=orphan-", "ending=cancelled", timeout_s=60)
    assert int(field(line, "tokens")) < 1500  # which it would have come to
    reader.join(60)
    assert not reader.is_alive()
    two_targets.wait_until_serving()
    assert stream(two_targets, {**BODY, "max_tokens": 4}, "afterwards")["usage"]["completion_tokens"] == 4
