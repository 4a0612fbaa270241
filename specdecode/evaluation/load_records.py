"""What is known of one request of a load: a row of a file, and all that analysis reads."""

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["concurrency", "rate"]


@dataclass(frozen=True)
class Point:
    """A load: so many clients at a time, or so many requests a second."""

    kind: Kind
    load: float


@dataclass(frozen=True)
class LoadRecord:
    """One request, and what became of it. Times count from the turn's start, and tokens as the endpoint does.

    Attributes:
        kind, load: see `Point`.
        turn: when all loads were tried in turns, the place of this turn.
        arm: who was asked, and how.
        number: its place among the requests of the arm, load and turn.
        item: the data set's question.
        scheduled_s: when it arrived; in a closed loop when it was sent.
        started_s: when it was sent.
        first_s: when the first text came.
        ended_s: when the answer ended, or failed.
        gaps_s: from one chunk with text to the next.
        num_prompt_tokens, num_tokens: of the prompt, and of the answer.
        error: what went wrong; there are then no other figures.
    """

    kind: str = ""
    load: float = 0.0
    turn: int = 0
    arm: str = ""
    number: int = 0
    item: str = ""
    scheduled_s: float = 0.0
    started_s: float = 0.0
    first_s: float = 0.0
    ended_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float:
        """To the first text, from the arrival on."""
        return self.first_s - self.scheduled_s

    @property
    def latency_s(self) -> float:
        """To the end, from the arrival on."""
        return self.ended_s - self.scheduled_s

    @property
    def tpot_s(self) -> float | None:
        """For each token after the first."""
        return (self.ended_s - self.first_s) / (self.num_tokens - 1) if self.num_tokens > 1 else None
