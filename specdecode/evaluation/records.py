"""What is known of one answer: a row of a file, and all that analysis reads. Sums and counts; nothing is divided yet."""

from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from pathlib import Path

from specdecode.errors import ConfigError
from specdecode.rows import read_rows


@dataclass(frozen=True)
class Record:
    """One answer, or why there is none.

    Attributes:
        experiment: of the suite.
        draft: the draft that the cell has: a name, `none`, `own` (the one at home in the question's domain) or `auto`.
        K: tokens drafted in a round, at the most.
        temperature, verifier, batch: how it was decoded, and with how many others.
        dataset, item, turn: which question.
        domain, category: what kind of question.
        repeat: which answer to it.
        group: names those that were decoded together.
        num_together: how many these are: fewer than `batch` at a data set's end, and where others have no such turn.
        place: counts what the worker has measured before.
        worker: the process that measured.
        num_prompt_tokens: of the prompt.
        tokens: generated ids.
        drafter: who drafted most.
        round_tokens: how many tokens each round gave.
        num_drafts: rounds in which something was drafted.
        num_drafted, num_accepted: drafted tokens.
        num_drafted_at, num_accepted_at: the same by their position in the draft.
        draft_time_s, verify_time_s: spent drafting, and scoring and accepting, by all that were decoded together.
        route_time_s: until a router had spoken; the target decodes plainly meanwhile.
        ttft_s, latency_s: from the start to the first token and to the last one.
        gaps_s: from the tokens of one round to those of the next.
        group_time_s: until the last answer of the group was done.
        is_right: whether the answer is right, where that can be told.
        perplexity: of the answer under the target, if that was asked for.
        error: what went wrong; the figures are then 0, and no part of any result.
    """

    experiment: str
    draft: str
    K: int
    temperature: float
    verifier: str
    batch: int
    dataset: str
    item: str
    turn: int
    domain: str
    category: str
    repeat: int
    group: str
    num_together: int = 1
    place: int = 0
    worker: str = ""
    num_prompt_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    drafter: str = ""
    round_tokens: list[int] = field(default_factory=list)
    num_drafts: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    num_drafted_at: list[int] = field(default_factory=list)
    num_accepted_at: list[int] = field(default_factory=list)
    draft_time_s: float = 0.0
    verify_time_s: float = 0.0
    route_time_s: float = 0.0
    ttft_s: float = 0.0
    latency_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    group_time_s: float = 0.0
    is_right: bool | None = None
    perplexity: float | None = None
    error: str | None = None

    @property
    def question(self) -> tuple[str, str, int, int]:
        """What two experiments are compared on: the same answer to the same question."""
        return self.dataset, self.item, self.turn, self.repeat


def read_records(paths: Several[Path]) -> list[Record]:
    """The records of a run's parts, in their order.

    Raises:
        ConfigError: a part is not there, or none.
    """
    return [record for path in paths for record in _part(path)]


def _part(path: Path) -> list[Record]:
    try:
        return read_rows(path, Record)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as records: {str(error).splitlines()[0]}") from error
