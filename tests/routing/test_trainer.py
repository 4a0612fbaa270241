"""A router learns from records which draft is fastest on prompts that it has not seen."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specdecode.errors import ConfigError, ModelError
from specdecode.routing.features import Features
from specdecode.routing.model import AcceptanceModel
from specdecode.routing.records import ADAPTIVE, NONE, write_records
from specdecode.routing.report import RouterReportConfig, predicted_speeds, report_on
from specdecode.routing.trainer import RouterTrainingConfig, train_router
from tests.routing.made import TRUE, WORDS, K, made_records


def config_of(tmp_path: Path, encoder: str, records: Any = None, **values: Any) -> RouterTrainingConfig:
    write_records(tmp_path / "records.parquet", made_records(300) if records is None else records)
    told = {"records": [str(tmp_path / "records.parquet")], "output_dir": str(tmp_path / "router"), "encoder": encoder}
    return RouterTrainingConfig(**(told | {"device": "cpu", "num_epochs": 40} | values))


def test_a_router_chooses_as_well_as_one_that_knows(tmp_path: Path, encoder: str) -> None:
    write_records(tmp_path / "test.json", made_records(120, seed=1))
    found = train_router(config_of(tmp_path, encoder, test_records=[str(tmp_path / "test.json")]))
    policies = {policy.name: policy for policy in found.policies}

    assert found.num_prompts == 120
    assert policies["adaptive"].accuracy > 0.95
    assert policies["adaptive"].to_oracle > 0.98
    assert policies["oracle"].to_oracle == policies["oracle"].accuracy == 1
    assert policies["domain"].domain_accuracy == 1
    assert policies["adaptive"].domain_accuracy is not None
    assert policies["adaptive"].domain_accuracy > 0.95
    assert policies["domain"].tokens_per_second >= max(p.tokens_per_second for n, p in policies.items() if "always" in n)
    single = [policy for name, policy in policies.items() if name.startswith("always")]
    assert all(policy.tokens_per_second < policies["adaptive"].interval[0] for policy in single)
    assert policies["random"].tokens_per_second < policies["centroid"].tokens_per_second
    assert all(error.absolute < 0.1 for error in found.errors)
    for arm in ("code", "chat"):
        assert found.speeds[arm][arm] > found.speeds["generic"][arm] > found.speeds[NONE][arm]


def test_a_router_that_was_tried_itself_is_reported_beside_its_choice(tmp_path: Path, encoder: str) -> None:
    tried = [replace(r, arm=ADAPTIVE, tokens_per_second=1.5) for r in made_records(60, seed=1) if r.arm == NONE]
    write_records(tmp_path / "test.json", made_records(60, seed=1) + tried)
    found = train_router(config_of(tmp_path, encoder, test_records=[str(tmp_path / "test.json")], num_epochs=3))
    policies = {policy.name: policy for policy in found.policies}
    assert policies["adaptive, decoded"].tokens_per_second == pytest.approx(1.5)
    assert policies["adaptive, decoded"].domain_accuracy is None
    assert found.speeds.keys() == {"code", "chat", "generic", NONE}


def test_a_router_that_was_trained_before_is_reported_on(tmp_path: Path, encoder: str) -> None:
    """The same figures as its training gave, and how they compare with plain decoding's."""
    write_records(tmp_path / "test.json", made_records(60, seed=1))
    config = config_of(tmp_path, encoder, test_records=[str(tmp_path / "test.json")], validation_share=0.01, num_epochs=3)
    first = train_router(config)
    told = {"checkpoint": config.output_dir, "records": config.records, "test_records": config.test_records}
    found = report_on(RouterReportConfig(**told))

    assert found.errors == first.errors
    assert found.speeds == first.speeds
    policies = {policy.name: policy for policy in found.policies}
    assert policies["oracle"] == {policy.name: policy for policy in first.policies}["oracle"]
    assert policies[f"always {NONE}"].to_plain == 1
    assert policies["adaptive"].to_plain == pytest.approx(policies["adaptive"].tokens_per_second)  # plain has one a second
    low, high = policies["adaptive"].to_plain_interval
    assert 1 < low < policies["adaptive"].to_plain < high


def test_a_report_on_records_of_other_arms_is_refused(tmp_path: Path, encoder: str) -> None:
    config = config_of(tmp_path, encoder, num_epochs=1)
    train_router(config)
    write_records(tmp_path / "test.json", [r for r in made_records(30, seed=1) if r.arm != "chat"])
    told = {"checkpoint": config.output_dir, "records": config.records, "test_records": [str(tmp_path / "test.json")]}
    with pytest.raises(ConfigError, match=r"test_records: expected records of the arms \['chat', 'code', 'generic'\]"):
        report_on(RouterReportConfig(**told))


