"""A forecast that is still to come in, plain decoding until it is there out: a request does not wait for its router."""

from concurrent.futures import Future

from specdecode.decoding.control import LengthPolicy
from specdecode.decoding.sequence import Round, Route, Sequence
from specdecode.routing.forecast import Forecast


class PendingForecasts:
    """A `LengthPolicy` that decodes plainly until the forecasts are there, and then drafts as they and `length` say.

    A request whose seed promises the same answer again, which needs the same drafts from the first round on, waits for them.

    Args:
        pending: a forecast for each sequence of the first round, in their order; their routes are replaced.
        k: draft at the most so many tokens in a round.
        length: decides how many it is.
    """

    def __init__(self, pending: "Future[list[Forecast]]", k: int, length: LengthPolicy) -> None:
        self._pending = pending
        self._k = k
        self._length = length
        self._waiting: list[Sequence] | None = None  # None before the first round

    def plan(self, sequences: list[Sequence]) -> None:
        """See `LengthPolicy.plan`."""
        if self._waiting is None:
            self._waiting = sequences
            for sequence in sequences:
                sequence.route = Route()
        if self._waiting and (self._pending.done() or any(s.params.depends_on_k for s in self._waiting)):
            for sequence, forecast in zip(self._waiting, self._pending.result(), strict=True):
                sequence.route = forecast.route(self._k)
            self._waiting = []
        self._length.plan(sequences)

    def observe(self, sequences: list[Sequence], rounds: list[Round]) -> None:
        """See `LengthPolicy.observe`."""
        self._length.observe(sequences, rounds)
