"""Charts show what there is and nothing else, are the same for the same records, and no word on them covers another."""

import random
from collections.abc import Iterator
from itertools import combinations

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from specdecode.evaluation.analysis import summary
from specdecode.evaluation.panels import Drawn, styled
from specdecode.evaluation.records import Record
from specdecode.evaluation.visualization import CHARTS, charts
from tests.evaluation.test_analysis import drafted, record

ALL_CHARTS = {"speed_up", "throughput", "latency", "round_time", "draft_length", "acceptance", "routing"}


def made_up(
    domains: list[str], batches: list[int], temperatures: tuple[float, ...] = (0.0,), num_questions: int = 3
) -> list[Record]:
    """Every experiment of ours on a few questions of each domain, and a peer."""
    rng, records = random.Random(0), []
    for batch in batches:
        for temperature in temperatures:
            for n in range(num_questions * len(domains)):
                about = {"domain": domains[n % len(domains)], "batch": batch, "temperature": temperature}
                ways = [("generic_draft", "generic", 3, "generic"), ("adaptive_routing", "auto", 3, rng.choice(domains))]
                ways += [("specialized_drafts", name, 3, name) for name in domains]
                ways += [("ablation_K", "own", k, domains[n % len(domains)]) for k in (3, 5)]
                records += [record(name, n, rng.uniform(1, 2), **about) for name in ("baseline", "hf_plain")]
                for experiment, draft, k, drafter in ways:
                    told = {"draft": draft, "K": k, "drafter": drafter, **about}
                    records.append(drafted(n, rng.uniform(0.5, 2), experiment=experiment, **told))
    return records


def some(*experiments: str, domains: tuple[str, ...] = ("code", "chat")) -> list[Record]:
    return [one for one in made_up(list(domains), [1]) if one.experiment in experiments]


def drawn(records: list[Record]) -> Iterator[Drawn]:
    told = summary(records)
    with styled():
        for draw in CHARTS:
            if (found := draw(records, told)) is not None:
                FigureCanvasAgg(found.drawing).draw()
                yield found


def words(axes: Axes) -> Iterator[Text]:
    """All that is written on a panel that is there; ticks beyond its ends are not."""
    if axes.axison:
        yield from [child for child in axes.get_children() if isinstance(child, Text)]
        yield from [axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            yield from (tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high)
        if legend := axes.get_legend():
            yield from legend.get_texts()


@pytest.fixture(scope="module")
def all_drawn() -> list[Drawn]:
    return list(drawn(made_up(["code", "chat"], [1, 2])))


def test_there_is_a_chart_for_all_that_was_compared(all_drawn: list[Drawn]) -> None:
    assert {found.name for found in all_drawn} == ALL_CHARTS
    assert all(found.title and found.caption.endswith(".") for found in all_drawn)


def test_every_axis_says_what_it_is_of_and_in_what_unit(all_drawn: list[Drawn]) -> None:
    panels = [axes for found in all_drawn for axes in found.drawing.axes if axes.axison]
    assert all(axes.get_xlabel() for axes in panels)
    labels = {axes.get_xlabel() for axes in panels}
    assert {"time to first token (ms)", "time of a round (ms)", "speed-up (times plain)"} <= labels


@pytest.mark.parametrize(
    ("experiments", "names"),
    [
        ({"baseline"}, {"latency"}),  # made-up plain answers do not tell what their rounds took
        ({"baseline", "hf_plain"}, {"latency", "speed_up"}),
        ({"baseline", "generic_draft"}, {"latency", "speed_up", "round_time", "acceptance"}),
        ({"ablation_K"}, {"latency", "round_time", "acceptance", "draft_length"}),
    ],
)
def test_what_was_not_measured_has_no_chart(experiments: set[str], names: set[str]) -> None:
    assert {found.name for found in drawn(some(*experiments, domains=("code",)))} == names


def test_nothing_is_drawn_of_failures_alone() -> None:
    failed = [drafted(0, 0.0, tokens=[], round_tokens=[], num_drafted=0, error="RuntimeError: out of memory")]
    assert charts(failed, summary(failed)) == []


def test_the_same_records_give_the_same_bytes() -> None:
    records = some("baseline", "ablation_K", domains=("code",))
    first, second = (charts(records, summary(records)) for _ in range(2))
    assert first == second
    assert all(chart.png.startswith(b"\x89PNG") for chart in first)


@pytest.mark.parametrize(
    ("domains", "batches", "temperatures"),
    [
        (["code"], [1], (0.0,)),
        (["code", "chat", "reasoning"], [1, 4], (0.0, 1.0)),
        ([f"a longer $domain_{n}^" for n in range(5)], [1, 2], (0.0,)),
    ],
)
def test_no_word_covers_another(domains: list[str], batches: list[int], temperatures: tuple[float, ...]) -> None:
    for found in drawn(made_up(domains, batches, temperatures, num_questions=1)):
        texts = [text for axes in found.drawing.axes for text in words(axes)]
        texts += [text for legend in found.drawing.legends for text in legend.get_texts()]
        boxes = [
            (text.get_text(), text.get_window_extent().padded(-1))
            for text in texts
            if text.get_visible() and text.get_text().strip()
        ]
        covered = [(one, other) for (one, here), (other, there) in combinations(boxes, 2) if here.overlaps(there)]
        assert (found.name, covered) == (found.name, [])
