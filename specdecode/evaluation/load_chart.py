"""A load's summary in, a PNG of throughput and times against the load out. matplotlib is an extra."""

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from specdecode.evaluation.figures import Figure
from specdecode.evaluation.load_analysis import LoadRow, LoadSummary, Percentiles
from specdecode.evaluation.panels import LINES, as_png, error_bars, grid, legend_below, styled

_AXES = {"concurrency": "clients at a time (closed loop)", "rate": "requests a second that arrive (open loop)"}


def draw_load(summary: LoadSummary, path: Path) -> None:
    """Writes a row of panels for closed loops and one for open ones, of those that there are."""
    kinds = [kind for kind in _AXES if any(row.kind == kind for row in summary.rows)]
    with styled():
        drawing, rows = grid(3, [3.1] * len(kinds), 3.6)
        for kind, (throughput, first, later) in zip(kinds, rows, strict=True):
            found = [row for row in summary.rows if row.kind == kind]
            _lines(throughput, found, {"": lambda row: row.tokens_per_second}, "tokens per second, all together")
            _lines(first, found, _spread(lambda row: row.ttft_ms), "time to first token (ms)")
            _lines(later, found, _spread(lambda row: row.tpot_ms), "time per later token (ms)")
            throughput.set_ylim(0, None)
            for axes in (first, later):
                _logarithmic(axes)
        legend_below(drawing, rows[0][1])
        path.write_bytes(as_png(drawing))


_Value = Callable[[LoadRow], Figure | None]


def _spread(times: Callable[[LoadRow], Percentiles | None]) -> dict[str, _Value]:
    def take(share: str) -> _Value:
        return lambda row: None if (found := times(row)) is None else getattr(found, share)

    return {"p50": take("p50"), "p99": take("p99")}


def _lines(axes: Axes, rows: list[LoadRow], values: dict[str, _Value], label: str) -> None:
    """A line for each arm and value, whose intervals are of the turns; the second value's lines are broken."""
    for (colour, marker), arm in zip(LINES, dict.fromkeys(row.arm for row in rows), strict=False):
        for style, (name, value) in zip(("-", "--"), values.items(), strict=False):
            figures = {row.load: figure for row in rows if row.arm == arm and (figure := value(row)) is not None}
            if figures:
                error_bars(axes, figures, colour, marker, f"{arm} {name}".strip(), linestyle=style)
    loads = sorted({row.load for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(loads, [f"{load:g}" for load in loads])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(_AXES[rows[0].kind])
    axes.set_ylabel(label)


def _logarithmic(axes: Axes) -> None:
    """The y axis, with 1, 2 and 5 told."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
