"""Every arm is tried on every prompt once; what is scored is what decoding does; what fails is a record that says so."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specdecode.config import check_config
from specdecode.errors import ConfigError
from specdecode.evaluation.prompts import DOMAINS, load_prompts
from specdecode.parts import Parts, part_path
from specdecode.routing.collection import Collector, RouterPrompt, TrialConfig, as_rows
from specdecode.routing.records import ADAPTIVE, NONE, Record, read_records, write_records
from specdecode.text import Tokenizer

DRAFTS = ("code", "chat", "reasoning")
ARMS = (*DRAFTS, NONE)


def config_of(**values: Any) -> TrialConfig:
    told = {
        "router": {"draft_models": {name: f"tiny/draft-{name}" for name in DRAFTS}},
        "target": {"model": "tiny/target"},
        "K": 3,
        "max_new_tokens": 24,
    }
    return check_config(told | values, TrialConfig, where="test")


@pytest.fixture(scope="module")
def prompts() -> list[RouterPrompt]:
    tokenizer = Tokenizer("tiny/target")
    return [
        RouterPrompt(prompt.id, domain, prompt.prompt, prompt.format == "chat", prompt.encode(tokenizer))
        for domain in DOMAINS
        for prompt in load_prompts(domain)[:3]
    ]


def collected(config: TrialConfig, prompts: list[RouterPrompt], folder: Path) -> dict[tuple[str, str], Record]:
    collector = Collector(config.model_dump(), str(folder))
    for row in as_rows(prompts, 4):
        told = collector(row)
        assert told["num_records"] == len(row["prompts"]) * len(ARMS)
    records = [record for path in sorted(folder.glob("*.parquet")) for record in read_records(path)]
    assert len(records) == len(prompts) * len(ARMS)
    return {(record.prompt_id, record.arm): record for record in records}


def test_scores_are_what_decoding_does(prompts: list[RouterPrompt], tmp_path: Path) -> None:
    """Greedily, an answer's rounds are the same ones; at its end a round may draft beyond it."""
    scored = collected(config_of(mode="score"), prompts, tmp_path / "scored")
    decoded = collected(config_of(mode="decode"), prompts, tmp_path / "decoded")
    assert scored.keys() == decoded.keys() == {(prompt.id, arm) for prompt in prompts for arm in ARMS}
    pairs = [(scored[key], decoded[key]) for key in scored if key[1] != NONE]
    assert all(record.error is None and record.tokens_per_second > 0 for record in [*scored.values(), *decoded.values()])
    lengths = np.array([[one.accepted_lengths[2], other.accepted_lengths[2]] for one, other in pairs])
    assert np.corrcoef(lengths.T)[0, 1] > 0.9
    rates = np.array([[one.acceptance, other.acceptance] for one, other in pairs])
    assert np.corrcoef(rates.T)[0, 1] > 0.9
    for one, other in pairs:
        assert (one.prompt, one.domain, one.is_chat, one.num_prompt_tokens) == (
            other.prompt,
            other.domain,
            other.is_chat,
            other.num_prompt_tokens,
        )
        assert len(one.accepted_lengths) == 6
        assert one.accepted_lengths == sorted(one.accepted_lengths)
        assert 1 <= one.accepted_lengths[0] <= 2


def test_what_fails_is_a_record_that_says_so(
    prompts: list[RouterPrompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collector = Collector(config_of(mode="decode").model_dump(), str(tmp_path))
    too_long = replace(prompts[0], tokens=prompts[0].tokens * 1000)
    records = list(collector.records([too_long, prompts[1]]))
    assert [record.error is None for record in records] == [False] * len(ARMS) + [True] * len(ARMS)
    assert all("more than the context" in (record.error or "") for record in records[: len(ARMS)])

    scorer = Collector(config_of(mode="score").model_dump(), str(tmp_path))
    monkeypatch.setattr(scorer, "_chances", lambda *_: (_ for _ in ()).throw(RuntimeError("CUDA out of memory\nmore")))
    found = {record.arm: record.error for record in scorer.records(prompts[:1])}
    assert found == {NONE: None, **dict.fromkeys(DRAFTS, "RuntimeError: CUDA out of memory")}


def test_a_router_is_tried_beside_its_drafts(prompts: list[RouterPrompt], tmp_path: Path, checkpoint: str) -> None:
    """One for the drafts code, chat and generic."""
    drafts = {name: f"tiny/draft-{name}" for name in ("code", "chat")}
    router = {"draft_models": drafts, "generic_draft": "tiny/draft-generic"}
    config = config_of(mode="decode", router=router, routing={"checkpoint": checkpoint})
    records = list(Collector(config.model_dump(), str(tmp_path)).records(prompts[:2]))
    assert [record.arm for record in records[:5]] == [NONE, "code", "chat", "generic", ADAPTIVE]
    assert all(record.error is None and record.tokens_per_second > 0 for record in records)
    with pytest.raises(ConfigError, match="mode: expected decode to try a router"):
        config_of(mode="score", router=router, routing={"checkpoint": checkpoint})


def test_sampled_scores_are_chances(prompts: list[RouterPrompt], tmp_path: Path) -> None:
    for record in collected(config_of(mode="score", temperature=1.0), prompts, tmp_path).values():
        assert record.arm == NONE or 0 < record.acceptance < 1


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"draft_models": {"code": "tiny/draft-code"}}, r"at least two drafts to choose from, got \['code'\]"),
        ({"draft_models": {"code": "a", "none": "b"}}, "none is an arm of its own"),
    ],
)
def test_arms_that_cannot_be_told_apart_are_refused(router: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(router=router)


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    records = [
        Record("a", "code", 'ü "x"\n', False, 3, "code", 0.5, 7, [1.5, 1.75], 2, 9.5),
        Record("a", "code", 'ü "x"\n', False, 3, NONE, error="it failed"),
    ]
    for name in ("records.json", "folder/part-00000.parquet"):
        write_records(tmp_path / name, records)
        assert read_records(tmp_path / name) == records
    assert read_records(tmp_path / "folder") == records


def test_parts_of_another_configuration_are_refused(tmp_path: Path) -> None:
    parts = Parts(tmp_path, {"K": 3})
    write_records(part_path(tmp_path, 1), [Record("a", "code", "x", False, 1, NONE)])
    assert parts.missing(3) == [0, 2]
    assert parts.paths(2)[1] == part_path(tmp_path, 1)
    assert Parts(tmp_path, {"K": 3}).missing(2) == [0]
    with pytest.raises(ConfigError, match="another configuration: expected a new folder"):
        Parts(tmp_path, {"K": 4})
