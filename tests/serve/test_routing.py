"""A served router chooses a draft for each prompt, off the event loop, says why, and learns; a request may choose otherwise."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from serve.canary import CanaryConfig, with_canaries
from serve.config import ServeConfig
from serve.forecaster import Forecaster, Subject
from serve.metrics import Metrics
from specdecode.config import check_config
from specdecode.decoding.metrics import Verdicts
from specdecode.decoding.sequence import Arm, Route
from specdecode.errors import ConfigError, ModelError
from specdecode.routing.records import NONE, read_records
from specdecode.routing.router import AdaptiveRouter, RoutingConfig
from specdecode.text import Tokenizer
from tests.routing.made import TRUE, made_prompt
from tests.serve.conftest import Expect
from tests.serve.inprocess import FakeTarget, routed
from tests.serve.serving import serving, small_config

DRAFTS = ("code", "chat", "generic")
TEXTS = {domain: made_prompt(domain, np.random.default_rng(3)) for domain in TRUE}
BEST = {domain: max(rates, key=lambda name: rates[name]) for domain, rates in TRUE.items()}


def body_of(domain: str, **options: Any) -> tuple[str, dict[str, Any]]:
    """A path and a body."""
    body = {"model": "tiny", "max_tokens": 4, "temperature": 0, **options}
    if domain == "code":
        return "/v1/completions", {**body, "prompt": TEXTS[domain]}
    turns = [{"role": "user", "content": "Something else."}, {"role": "assistant", "content": "Yes."}]
    return "/v1/chat/completions", {**body, "messages": [*turns, {"role": "user", "content": TEXTS[domain]}]}


async def ask(client: httpx.AsyncClient, domain: str, **options: Any) -> dict[str, Any]:
    path, body = body_of(domain, **options)
    response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()["speculative_decoding"]
    return answer


def test_each_prompt_goes_to_the_draft_that_suits_it(checkpoint: str) -> None:
    async def test() -> None:
        target = FakeTarget()
        async with routed(target, RoutingConfig(checkpoint=checkpoint)) as (client, _):
            for domain, best in BEST.items():
                figures = await ask(client, domain, n=2)
                assert figures["draft"] == best
                assert figures["routing"]["expected_acceptance"].keys() == set(DRAFTS)
                assert next(iter(figures["routing"]["expected_acceptance"])) == best
                assert f"{best} was expected to be accepted most" in figures["routing"]["reason"]
                assert [g.route.drafter for g in target.asked[-2:]] == [best, best]
                assert target.asked[-1].route.k == 4
                assert {arm.drafter for arm in target.asked[-1].route.arms} == set(DRAFTS)

    asyncio.run(test())


def test_several_prompts_of_a_request_are_routed_each(checkpoint: str) -> None:
    async def test() -> None:
        target = FakeTarget()
        async with routed(target, RoutingConfig(checkpoint=checkpoint)) as (client, _):
            prompts = [TEXTS["code"], " ".join(["dull"] * 30), TEXTS["code"]]
            body = {"model": "tiny", "prompt": prompts, "max_tokens": 1, "temperature": 0, "n": 2}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
            expected = [tuple(arm.acceptance for arm in asked.route.arms) for asked in target.asked]
            assert expected[0] == expected[1] == expected[4] == expected[5] != expected[2] == expected[3]
            ids = Tokenizer("tiny/target").encode(TEXTS["code"])
            await client.post("/v1/completions", json={**body, "prompt": ids, "n": 1})
            assert target.asked[-1].route.drafter == BEST["code"]

    asyncio.run(test())


@pytest.mark.parametrize(
    ("options", "drafter"),
    [({"draft": "chat"}, "chat"), ({"draft": "none"}, None), ({"K": 0}, None), ({"draft": "auto", "K": 2}, "code")],
)
def test_a_request_may_choose_otherwise(checkpoint: str, options: dict[str, Any], drafter: str | None) -> None:
    async def test() -> None:
        target = FakeTarget()
        async with routed(target, RoutingConfig(checkpoint=checkpoint)) as (client, _):
            figures = await ask(client, "code", speculative_decoding=options)
            assert figures["draft"] == drafter
            assert (figures["routing"] is not None) == (options.get("draft") == "auto")
            assert target.asked[-1].route.k == (0 if drafter is None else options.get("K", 4))

    asyncio.run(test())


def test_auto_is_refused_where_there_is_no_learned_router() -> None:
    async def test() -> None:
        async with routed(FakeTarget()) as (client, _):
            path, body = body_of("code", speculative_decoding={"draft": "auto"})
            response = await client.post(path, json=body)
            assert response.status_code == 400
            assert "expected one of ['code', 'chat', 'none'], got 'auto'" in response.json()["error"]["message"]

    asyncio.run(test())


def test_prompts_that_come_together_are_forecast_together_and_the_loop_goes_on(checkpoint: str) -> None:
    async def test() -> None:
        router = AdaptiveRouter.from_config({"checkpoint": checkpoint})
        batches: list[int] = []
        forecast = router.forecast

        def slow(texts: Any, *rest: Any) -> Any:
            batches.append(len(texts))
            return forecast(texts, *rest)

        router.forecast = slow  # type: ignore[method-assign]
        forecaster = Forecaster(router, Metrics())
        subjects = [Subject(f"{TEXTS[domain]} {number}", 9, False) for number in range(30) for domain in TRUE]
        found = await asyncio.gather(*(forecaster.forecast([subject]) for subject in subjects))
        assert len(batches) <= 4
        assert sum(batches) == 90
        alone = AdaptiveRouter.from_config({"checkpoint": checkpoint})
        for subject, [one] in zip(subjects, found, strict=True):
            [other] = alone.forecast([subject.text], [9], [False])
            assert one.uncorrected == pytest.approx(other.uncorrected, abs=1e-5)

        def broken(*_: Any) -> Any:
            raise RuntimeError("no memory")

        router.forecast = broken  # type: ignore[method-assign]
        results = await asyncio.gather(*(forecaster.forecast([s]) for s in subjects[:3]), return_exceptions=True)
        assert [str(result) for result in results] == ["no memory"] * 3
        router.forecast = slow  # type: ignore[method-assign]
        left = asyncio.create_task(forecaster.forecast([Subject("gone", 1, False)]))
        await asyncio.sleep(0)
        left.cancel()
        assert await forecaster.forecast([Subject("here", 1, False)])  # it goes on after both

    asyncio.run(test())


def test_what_came_of_a_request_is_learned(checkpoint: str) -> None:
    async def test() -> None:
        forecaster = Forecaster(AdaptiveRouter.from_config({"checkpoint": checkpoint}), Metrics())
        subject = Subject(TEXTS["code"], 9, False)
        [before] = await forecaster.forecast([subject])
        for _ in range(5):
            forecaster.learn(before, {"code": Verdicts(10, 0, 30)})
        [after] = await forecaster.forecast([subject])
        assert before.arms[0].drafter == "code" != after.arms[0].drafter

    asyncio.run(test())


def config_of(checkpoint: str, **values: Any) -> ServeConfig:
    drafts = {name: {"model": f"tiny/draft-{name}"} for name in DRAFTS} | {"lookup": {"method": "ngram"}}
    told = {"target": {"model": "tiny/target"}, "drafts": drafts, "routing": {"checkpoint": checkpoint}}
    return check_config(told | values, ServeConfig, where="test")


def test_the_configuration_says_who_chooses(checkpoint: str) -> None:
    assert config_of(checkpoint).default_drafter == "auto"
    assert config_of(checkpoint, default_draft="lookup").default_drafter == "lookup"
    assert config_of(checkpoint, routing=None).default_drafter is None
    with pytest.raises(ConfigError, match="default_draft: expected one of"):
        config_of(checkpoint, routing=None, default_draft="auto")
    with pytest.raises(ConfigError, match="auto is how a request leaves the choice"):
        config_of(checkpoint, drafts={"auto": {"method": "ngram"}})


def test_a_router_for_other_drafts_is_refused_before_anything_is_started(checkpoint: str) -> None:
    from serve.app import build

    config = config_of(checkpoint, drafts={"code": {"model": "tiny/draft-code"}})
    with pytest.raises(ModelError, match=r"is one for the drafts \['chat', 'code', 'generic'\]: expected one for \['code'\]"):
        build(config)


def test_a_server_routes(checkpoint: str, tmp_path: Path, expect: Expect, tokenizer: Tokenizer) -> None:
    def change(args: dict[str, Any]) -> None:
        args["drafts"] = {name: {"model": f"tiny/draft-{name}", "placement": "local"} for name in DRAFTS}
        for draft in args["drafts"].values():
            draft["idle_share"] = 0.5
        args["drafts"]["code"] |= {"placement": "deployment", "deployment": {"ray_actor_options": {"num_cpus": 0.1}}}
        args["routing"] = {"checkpoint": checkpoint}
        args["router"]["records"] = {"folder": str(tmp_path / "records"), "keep_prompts": True}
        args["target"]["deployment"] = {"ray_actor_options": {"num_cpus": 0.2}}
        del args["default_draft"]

    with serving(tmp_path, small_config(change)) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        for domain, best in BEST.items():
            path, body = body_of(domain, max_tokens=24)
            answer = client.post(path, json=body).json()
            routing = answer["speculative_decoding"]["routing"]
            assert next(iter(routing["expected_acceptance"])) == answer["speculative_decoding"]["draft"] == best
            assert sum(routing["num_drafts"].values()) == answer["speculative_decoding"]["num_drafts"] > 0
            if domain == "code":
                assert answer["choices"][0]["text"] == expect(tokenizer.encode(TEXTS[domain]))
        path, body = body_of("chat", stream=True)
        events = client.post(path, json=body).text
        assert '"routing": {"expected_acceptance"' in events
        [line] = server.wait_for_lines("request ", "route=/v1/completions")
        assert "drafted_by=code:" in line
        end = time.monotonic() + 30  # drafts that were not asked read the answers, deployed ones and those of the target
        while missing := set(DRAFTS) - {r.arm for r in read_records(tmp_path / "records") if r.mode == "scored"}:
            assert time.monotonic() < end, missing
            for domain in BEST:
                path, body = body_of(domain)
                client.post(path, json=body)
                time.sleep(0.2)
    for record in read_records(tmp_path / "records"):
        assert record.prompt in TEXTS.values()
        assert 0 <= record.acceptance <= 1


@pytest.mark.parametrize("keeps_prompts", [True, False])
def test_what_requests_came_to_is_written_down_where_that_is_wanted(
    checkpoint: str,
    tmp_path: Path,
    keeps_prompts: bool,
) -> None:
    folder = tmp_path / "records"

    async def test() -> None:
        async with routed(
            FakeTarget(drafter="code"),
            RoutingConfig(checkpoint=checkpoint),
            records={"folder": str(folder), "keep_prompts": keeps_prompts},
        ) as (client, router):
            await ask(client, "code")
            await ask(client, "chat", speculative_decoding={"draft": "none"}, n=2)
            assert router._recorder is not None
            router._recorder._thread.shutdown()

    asyncio.run(test())
    drafted, *plain = read_records(folder)
    assert (drafted.arm, drafted.acceptance, drafted.num_verdicts, drafted.k) == ("code", 0.5, 8, 4)
    assert drafted.accepted_lengths == [2, 2, 2, 2]
    assert [record.arm for record in plain] == [NONE, NONE]
    assert len({record.prompt_id for record in [drafted, *plain]}) == 3
    assert [record.prompt for record in [drafted, plain[0]]] == ([TEXTS["code"], TEXTS["chat"]] if keeps_prompts else ["", ""])
    assert {record.mode for record in plain} == {"served"}


def test_nothing_is_written_down_unless_it_is_wanted(checkpoint: str) -> None:
    async def test() -> None:
        async with routed(FakeTarget(), RoutingConfig(checkpoint=checkpoint)) as (_, router):
            assert router._recorder is None

    asyncio.run(test())


def test_a_disk_that_takes_nothing_fails_no_request(
    checkpoint: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "records").write_text("a file where a folder should be")

    async def test() -> None:
        records = {"folder": str(tmp_path / "records")}
        async with routed(FakeTarget(), RoutingConfig(checkpoint=checkpoint), records=records) as (client, router):
            for _ in range(3):
                await ask(client, "code")
            assert router._recorder is not None
            router._recorder._thread.shutdown()

    asyncio.run(test())
    assert len([line for line in caplog.messages if "records of requests are lost" in line]) == 1


def test_a_share_of_a_drafts_requests_goes_to_its_canary() -> None:
    arms = (Arm("code", 0.8), Arm("chat", 0.5))
    canaries = {"code": CanaryConfig(draft="code-next", share=0.25)}
    routes = [with_canaries(Route("code", 4, arms), canaries, f"request-{number}") for number in range(2000)]
    taken = [route for route in routes if route.drafter == "code-next"]
    assert 430 < len(taken) < 570
    assert all([arm.drafter for arm in route.arms] == ["code-next", "chat"] for route in taken)
    assert with_canaries(Route("code", 4), canaries, "request-1") == replace(routes[1], arms=())  # the same one each time
    for route in (Route(), Route("chat", 4)):
        assert {with_canaries(route, canaries, f"request-{number}") for number in range(50)} == {route}


def test_a_request_that_names_a_draft_gets_that_one() -> None:
    async def test() -> None:
        target = FakeTarget()
        async with routed(target, canaries={"code": CanaryConfig(draft="chat", share=1.0)}) as (client, _):
            assert (await ask(client, "code"))["draft"] == "chat"
            assert (await ask(client, "code", speculative_decoding={"draft": "code"}))["draft"] == "code"

    asyncio.run(test())


def test_a_canary_is_a_draft_that_there_is(checkpoint: str) -> None:
    assert config_of(checkpoint, canaries={"code": {"draft": "chat", "share": 0.1}}).canaries["code"].share == 0.1
    with pytest.raises(ConfigError, match=r"canaries: code: expected drafts of .*, got 'next'"):
        config_of(checkpoint, canaries={"code": {"draft": "next", "share": 0.1}})


def test_idle_drafts_say_how_they_would_have_done(checkpoint: str, tmp_path: Path) -> None:
    async def test() -> None:
        target = FakeTarget(drafter="code")
        routing, records = RoutingConfig(checkpoint=checkpoint), {"folder": str(tmp_path / "records"), "keep_prompts": True}
        async with routed(target, routing, idle_readers=("code", "chat"), records=records) as (client, router):
            await ask(client, "code")
            while not target.read or router._asking:
                await asyncio.sleep(0.01)
            [(tokens, num_prompt_tokens, drafts)] = target.read
            assert drafts == ["chat"]
            assert tokens[num_prompt_tokens:] == [300] * 8
            assert router._recorder is not None
            router._recorder._thread.shutdown()

    asyncio.run(test())
    served, scored = read_records(tmp_path / "records")
    assert (served.arm, served.mode, scored.arm, scored.mode) == ("code", "served", "chat", "scored")
    assert served.prompt_id == scored.prompt_id
    assert (scored.acceptance, scored.num_verdicts, scored.prompt) == (0.9, 10, TEXTS["code"])


def test_nobody_reads_unless_that_is_configured(checkpoint: str) -> None:
    async def test() -> None:
        target = FakeTarget()
        async with routed(target, RoutingConfig(checkpoint=checkpoint)) as (client, router):
            await ask(client, "code")
            assert not router._asking
            assert not target.read

    asyncio.run(test())