def test_the_checkpoint_says_what_it_is_for(tmp_path: Path, encoder: str) -> None:
    config = config_of(tmp_path, encoder)
    train_router(config)
    model = AcceptanceModel.load(config.output_dir, ["generic", "chat", "code"])

    assert model.about.arms == ["chat", "code", "generic"]
    assert model.about.features[-8:][0] == "prompt_length"
    assert model.about.provenance["config"]["records"] == config.records
    assert model.about.provenance["report"]["num_prompts"] > 20
    assert all(1 <= weight <= 50 for weight in model.about.weights)
    features = Features(encoder, device="cpu").of([" ".join(words) for words in WORDS.values()], [10] * 3, [False, True, True])
    expected = model.predict(features)
    for row, domain in zip(expected, WORDS, strict=True):
        assert dict(zip(model.about.arms, row, strict=True)) == pytest.approx(TRUE[domain], abs=0.15)
    with pytest.raises(ModelError, match=r"is one for the drafts \['chat', 'code', 'generic'\]: expected one for \['code'\]"):
        AcceptanceModel.load(config.output_dir, ["code"])


def test_what_never_differed_in_training_changes_nothing(tmp_path: Path, encoder: str) -> None:
    """All prompts had 10 tokens."""
    config = config_of(tmp_path, encoder, num_epochs=2)
    train_router(config)
    model, features = AcceptanceModel.load(config.output_dir), Features(encoder, device="cpu")
    short, long = (model.predict(features.of(["def class"], [length], [False])) for length in (10, 2000))
    np.testing.assert_array_equal(short, long)


def test_two_trainings_are_equal(tmp_path: Path, encoder: str) -> None:
    assert train_router(config_of(tmp_path, encoder, num_epochs=3)) == train_router(config_of(tmp_path, encoder, num_epochs=3))


def test_prompts_of_which_an_arm_is_not_known_are_learned_from(tmp_path: Path, encoder: str) -> None:
    """As where served traffic says only what the chosen draft did."""
    records = [record for number, record in enumerate(made_records(300)) if number % 4 != 1 or number % 3]
    failed = [replace(record, error="CUDA out of memory", acceptance=0.0) for record in records[::50]]
    found = train_router(config_of(tmp_path, encoder, records + failed))
    assert {policy.name: policy for policy in found.policies}["adaptive"].to_oracle > 0.95


def test_speeds_are_those_of_the_formula() -> None:
    speeds = predicted_speeds(np.array([0.5, 0.9]), K, np.array([1.0, 2.0, 0.5]))
    assert speeds.tolist() == pytest.approx([sum(0.5**n for n in range(K + 1)), sum(0.9**n for n in range(K + 1)) / 2, 2.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda records: [r for r in records if r.arm in ("code", NONE)], "at least two drafts, got \\['code'\\]"),
        (lambda records: [replace(r, prompt="") for r in records], "expected some with a prompt and without an error"),
        (
            lambda records: [r for n, r in enumerate(records) if r.arm == ("code", "chat")[n // 4 % 2]],
            r"that each of \['chat', 'code'\] was tried on",
        ),
        (lambda _: [], "expected records, found none"),
        (lambda records: [*records, replace(records[0], acceptance=float("nan"))], "expected finite figures"),
        (lambda records: [*records, replace(records[0], acceptance=1.5)], r"expected a number in \[0, 1\], got 1.5"),
    ],
)
def test_records_that_cannot_be_used_are_refused(tmp_path: Path, encoder: str, change: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_router(config_of(tmp_path, encoder, change(made_records(30))))


def test_prompts_that_are_reported_on_are_not_learned_from(tmp_path: Path, encoder: str) -> None:
    write_records(tmp_path / "test.json", made_records(60, seed=1))
    told = {"test_records": [str(tmp_path / "test.json")], "num_epochs": 2}
    apart = train_router(config_of(tmp_path, encoder, **told))
    both = made_records(300) + [replace(record, acceptance=0.01) for record in made_records(60, seed=1)]
    assert train_router(config_of(tmp_path, encoder, both, **told)) == apart


def test_records_of_nothing_but_test_prompts_are_refused(tmp_path: Path, encoder: str) -> None:
    config = config_of(tmp_path, encoder, test_records=[str(tmp_path / "records.parquet")])
    with pytest.raises(ConfigError, match="expected prompts that are not in test_records too, got none"):
        train_router(config)


def test_test_records_of_other_arms_are_refused(tmp_path: Path, encoder: str) -> None:
    write_records(tmp_path / "test.json", [r for r in made_records(30, seed=1) if r.arm != "chat"])
    with pytest.raises(ConfigError, match="expected records of the arms"):
        train_router(config_of(tmp_path, encoder, test_records=[str(tmp_path / "test.json")]))


def test_a_file_that_is_none_is_one_line(tmp_path: Path, encoder: str) -> None:
    (tmp_path / "bad.parquet").write_text("no parquet")
    config = config_of(tmp_path, encoder).model_copy(update={"records": [str(tmp_path / "bad.parquet")]})
    with pytest.raises(ConfigError, match="cannot be read as records") as caught:
        train_router(config)
    assert "\n" not in str(caught.value)
