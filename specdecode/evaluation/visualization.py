"""Records and their summary in, charts out. Reads nothing else; a chart for which there are no records is not there.

A row of panels is a setting (temperature, verifier, batch size), so that however much was compared nothing is covered.
"""

from collections.abc import Sequence as Several
from dataclasses import dataclass

from specdecode.evaluation.analysis import Summary
from specdecode.evaluation.draft_charts import acceptance_chart, draft_length_chart, routing_chart
from specdecode.evaluation.panels import as_png, css_width, styled
from specdecode.evaluation.records import Record
from specdecode.evaluation.speed_charts import latency_chart, round_time_chart, speed_up_chart, throughput_chart

CHARTS = (
    speed_up_chart,
    throughput_chart,
    latency_chart,
    round_time_chart,
    draft_length_chart,
    acceptance_chart,
    routing_chart,
)


@dataclass(frozen=True)
class Chart:
    """A picture, and what is to be seen on it.

    Attributes:
        name: of its file.
        title, caption: plain text.
        png: the picture.
        width: of the picture where its letters are of the usual size, in CSS pixels.
    """

    name: str
    title: str
    caption: str
    png: bytes
    width: int


def charts(records: Several[Record], summary: Summary) -> list[Chart]:
    """All charts that there is something to draw for; of the same records always the same."""
    with styled():
        drawn = [draw(records, summary) for draw in CHARTS]
        return [
            Chart(one.name, one.title, one.caption, as_png(one.drawing), css_width(one.drawing))
            for one in drawn
            if one is not None
        ]
