"""Answers in, HTML and SVG out: all that a page shows of them. Every text is escaped here, and nowhere else."""

import html

from serve.answer import Answer, Draft, Kind
from serve.schema import NO_DRAFT

LEGEND: dict[Kind, str] = {
    "accepted": "drafted and accepted",
    "corrected": "the target's, in place of a rejected token",
    "bonus": "the target's, after a draft accepted whole",
    "plain": "the target's, nothing drafted",
}
_CHART_HEIGHT, _BAR_WIDTH, _NUM_BARS, _MARGIN = 96, 13, 32, 12


def draw_answer(answer: Answer) -> str:
    """The text, each run marked by its origin, below what went wrong if anything did."""
    marked = "".join(f'<span class="{span.kind}">{html.escape(span.text)}</span>' for span in answer.spans)
    error = "" if answer.error is None else f'<p class="sd-error" role="alert">Error: {html.escape(answer.error)}</p>'
    return f'{error}<pre class="sd-text" aria-busy="{str(not answer.is_done).lower()}" tabindex="0">{marked}</pre>'


def draw_figures(answer: Answer) -> str:
    """The figures so far, as a list of terms."""
    first = None if answer.first_token_s is None else 1e3 * answer.first_token_s
    acceptance = None if answer.acceptance_rate is None else 100 * answer.acceptance_rate
    terms = {
        "tokens/s": _number(answer.tokens_per_second, 0),
        "tokens/pass": _number(answer.tokens_per_target_pass, 2),
        "accepted": _number(acceptance, 0, " %"),
        "first token": _number(first, 0, " ms"),
        "tokens": str(answer.num_tokens),
    }
    return '<dl class="sd-figures">' + "".join(f"<div><dt>{t}</dt><dd>{v}</dd></div>" for t, v in terms.items()) + "</dl>"


def draw_choice(answer: Answer) -> str:
    """Who drafts, and why."""
    drafters = ", then ".join(answer.drafters) or "nobody yet"
    if answer.figures is None:
        return f"<p>Drafting: <b>{html.escape(drafters)}</b></p>"
    routing = answer.figures["routing"]
    if routing is None:
        asked = answer.figures["draft"] or NO_DRAFT
        return f"<p>Draft: <b>{html.escape(asked)}</b>, as the request or the server's default has it.</p>"
    expected = ", ".join(f"{html.escape(name)} {share:.0%}" for name, share in routing["expected_acceptance"].items())
    return (
        f"<p>The router chose <b>{html.escape(answer.figures['draft'])}</b>: {html.escape(routing['reason'])}.</p>"
        f"<p>Expected acceptance: {expected}.</p>"
    )


def draw_chart(drafts: list[Draft]) -> str:
    """A bar for each of the last rounds: as high as its draft was long, filled as far as that was accepted."""
    shown = drafts[-_NUM_BARS:]
    highest = max((draft.num_drafted for draft in shown), default=0) or 1
    unit = (_CHART_HEIGHT - 2 * _MARGIN) / highest
    width = _MARGIN * 2 + _BAR_WIDTH * _NUM_BARS
    bars = "".join(_bar(_MARGIN * 1.5 + _BAR_WIDTH * place, draft, unit) for place, draft in enumerate(shown))
    floor = _CHART_HEIGHT - _MARGIN
    return (
        f'<figure><svg class="sd-chart" role="img" viewBox="0 0 {width} {_CHART_HEIGHT}" aria-label="{_summary(drafts)}">'
        f'<line x1="{_MARGIN}" y1="{floor}" x2="{width}" y2="{floor}"/>{bars}'
        f'<text x="0" y="{_MARGIN + 4}">{highest}</text><text x="0" y="{floor + 4}">0</text></svg>'
        f"<figcaption>{_summary(drafts)}</figcaption></figure>"
    )


def draw_verdict(plain: Answer, speculative: Answer, *, is_greedy: bool) -> str:
    """Whether both texts are the same, and how much faster one came."""
    if plain.error or speculative.error or not (plain.is_done and speculative.is_done):
        return ""
    if not is_greedy:
        said = "Sampled at a temperature above 0: the texts differ by chance, their distribution is the same."
    elif plain.text == speculative.text:
        said = f"&#10003; Identical: both texts are the same {len(plain.text)} characters."
    else:
        said = "&#10007; The texts differ. Greedy ones must not, but for ties within rounding."
    rates = plain.tokens_per_second, speculative.tokens_per_second
    speed = f" {rates[1] / rates[0]:.2f} times the tokens per second." if rates[0] and rates[1] else ""
    return f'<p class="sd-verdict">{said}{speed}</p>'


def draw_legend() -> str:
    """What the marks mean."""
    marks = "".join(f'<li><span class="{kind}">text</span> {meaning}</li>' for kind, meaning in LEGEND.items())
    return f'<ul class="sd-legend" aria-label="what the marks mean">{marks}</ul>'


def _bar(x: float, draft: Draft, unit: float) -> str:
    floor, width = _CHART_HEIGHT - _MARGIN, _BAR_WIDTH - 3
    if draft.num_drafted == 0:
        return f'<circle cx="{x + width / 2:g}" cy="{floor - 3}" r="1.5"/>'
    drafted, accepted = draft.num_drafted * unit, draft.num_accepted * unit
    return (
        f'<rect class="drafted" x="{x:g}" y="{floor - drafted:.4g}" width="{width}" height="{drafted:.4g}"/>'
        f'<rect class="taken" x="{x:g}" y="{floor - accepted:.4g}" width="{width}" height="{accepted:.4g}"/>'
    )


def _summary(drafts: list[Draft]) -> str:
    """The chart in words."""
    drafted = [draft for draft in drafts if draft.num_drafted]
    if not drafted:
        return f"{len(drafts)} rounds, nothing drafted" if drafts else "No rounds yet"
    num_drafted, num_accepted = sum(d.num_drafted for d in drafted), sum(d.num_accepted for d in drafted)
    last = f"; the last {_NUM_BARS} are shown" if len(drafts) > _NUM_BARS else ""
    return (
        f"{len(drafts)} rounds, {len(drafted)} with a draft: {num_drafted / len(drafted):.1f} tokens drafted on average, "
        f"{num_accepted / len(drafted):.1f} accepted{last}"
    )


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return "&ndash;" if value is None else f"{value:.{digits}f}{unit}"
