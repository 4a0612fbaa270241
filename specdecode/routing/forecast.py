"""What is expected of each draft on one prompt."""

from dataclasses import dataclass

import numpy as np

from specdecode.decoding.sequence import Arm, Route


@dataclass(frozen=True)
class Forecast:
    """What is expected of each draft on one prompt.

    Attributes:
        arms: the drafts, the best first.
        embedding: the prompt's.
        uncorrected: the acceptance of each draft before what was learned online.
    """

    arms: tuple[Arm, ...]
    embedding: np.ndarray
    uncorrected: dict[str, float]

    def route(self, k: int) -> Route:
        """Begins with the draft that is expected to be accepted most; the first times decide whether it stays."""
        return Route(self.arms[0].drafter, k, self.arms)
