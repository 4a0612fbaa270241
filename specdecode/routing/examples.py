"""Records in, one example for each prompt out: its features, and what each draft came to on it."""

import logging
from collections import Counter
from collections.abc import Sequence as Several
from dataclasses import dataclass

import numpy as np

from specdecode.errors import ConfigError
from specdecode.routing.features import Features
from specdecode.routing.records import ADAPTIVE, NONE, Record

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """One prompt, and what each arm did on it."""

    prompt_id: str
    domain: str
    prompt: str
    is_chat: bool
    num_prompt_tokens: int
    arms: dict[str, Record]


@dataclass(frozen=True)
class Examples:
    """Prompts as numbers: features [n, features]; acceptance [n, arms], nan where unknown; verdicts it was counted on."""

    trials: list[Trial]
    features: np.ndarray
    acceptance: np.ndarray
    num_verdicts: np.ndarray

    def __len__(self) -> int:
        return len(self.trials)

    def chosen(self, places: Several[int]) -> "Examples":
        """Some of them."""
        rows = np.asarray(places, dtype=int)
        return Examples([self.trials[row] for row in rows], self.features[rows], self.acceptance[rows], self.num_verdicts[rows])


def arms_of(records: Several[Record]) -> list[str]:
    """The drafts that there are records of.

    Raises:
        ConfigError: they are fewer than two.
    """
    arms = sorted({record.arm for record in records if record.error is None} - {NONE, ADAPTIVE})
    if len(arms) < 2:
        raise ConfigError(f"records: expected those of at least two drafts, got {arms}")
    return arms


def gather(records: Several[Record], arms: list[str], features: Features) -> Examples:
    """A prompt's records put together; errors, and served requests whose prompt was not kept, are left out and counted."""
    causes = Counter(record.error or "the prompt was not kept" for record in records if record.error or not record.prompt)
    if causes:
        logger.warning("left out %d records, such as: %s", causes.total(), causes.most_common(1)[0][0])
    trials: dict[str, Trial] = {}
    for record in records:
        if record.error is None and record.prompt:
            trial = trials.setdefault(
                record.prompt_id,
                Trial(record.prompt_id, record.domain, record.prompt, record.is_chat, record.num_prompt_tokens, {}),
            )
            trial.arms[record.arm] = record
    found = list(trials.values())
    if not found:
        raise ConfigError(f"records: expected some with a prompt and without an error, got none of {len(records)}")
    table = np.array([[_figure(trial, arm) for arm in arms] for trial in found])  # [n, arms, 2]
    vectors = features.of([t.prompt for t in found], [t.num_prompt_tokens for t in found], [t.is_chat for t in found])
    return Examples(found, vectors, table[..., 0], table[..., 1])


def _figure(trial: Trial, arm: str) -> tuple[float, float]:
    record = trial.arms.get(arm)
    return (np.nan, 0.0) if record is None or not record.num_verdicts else (record.acceptance, record.num_verdicts)
