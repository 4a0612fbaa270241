"""What all charts share: a row of panels for each setting, colours, marks, and the PNG. Knows nothing of records.

Drawings are made without pyplot, which would keep them and look for a screen.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Several
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from specdecode.evaluation.cells import cell_names, in_order, setting_of
from specdecode.evaluation.figures import Figure
from specdecode.evaluation.suite import BASELINE, Cell

# Okabe and Ito, Color Universal Design: told apart with any kind of colour vision. Its yellow is left out, too faint on white.
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#8A8A8A"
LINES = tuple(zip((BLUE, ORANGE, GREEN, PURPLE, RED, SKY, GREY), ("o", "s", "^", "D", "v", "P", "X"), strict=True))
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.parse_math": False,  # a dollar in a name is one
    "figure.dpi": 144,
}
_NUM_COLUMNS = 4  # of panels, before the next row begins
_LINE_INCHES = 0.27  # of a named line
_AROUND_INCHES = 1.05  # a panel's title, ticks and axis
_BETWEEN_INCHES = 0.1  # panels, on each side
_COLOURS = {
    BASELINE: BLACK,
    "generic_draft": ORANGE,
    "specialized_drafts": BLUE,
    "adaptive_routing": RED,
    "ablation_K": GREEN,
}  # transformers' own are grey


@dataclass(frozen=True)
class Drawn:
    """A drawing, the name of its file, and in plain text its title and what is to be seen on it."""

    name: str
    title: str
    caption: str
    drawing: Drawing


@contextmanager
def styled() -> Iterator[None]:
    """Within, what is drawn has one look; afterwards the settings of whoever calls are as before."""
    with matplotlib.rc_context(_STYLE):
        yield


def grid(num_panels: int, heights: Several[float], width: float, *, share_y: bool = False) -> tuple[Drawing, list[list[Axes]]]:
    """A drawing with so many panels for each of the heights, of which a row has few enough to be read; all in inches."""
    num_columns = min(num_panels, _NUM_COLUMNS)
    num_lines = -(-num_panels // num_columns)
    all_heights = [height for height in heights for _ in range(num_lines)]
    drawing = Drawing(figsize=(num_columns * width, sum(all_heights)))
    FigureCanvasAgg(drawing)
    drawing.set_layout_engine("constrained", h_pad=_BETWEEN_INCHES, w_pad=_BETWEEN_INCHES / 2)
    axes = drawing.subplots(len(all_heights), num_columns, squeeze=False, sharey=share_y, height_ratios=all_heights).reshape(
        len(heights), -1
    )
    for spare in axes[:, num_panels:].flat:
        spare.set_axis_off()
    return drawing, axes[:, :num_panels].tolist()


def lines_height(count: float) -> float:
    """Inches of a panel with so many named lines."""
    return count * _LINE_INCHES + _AROUND_INCHES


def name_lines(axes: Axes, names: Several[str], column: int = 0) -> None:
    """Names on the left of a panel's lines, the first on top; where another panel stands there, none."""
    axes.set_yticks(range(len(names)), [""] * len(names) if column % _NUM_COLUMNS else names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")


def dot(axes: Axes, place: int, value: float, low: float, high: float, colour: str, text: str) -> None:
    """A value with its interval on a line, and the value in figures on the right."""
    axes.hlines(place, low, high, color=colour, linewidth=2.2)
    axes.plot([value], [place], "o", color=colour, markersize=5.5)
    axes.text(1.0, place, text, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=8.5)


def make_room(axes: Axes, low: float, high: float) -> None:
    """Leaves the right quarter of a panel to figures."""
    span = (high - low) or 1.0
    axes.set_xlim(low - 0.05 * span, high + 0.4 * span)


def logarithmic(axes: Axes) -> None:
    """The x axis in powers of ten, with 1, 2 and 5 told."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.tick_params(axis="x", labelsize=8)


def legend_below(drawing: Drawing, axes: Axes) -> None:
    """What colours and marks stand for, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))


def as_png(drawing: Drawing) -> bytes:
    """The same drawing gives the same bytes: there is no date and no version in them."""
    file = io.BytesIO()
    drawing.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def by_cell(
    cells: list[Cell],
    columns: list[str],
    panel: Callable[[Axes, list[Cell], int], None],
    width: float,
    titles: list[str] | None = None,
) -> Drawing:
    """A named line for each cell; a row of panels for each setting, and a panel for each column."""
    settings = _grouped(cells, setting_of)
    drawing, rows = grid(len(columns), [lines_height(len(found)) for found in settings.values()], width)
    for (setting, found), row in zip(settings.items(), rows, strict=True):
        names = list(cell_names(found).values())
        for column, (axes, title) in enumerate(zip(row, titles or columns, strict=True)):
            panel(axes, found, column)
            name_lines(axes, names, column)
            axes.set_title(title)
        if len(settings) > 1:
            _name_setting(row[0], setting)
    return drawing


def by_experiment(
    cells: list[Cell],
    setting: Callable[[Cell], str],
    panel: Callable[[Axes, list[Cell]], None],
    label: str,
    limits: tuple[float, float | None],
) -> Drawing:
    """A panel for each experiment, with a line for each of its cells; a row of panels for each setting."""
    settings, experiments = _grouped(cells, setting), list(dict.fromkeys(cell.experiment for cell in in_order(cells)))
    drawing, rows = grid(len(experiments), [3.1] * len(settings), 2.9, share_y=True)
    for (name, found), row in zip(settings.items(), rows, strict=True):
        for axes, experiment in zip(row, experiments, strict=True):
            mine = [cell for cell in found if cell.experiment == experiment]
            axes.set_title(experiment)
            if mine:
                panel(axes, mine)
                axes.legend(loc="best")
            else:
                axes.set_axis_off()
        if len(settings) > 1:
            _name_setting(row[0], name)
        row[0].set_ylabel(label)
        row[0].set_ylim(*limits)
    return drawing


def css_width(drawing: Drawing) -> int:
    """The width at which a browser shows letters at the size that they have here."""
    return round(96 * drawing.get_figwidth())


def error_bars(
    axes: Axes, figures: dict[int, Figure] | dict[float, Figure], colour: str, marker: str, label: str, linestyle: str
) -> None:
    """A line or points with intervals."""
    values = [figure.value for figure in figures.values()]
    off = [[one.value - one.low for one in figures.values()], [one.high - one.value for one in figures.values()]]
    axes.errorbar(list(figures), values, off, color=colour, marker=marker, label=label, linestyle=linestyle, capsize=3)


def colour_of(cell: Cell) -> str:
    """The same for an experiment on every chart."""
    return _COLOURS.get(cell.experiment, GREY)


def line_styles(cells: list[Cell]) -> list[tuple[str, str]]:
    """A colour and a mark for each line of a panel."""
    return [LINES[place % len(LINES)] for place in range(len(cells))]


def _name_setting(axes: Axes, setting: str) -> None:
    """Over the title of the first panel of a row."""
    points = 21 if axes.get_title(loc="left") else 6
    axes.annotate(setting, (0, 1), xytext=(0, points), xycoords="axes fraction", textcoords="offset points", fontweight="bold")


def _grouped(cells: Iterable[Cell], key: Callable[[Cell], str]) -> dict[str, list[Cell]]:
    groups: dict[str, list[Cell]] = {}
    for cell in in_order(cells):
        groups.setdefault(key(cell), []).append(cell)
    return groups
