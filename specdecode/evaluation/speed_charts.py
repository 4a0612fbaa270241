"""Records and their summary in; charts of how fast each way to decode is, and where the time goes, out."""

from collections.abc import Callable
from collections.abc import Sequence as Several

import numpy as np
from matplotlib.axes import Axes

from specdecode.evaluation.analysis import Summary, whole
from specdecode.evaluation.cells import cell_of, setting_of
from specdecode.evaluation.figures import Figure
from specdecode.evaluation.panels import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    Drawn,
    by_cell,
    by_experiment,
    colour_of,
    dot,
    error_bars,
    legend_below,
    line_styles,
    logarithmic,
    make_room,
)
from specdecode.evaluation.records import Record
from specdecode.evaluation.suite import BASELINE, Cell


def speed_up_chart(_: Several[Record], summary: Summary) -> Drawn | None:
    rows = {(r.cell, r.domain): r.speed_up for r in summary.rows if r.speed_up and r.cell.experiment != BASELINE}
    if not rows:
        return None
    domains = list(dict.fromkeys(domain for _, domain in rows))
    low = min([1.0, *(figure.low for figure in rows.values())])
    high = max([1.0, *(figure.high for figure in rows.values())])

    def panel(axes: Axes, cells: list[Cell], column: int) -> None:
        for place, cell in enumerate(cells):
            if figure := rows.get((cell, domains[column])):
                dot(axes, place, figure.value, figure.low, figure.high, colour_of(cell), f"{figure.value:.2f}")
        axes.axvline(1, color=BLACK, linewidth=1, linestyle="--")
        axes.set_xlabel("speed-up (times plain)")
        make_room(axes, low, high)

    drawing = by_cell([cell for cell, _ in rows], domains, panel, width=2.7)
    caption = (
        "Generated tokens per second, by those of plain decoding on the same questions (the dashed line at 1). Right of the "
        "line is faster. A bar is a 95 % interval over questions: where it crosses the line, this run cannot tell faster from "
        "slower. Grey ways are transformers' own."
    )
    return Drawn("speed_up", "Speed-up by domain and experiment", caption, drawing)


def throughput_chart(_: Several[Record], summary: Summary) -> Drawn | None:
    speeds: dict[Cell, dict[int, Figure]] = {}  # of cells that differ in nothing but the batch size
    for row in whole(summary.rows):
        if row.tokens_per_second:
            speeds.setdefault(_alone(row.cell), {})[row.cell.batch] = row.tokens_per_second
    speeds = {cell: by_batch for cell, by_batch in speeds.items() if len(by_batch) > 1}
    if not speeds:
        return None
    plain = {cell.temperature: by_batch for cell, by_batch in speeds.items() if cell.experiment == BASELINE}
    ours = [cell for cell in speeds if cell.experiment != BASELINE] or list(speeds)

    def panel(axes: Axes, cells: list[Cell]) -> None:
        if found := plain.get(cells[0].temperature):
            error_bars(axes, found, BLACK, "o", "plain decoding", linestyle="--")
        for (colour, marker), cell in zip(line_styles(cells), cells, strict=True):
            if cell.experiment != BASELINE:
                error_bars(axes, speeds[cell], colour, marker, f"{cell.draft}, K={cell.K}", linestyle="-")
        axes.set_xlabel("batch (answers at once)")
        axes.set_xticks(sorted({batch for cell in cells for batch in speeds[cell]}))

    drawing = by_experiment(ours, _setting_but_batch, panel, "tokens per second, all together", (0, None))
    caption = (
        "Tokens per second of all answers that are decoded together, with 95 % intervals; plain decoding is dashed. Where a "
        "line comes below the dashed one, the batch already keeps the machine busy, and drafting does not pay any more."
    )
    return Drawn("throughput", "Throughput by batch size", caption, drawing)


