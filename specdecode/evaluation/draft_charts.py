"""Records and their summary in; charts of how long drafts should be, how far they are right, and who was asked, out."""

from collections.abc import Sequence as Several

import numpy as np
from matplotlib.axes import Axes

from specdecode.evaluation.analysis import Summary, acceptance_by_position, whole
from specdecode.evaluation.cells import ALL, is_baseline_of, setting_of
from specdecode.evaluation.figures import Figure
from specdecode.evaluation.panels import (
    BLACK,
    BLUE,
    GREEN,
    RED,
    Drawn,
    by_experiment,
    dot,
    error_bars,
    grid,
    legend_below,
    line_styles,
    lines_height,
    make_room,
    name_lines,
)
from specdecode.evaluation.records import Record
from specdecode.evaluation.regret import routing
from specdecode.evaluation.suite import Cell

_NUM_LETTERS = 50  # that fit under a panel
_NUM_BEYOND = 3  # predicted draft lengths that are shown beyond the measured ones and the best


def draft_length_chart(_: Several[Record], summary: Summary) -> Drawn | None:
    curves = summary.lengths
    if not curves:
        return None
    drawing, [panels] = grid(len(curves), [3.7], 3.6)
    for curve, axes in zip(curves, panels, strict=True):
        shown = [k for k in curve.predicted if k <= max(curve.cell.K, *curve.measured) + _NUM_BEYOND]
        axes.plot(shown, [curve.predicted[k] for k in shown], "-", color=BLUE, label="predicted")
        axes.axvline(curve.cell.K, color=BLUE, linewidth=1, linestyle=":", label="predicted optimum")
        error_bars(axes, curve.measured, GREEN, "o", "measured", linestyle="none")
        for row in whole(summary.rows):
            if row.tokens_per_second and is_baseline_of(row.cell, curve.cell):
                axes.axhline(row.tokens_per_second.value, color=BLACK, linewidth=1, linestyle="--", label="plain decoding")
        axes.set_title(f"{setting_of(curve.cell)}\nK = {curve.cell.K} is predicted to be best")
        axes.set_xlabel("K (drafted tokens per round)")
        axes.set_ylabel("tokens per second")
        axes.set_xticks(shown[:: 1 + len(shown) // 12])
        axes.set_ylim(bottom=0)
    legend_below(drawing, panels[0])
    told = (
        f"At {setting_of(curve.cell)}: acceptance {curve.acceptance:.2f}, {curve.draft_ms:.2f} ms to draft a token, "
        f"{curve.verify_ms:.2f} ms for the rest of a round; measured best at K = {_fastest(curve.measured)}."
        for curve in curves
    )
    caption = (
        "Measured speed for each K of ablation_K with its 95 % interval, that of plain decoding (dashed), and what is "
        "predicted from the measured acceptance a and times: (1 - a^(K + 1)) / (1 - a) tokens in K drafting steps and one "
        "verification (Leviathan et al. "
        "2023, equation 1). The prediction takes each token to be accepted with the same chance, and the verification to cost "
        f"the same for each K. {' '.join(told)}"
    )
    return Drawn("draft_length", "How many tokens to draft", caption, drawing)


def acceptance_chart(records: Several[Record], _: Summary) -> Drawn | None:
    shares = {cell: found for cell, found in acceptance_by_position(r for r in records if r.error is None).items() if found}
    if not shares:
        return None

    def panel(axes: Axes, cells: list[Cell]) -> None:
        for (colour, marker), cell in zip(line_styles(cells), cells, strict=True):
            label = f"{cell.draft}, K={cell.K}"
            axes.plot(range(1, len(shares[cell]) + 1), shares[cell], marker, linestyle="-", color=colour, label=label)
        axes.set_xlabel("position in the draft (token)")
        axes.set_xticks(range(1, max(len(shares[cell]) for cell in cells) + 1))

    drawing = by_experiment(list(shares), setting_of, panel, "accepted up to here (share)", (0, 1.02))
    caption = (
        "Of the rounds that drafted so far, the share in which all tokens up to this position were accepted. A curve that "
        "falls early says that shorter drafts would do; the gap between two drafts is what a better one gains. Where lengths "
        "are adapted, as with adaptive_routing, only the rounds that promise most draft that far, and a curve may rise."
    )
    return Drawn("acceptance", "Acceptance by position", caption, drawing)


def routing_chart(records: Several[Record], summary: Summary) -> Drawn | None:
    found = summary.routing
    if found is None:
        return None
    domains, drafts = list(found.chosen), list(next(iter(found.chosen.values())))
    drawing, [[left, right]] = grid(2, [lines_height(1.6 * len(domains) + 1)], 4.6)
    shares = np.array([[found.chosen[domain][draft] for draft in drafts] for domain in domains])
    left.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        left.text(column, row, f"{share:.0%}", ha="center", va="center", color="white" if share > 0.55 else BLACK)
    fits = max(map(len, drafts)) * len(drafts) < _NUM_LETTERS
    left.set_xticks(range(len(drafts)), drafts, rotation=0 if fits else 90)
    left.grid(visible=False)
    left.set_xlabel("draft that was chosen")
    left.set_ylabel("domain of the question")
    name_lines(left, domains)
    by_domain = {domain: routing([record for record in records if record.domain == domain]) for domain in domains}
    regrets = {**{domain: one.regret for domain, one in by_domain.items() if one}, ALL: found.regret}
    for place, regret in enumerate(regrets.values()):
        dot(right, place, 100 * regret.value, 100 * regret.low, 100 * regret.high, RED, f"{regret.value:.1%}")
    right.axvline(0, color=BLACK, linewidth=1, linestyle="--")
    right.set_xlabel("speed lost to the fastest draft of each question (%)")
    name_lines(right, list(regrets))
    make_room(right, min(0.0, *(100 * one.low for one in regrets.values())), 100 * max(r.high for r in regrets.values()))
    caption = (
        "Left: of the questions of a domain, the share for which each draft was chosen (the one that drafted most). Right: "
        "the regret, which is how much slower the router's answers are than those of whatever was fastest for each question "
        "in hindsight, any one draft or none. Hindsight also picks what was fastest by chance, so that even a perfect router "
        "has some. "
        f"The router is {found.to_best_single.told()} times as fast as {found.best_single}, the best single choice."
    )
    return Drawn("routing", "What the router chose, and its regret", caption, drawing)


def _fastest(measured: dict[int, Figure]) -> int:
    return max(measured, key=lambda k: measured[k].value)
