"""A stream's chunks in, what there is to show of an answer out. Knows no page and no HTTP."""

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["accepted", "corrected", "bonus", "plain"]


@dataclass(frozen=True)
class Span:
    """A run of text of one origin: accepted draft tokens, or tokens of the target's own."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class Draft:
    """What one round drafted, and how much of it was accepted."""

    num_drafted: int
    num_accepted: int


@dataclass
class Answer:
    """An answer as far as it has come; rates are tokens per second as whoever reads it sees them.

    Attributes:
        spans: its text, by origin.
        drafts: of each round, in order.
        num_tokens: how many it has.
        drafters: who drafted, in the order in which they first did.
        first_token_s, elapsed_s: from the request to its first text, and to its last.
        figures: what the server says of it at its end.
        error: why there is no more of it.
        is_done: whether it has ended.
    """

    spans: list[Span] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)
    num_tokens: int = 0
    drafters: list[str] = field(default_factory=list)
    first_token_s: float | None = None
    elapsed_s: float = 0.0
    figures: dict[str, Any] | None = None
    error: str | None = None
    is_done: bool = False

    def add(self, chunk: dict[str, Any], elapsed_s: float) -> None:
        """Takes the next chunk of a stream with `speculative_decoding.rounds`, which came after so long."""
        if "error" in chunk:
            self.error = chunk["error"]["message"]
            return
        said = chunk.get("speculative_decoding", {})
        if "round" in said:
            self._add_round(said["round"], text_of(chunk), elapsed_s)
        if "draft" in said:
            self.figures = said

    def _add_round(self, round: dict[str, Any], text: str, elapsed_s: float) -> None:
        accepted = round["accepted_text"]
        self._add_text("accepted", accepted)
        # What a multi-byte character or a stop string held back may come in a round without a token of the target's own.
        self._add_text(round["own_token"] or "accepted", text[len(accepted) :])
        self.drafts.append(Draft(round["num_draft_tokens"], round["num_accepted_tokens"]))
        self.num_tokens += round["num_tokens"]
        if round["draft"] is not None and round["draft"] not in self.drafters:
            self.drafters.append(round["draft"])
        if text and self.first_token_s is None:
            self.first_token_s = elapsed_s
        self.elapsed_s = elapsed_s

    def _add_text(self, kind: Kind, text: str) -> None:
        if text:
            self.spans.append(Span(kind, text))

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(span.text for span in self.spans)

    @property
    def num_drafted(self) -> int:
        """Tokens that were drafted."""
        return sum(draft.num_drafted for draft in self.drafts)

    @property
    def num_accepted(self) -> int:
        """Drafted tokens that stand in the text."""
        return sum(draft.num_accepted for draft in self.drafts)

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over drafted tokens; None while nothing was drafted."""
        return self.num_accepted / self.num_drafted if self.num_drafted else None

    @property
    def tokens_per_target_pass(self) -> float | None:
        """Tokens over rounds, each of which is a forward pass of the target; None before the first."""
        return self.num_tokens / len(self.drafts) if self.drafts else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens over the time since the request; None before the first."""
        return self.num_tokens / self.elapsed_s if self.elapsed_s else None


def text_of(chunk: dict[str, Any]) -> str:
    """The text of a chunk of a completion or of a chat."""
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in chunk["choices"])