def latency_chart(records: Several[Record], _: Summary) -> Drawn | None:
    good = [record for record in records if record.error is None]
    measures: dict[str, Callable[[Record], float | None]] = {
        "time to first token (ms)": lambda r: r.ttft_s,
        "time per later token (ms)": _later_token_s,
        "time of the whole answer (ms)": lambda r: r.latency_s,
    }
    spreads: dict[tuple[Cell, str], np.ndarray] = {}
    for cell in dict.fromkeys(map(cell_of, good)):
        mine = [record for record in good if cell_of(record) == cell]
        for name, measure in measures.items():
            if times := [1000 * seconds for seconds in map(measure, mine) if seconds]:
                spreads[cell, name] = np.percentile(times, [5, 25, 50, 75, 95, 99])
    if not spreads:
        return None
    names = list(measures)

    def panel(axes: Axes, cells: list[Cell], column: int) -> None:
        for place, cell in enumerate(cells):
            if (found := spreads.get((cell, names[column]))) is not None:
                _spread(axes, place, found, colour_of(cell))
        logarithmic(axes)
        axes.set_xlabel(names[column])

    drawing = by_cell([cell for cell, _ in spreads], names, panel, width=3.4, titles=[""] * len(names))
    caption = (
        "The spread over answers: the dot is the median, the thick bar holds the middle half, the thin one 90 %, and the tick "
        "is the 99th percentile. Left is better; scales are logarithmic. The time per later token is that of all rounds after "
        "the first by their tokens, which come in bursts, one for each round."
    )
    return Drawn("latency", "Latency", caption, drawing)


def round_time_chart(records: Several[Record], _: Summary) -> Drawn | None:
    sums: dict[Cell, np.ndarray] = {}
    for r in records:
        if r.error is None and r.verify_time_s:
            spent = [r.draft_time_s, r.verify_time_s, r.latency_s - r.draft_time_s - r.verify_time_s]
            found = np.array([1000 * seconds for seconds in spent] + [len(r.tokens), len(r.round_tokens)])
            sums[cell_of(r)] = sums.get(cell_of(r), 0) + found
    if not sums:
        return None
    means = {cell: found[:-1] / found[-1] for cell, found in sums.items()}
    longest = max(found[:3].sum() for found in means.values())

    def panel(axes: Axes, cells: list[Cell], _: int) -> None:
        values = np.array([means[cell] for cell in cells])
        before = np.zeros(len(cells))
        for column, (label, colour) in enumerate((("draft", ORANGE), ("verify", BLUE), ("rest", GREY))):
            axes.barh(range(len(cells)), values[:, column], left=before, color=colour, label=label, height=0.7)
            before += values[:, column]
        for place, (end, tokens) in enumerate(zip(before, values[:, 3], strict=True)):
            axes.text(end + 0.01 * longest, place, f"{tokens:.2f} tokens", va="center", fontsize=8.5)
        axes.set_xlim(0, 1.2 * longest)
        axes.set_xlabel("time of a round (ms)")

    drawing = by_cell(list(means), [""], panel, width=7.5)
    legend_below(drawing, drawing.axes[0])
    caption = (
        "Where the time of a round goes on average, its share of reading the prompt included, and how many tokens a round "
        "gives. Drafting pays where tokens grow more than the bar does. To verify is to score and accept; the rest is what "
        "the loop itself takes, such as choosing a draft. Transformers' own ways do not tell these times."
    )
    return Drawn("round_time", "Where a round's time goes", caption, drawing)


def _alone(cell: Cell) -> Cell:
    """The cell as if it answered one question at a time."""
    return Cell(cell.experiment, cell.draft, cell.K, cell.temperature, cell.verifier, 1)


def _setting_but_batch(cell: Cell) -> str:
    return setting_of(cell).rpartition(",")[0]


def _spread(axes: Axes, place: int, percentiles: np.ndarray, colour: str) -> None:
    """Percentiles 5, 25, 50, 75, 95 and 99 on a line."""
    low, early, middle, late, high, last = percentiles
    axes.hlines(place, low, high, color=colour, linewidth=1.4)
    axes.hlines(place, early, late, color=colour, linewidth=5)
    axes.plot([middle], [place], "o", color="white", markeredgecolor=colour, markersize=5.5)
    axes.plot([last], [place], "|", color=colour, markersize=8)


def _later_token_s(record: Record) -> float | None:
    """Seconds for each token after the first round."""
    later = sum(record.round_tokens[1:])
    return (record.latency_s - record.ttft_s) / later if later else None
