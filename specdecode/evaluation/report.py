"""A run and its summary in, `charts/*.png` and one `report.html` out that needs no other file and no network.

The same run gives the same bytes: there is no clock in a report but the run's own.
"""

import base64
from collections import Counter
from collections.abc import Sequence as Several
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from specdecode.evaluation.analysis import Row, Summary, whole
from specdecode.evaluation.cells import cell_names, setting_of
from specdecode.evaluation.figures import Figure
from specdecode.evaluation.records import Record
from specdecode.evaluation.suite import BASELINE
from specdecode.evaluation.visualization import charts

CHARTS = "charts"
_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_NUM_LEFT = 6  # columns of words in the tables; the others are figures


@dataclass(frozen=True)
class Tile:
    """A finding that a reader takes away.

    Attributes:
        label: what it is about.
        value: in a word.
        text: what that is of.
        is_good: whether it is as one hopes.
    """

    label: str
    value: str
    text: str
    is_good: bool


def write_report(folder: str | Path, run: dict[str, Any], records: Several[Record], summary: Summary) -> list[Path]:
    """Writes the charts, which replace those of an earlier report, and the report.

    Args:
        folder: the results' one.
        run: how they came about; see `benchmark.provenance`.
        records: of the run.
        summary: of the records.

    Returns:
        where the charts are, in the order in which they are shown.
    """
    drawn = charts(records, summary)
    to = Path(folder) / CHARTS
    to.mkdir(exist_ok=True)
    for earlier in to.glob("*.png"):
        earlier.unlink()
    for chart in drawn:
        (to / f"{chart.name}.png").write_bytes(chart.png)
    shown = [{**asdict(one), "png": base64.b64encode(one.png).decode()} for one in drawn]
    page = _template().render(
        tiles=tiles(summary.rows),
        notes=_notes(summary),
        charts=shown,
        whole=_table(whole(summary.rows)),
        by_domain=_table([row for row in summary.rows if row not in whole(summary.rows)]),
        num_left=_NUM_LEFT,
        failures=Counter(record.error for record in records if record.error is not None).most_common(),
        run=run,
        config=yaml.safe_dump(run["config"], sort_keys=False, allow_unicode=True),
        num_records=len(records),
    )
    (Path(folder) / "report.html").write_text(page, encoding="utf-8")
    return [to / f"{chart.name}.png" for chart in drawn]


def tiles(rows: Several[Row]) -> list[Tile]:
    """The headline: the best, and as large the worst; whether answers are the plain ones; and what failed."""
    ours = [row for row in whole(rows) if row.speed_up is not None and _is_ours(row)]
    found = []
    if ours:
        best, worst = (pick(ours, key=_speed_up) for pick in (max, min))
        found = [_speed_tile("fastest experiment", best, rows), _speed_tile("slowest experiment", worst, rows)]
    greedy = [row for row in whole(rows) if row.num_compared is not None and _is_ours(row)]
    if greedy:
        num_different, num_compared = (
            sum(getattr(row, name) or 0 for row in greedy) for name in ("num_different", "num_compared")
        )
        told = f"{num_different} of {num_compared} differ" if num_different else "identical"
        same = f"{num_compared - num_different:,} of {num_compared:,} are those of plain decoding, token for token"
        found.append(Tile("greedy answers", told, same, num_different == 0))
    num_errors = sum(row.num_errors for row in whole(rows))
    num_all = num_errors + sum(row.num_answers for row in whole(rows))
    text = f"of {num_all:,} answers; what failed is part of no other figure"
    return [*found, Tile("failures", f"{num_errors:,}" if num_errors else "none", text, num_errors == 0)]


def _is_ours(row: Row) -> bool:
    return row.cell.experiment != BASELINE and not row.cell.experiment.startswith(("hf_", "prompt_lookup"))


def _speed_up(row: Row) -> float:
    assert row.speed_up is not None
    return row.speed_up.value


def _speed_tile(label: str, row: Row, rows: Several[Row]) -> Tile:
    figure = row.speed_up
    assert figure is not None
    name = cell_names(other.cell for other in rows if setting_of(other.cell) == setting_of(row.cell))[row.cell]
    doubt = "" if figure.low > 1 or figure.high < 1 else "; the interval holds 1: no difference was shown"
    text = f"{name}, {setting_of(row.cell)}: {figure.told()} times as fast as plain decoding{doubt}"
    return Tile(label, f"{figure.value:.2f}x", text, figure.low > 1)


def _notes(summary: Summary) -> list[str]:
    """What the headline would hide: the worst domain, transformers' own ways, and the router's regret."""
    notes = []
    rows = [row for row in summary.rows if row.speed_up is not None]
    ours = [row for row in rows if _is_ours(row)]
    if ours:
        worst = min(ours, key=_speed_up)
        notes.append(f"Lowest in a single domain: {_told(worst, rows)} in {worst.domain}.")
    peers = [row for row in whole(rows) if row.cell.experiment != BASELINE and not _is_ours(row)]
    if peers:
        notes.append(
            "Transformers' own, against the same plain decoding: " + "; ".join(_told(row, rows) for row in peers) + "."
        )
    if (found := summary.routing) is not None:
        notes.append(
            f"The router loses {found.regret.told('.1%')} to the fastest choice for each question in hindsight, and is "
            f"{found.to_best_single.told()} times as fast as {found.best_single}, the best single one."
        )
    return notes


def _told(row: Row, rows: Several[Row]) -> str:
    name = cell_names([other.cell for other in rows if setting_of(other.cell) == setting_of(row.cell)])[row.cell]
    setting = f" ({setting_of(row.cell)})" if len({setting_of(other.cell) for other in rows}) > 1 else ""
    return f"{name}{setting} {_interval(row.speed_up)}"


def _table(rows: Several[Row]) -> list[dict[str, str]]:
    return [_columns(row) for row in rows]


def _columns(row: Row) -> dict[str, str]:
    cell = row.cell
    return {
        "experiment": cell.experiment,
        "draft": cell.draft,
        "K": str(cell.K),
        "temperature": f"{cell.temperature:g}",
        "verifier": cell.verifier,
        "domain": row.domain,
        "batch": str(cell.batch),
        "answers": str(row.num_answers),
        "failed": str(row.num_errors),
        "tokens/s": _interval(row.tokens_per_second, ".1f"),
        "speed-up": _interval(row.speed_up),
        "acceptance": _interval(row.acceptance, ".3f"),
        "tokens/pass": _interval(row.tokens_per_pass),
        "first token ms": _percentiles(row.ttft_ms),
        "gap ms": _percentiles(row.gap_ms),
        "answer ms": _percentiles(row.latency_ms),
        "drafting": f"{row.draft_share:.1%}",
        "verifying": f"{row.verify_share:.1%}",
        "right": _interval(row.right, ".1%"),
        "perplexity": "" if row.perplexity is None else f"{row.perplexity:.2f}",
        "different": "" if row.num_different is None else f"{row.num_different} of {row.num_compared}",
    }


def _interval(figure: Figure | None, form: str = ".2f") -> str:
    return "" if figure is None else figure.told(form)


def _percentiles(found: tuple[float, float] | None) -> str:
    return "" if found is None else f"{found[0]:.1f} / {found[1]:.1f}"


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
