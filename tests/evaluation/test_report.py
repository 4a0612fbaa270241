"""A report stands alone, says the worst as large as the best, and is the same for the same run."""

import base64
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from specdecode.config import check_config
from specdecode.errors import ConfigError, ModelError
from specdecode.evaluation.analysis import summarise, summary
from specdecode.evaluation.benchmark import provenance, run_benchmark
from specdecode.evaluation.records import Record
from specdecode.evaluation.report import tiles, write_report
from specdecode.evaluation.suite import BenchmarkConfig
from specdecode.evaluation.tracking import track
from specdecode.training.reporting import WandbConfig
from tests.evaluation.test_analysis import drafted, record
from tests.evaluation.test_visualization import some


class Page(HTMLParser):
    """The addresses and the kinds of elements of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]


def config_of(folder: Path, **changes: Any) -> BenchmarkConfig:
    values = {"target": {"model": "nowhere/at/all"}, "generic_draft": "tiny/draft-generic", "output_dir": str(folder)}
    values |= {"datasets": [{"name": "code", "limit": 2}], "experiments": ["baseline", "generic_draft"]}
    return check_config(values | changes, BenchmarkConfig, where="test")


def written(folder: Path, records: list[Record], **changes: Any) -> str:
    run = provenance(config_of(folder, **changes), 6) | {"started": "2030-01-02 03:04 UTC"}
    write_report(folder, run, records, summary(records))
    return (folder / "report.html").read_text(encoding="utf-8")


def test_a_report_needs_nothing_else(tmp_path: Path) -> None:
    text = written(tmp_path, some("baseline", "generic_draft", "ablation_K"))
    page = Page(text)
    pictures = [base64.b64decode(address.removeprefix("data:image/png;base64,")) for address in page.addresses]
    assert sorted(pictures) == sorted(path.read_bytes() for path in (tmp_path / "charts").iterdir())
    assert len(pictures) == 5
    assert not page.tags & {"script", "link", "iframe", "object"}
    assert not re.search(r"@import|url\(|https?://", text)
    assert "2030-01-02 03:04 UTC" in text
    assert "torch" in text
    assert "nowhere/at/all" in text


def test_the_same_run_gives_the_same_report(tmp_path: Path) -> None:
    records = some("baseline", "generic_draft")
    first = written(tmp_path, records)
    stale = tmp_path / "charts" / "stale.png"
    stale.write_bytes(b"of an earlier run")
    assert written(tmp_path, records) == first
    assert not stale.exists()


def test_the_headline_has_the_best_and_the_worst() -> None:
    plain = [record("baseline", n, 1.0) for n in range(4)]
    fast = [drafted(n, 0.5) for n in range(4)]
    slow = [drafted(n, 2.0, experiment="specialized_drafts", draft="code") for n in range(4)]
    peer = [record("prompt_lookup", n, 0.1) for n in range(4)]  # not ours
    best, worst, same, failed = tiles(summarise([*plain, *fast, *slow, *peer]))
    assert (best.value, best.is_good) == ("2.00x", True)
    assert best.text.startswith("generic_draft, temperature 0, batch 1: 2.00 [2.00, 2.00] times")
    assert (worst.value, worst.is_good) == ("0.50x", False)
    assert (same.value, same.text) == ("identical", "8 of 8 are those of plain decoding, token for token")
    assert (failed.value, failed.is_good) == ("none", True)


def test_the_headline_hides_no_doubt() -> None:
    plain = [record("baseline", n, 1.0) for n in range(4)]
    ours = [drafted(n, seconds) for n, seconds in enumerate([0.4, 1.7, 0.8])]
    failures = [drafted(3, 0.0, tokens=[], error="RuntimeError: out of memory")]
    best, _, same, failed = tiles(summarise([*plain, *ours[:2], drafted(2, 0.8, tokens=[9]), *failures]))
    assert "the interval holds 1: no difference was shown" in best.text
    assert not best.is_good
    assert (same.value, same.is_good) == ("1 of 3 differ", False)
    assert (failed.value, failed.is_good) == ("1", False)


def test_words_of_others_stay_words(tmp_path: Path) -> None:
    told = '<img src="http://x"> & more'
    records = [record("baseline", 0, 1.0, domain=told), drafted(0, 0.0, domain=told, tokens=[], error=f"RuntimeError: {told}")]
    text = written(tmp_path, records)
    assert all(address.startswith("data:") for address in Page(text).addresses)
    assert "1 times: RuntimeError: &lt;img" in text


@pytest.mark.parametrize("missing", ["matplotlib", "wandb"])
def test_what_is_not_installed_is_told_before_models_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    asks = config_of(tmp_path / "asks", logging={"use_wandb": missing == "wandb"})
    with pytest.raises(ConfigError, match=f"expected {missing} to be installed") as caught:
        run_benchmark(asks)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="nowhere/at/all"):
        run_benchmark(config_of(tmp_path / "does not", report=False))


class Logged(SimpleNamespace):
    """What stands for a run of Weights & Biases; it keeps what it is told."""

    def __enter__(self) -> "Logged":
        return self

    def __exit__(self, *_: object) -> None:
        self.is_finished = True

    def log(self, values: dict[str, Any]) -> None:
        self.values = values


def test_results_are_logged_to_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Logged] = []

    def init(**values: Any) -> Logged:
        begun.append(Logged(asked=values, summary={}, is_finished=False))
        return begun[-1]

    stub = ModuleType("wandb")
    stub.__dict__.update(init=init, Table=SimpleNamespace, Image=lambda path: Path(path).name)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    records = some("baseline", "generic_draft")
    found = summary(records)
    pictures = write_report(tmp_path, provenance(config_of(tmp_path), 6), records, found)
    track(WandbConfig(use_wandb=True, project="mine", run_name="first"), {"config": {"K": 3}}, found, pictures)
    [run] = begun
    assert run.asked == {"project": "mine", "name": "first", "job_type": "benchmark", "config": {"config": {"K": 3}}}
    row = next(row for row in found.rows if row.cell.experiment == "generic_draft" and row.domain == "all")
    assert row.speed_up is not None
    assert run.summary["all/generic_draft generic 3 0.0 rejection 1/speed_up"] == row.speed_up.value
    assert run.values["charts/speed_up"] == "speed_up.png"
    table = run.values["results"]
    assert len(table.data) == len(found.rows)
    assert all(len(line) == len(table.columns) for line in table.data)
    assert run.is_finished
