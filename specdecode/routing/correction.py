"""What drafts turned out to do in, what to expect on prompts like those out: corrects a router that has been trained before.

Near a prompt, in the space of embeddings, forecasts are taken to have been wrong in the same way: the correction is their mean
error there, weighted by likeness (Nadaraya 1964, Watson 1964), and shrunk towards none where little is like it.
"""

from collections.abc import Sequence as Several

import numpy as np

_CAPACITY = 1024
# How alike, as the cosine of two embeddings, counts as near; and how many alike verdicts a correction of half the error takes.
_WIDTH, _DOUBT = 0.25, 2.0
_LARGEST = 4.0  # of a logit


class Correction:
    """Remembers the last errors of each arm.

    Args:
        arms: their names.
        width: of an embedding.
    """

    def __init__(self, arms: Several[str], width: int) -> None:
        self._places = {arm: place for place, arm in enumerate(arms)}
        self._embeddings = np.zeros((_CAPACITY, width), dtype=np.float32)
        self._errors = np.zeros((_CAPACITY, len(arms)))  # of the logit
        self._weights = np.zeros((_CAPACITY, len(arms)))  # 0 where an arm was not asked
        self._num_seen = 0

    def add(self, embedding: np.ndarray, arm: str, expected: float, num_accepted: float, num_verdicts: float) -> None:
        """Takes what came of an arm on a prompt.

        Args:
            embedding: the prompt's, [width], of unit length.
            arm: whose tokens were drafted.
            expected: the acceptance that was forecast without any correction.
            num_accepted, num_verdicts: tokens of it that were accepted, and on which there was a verdict.
        """
        if num_verdicts <= 0:
            return
        seen = (num_accepted + expected) / (num_verdicts + 1)  # the forecast itself counts as one verdict
        place, column = self._num_seen % _CAPACITY, self._places[arm]
        self._embeddings[place] = embedding
        self._errors[place], self._weights[place] = 0.0, 0.0
        self._errors[place, column] = np.clip(_logit(seen) - _logit(expected), -_LARGEST, _LARGEST)
        self._weights[place, column] = num_verdicts / (num_verdicts + 8)
        self._num_seen += 1

    def at(self, embeddings: np.ndarray) -> np.ndarray:
        """What to add to the logits of each arm: [n, width] -> [n, arms]."""
        count = min(self._num_seen, _CAPACITY)
        likeness = np.exp((embeddings @ self._embeddings[:count].T - 1) / _WIDTH)  # [n, seen], 1 at the same prompt
        weight = likeness @ self._weights[:count]
        return np.asarray(likeness @ (self._weights[:count] * self._errors[:count]) / (weight + _DOUBT))


def _logit(p: float) -> float:
    p = min(max(p, 0.01), 0.99)
    return float(np.log(p / (1 - p)))
