"""Nothing waits for a forecast: decoding is plain until it is there, and what is said is the target's all along."""

import threading
from concurrent.futures import Future

import numpy as np
import pytest

from specdecode import create_backend
from specdecode.backends.backend import ModelBackend
from specdecode.decoding.control import FixedLength
from specdecode.decoding.drafters import ModelDrafter, RoutedDrafter
from specdecode.decoding.loop import generate
from specdecode.decoding.sequence import Arm, Round, SamplingParams, Sequence
from specdecode.routing.forecast import Forecast
from specdecode.routing.pending import PendingForecasts
from specdecode.text import Tokenizer

K = 3
FORECAST = Forecast((Arm("code", 0.8), Arm("chat", 0.3)), np.zeros(4, dtype=np.float32), {"code": 0.8, "chat": 0.3})


@pytest.fixture(scope="module")
def target() -> ModelBackend:
    return create_backend("tiny/target", dtype="float32")


@pytest.fixture(scope="module")
def drafter(target: ModelBackend) -> RoutedDrafter:
    drafts = {name: create_backend(f"tiny/draft-{name}", dtype="float32") for name in ("code", "chat")}
    return RoutedDrafter({name: ModelDrafter.between(draft, target) for name, draft in drafts.items()})


def sequence(**params: object) -> Sequence:
    return Sequence(Tokenizer("tiny/target").encode("def read_lines(path):\n"), SamplingParams(max_tokens=24, **params))


def rounds_of(
    one: Sequence, pending: "Future[list[Forecast]]", target: ModelBackend, drafter: RoutedDrafter, after: int
) -> list[Round]:
    """Decodes it, with a forecast that comes after so many rounds."""
    rounds = []
    for [(_, round)] in generate([one], drafter, target, PendingForecasts(pending, K, FixedLength())):
        rounds.append(round)
        if len(rounds) == after:
            pending.set_result([FORECAST])
    return rounds


@pytest.mark.parametrize("after", [1, 5])
def test_it_decodes_plainly_until_the_forecast_is_there(target: ModelBackend, drafter: RoutedDrafter, after: int) -> None:
    one, plain = sequence(), sequence()
    rounds = rounds_of(one, Future(), target, drafter, after)
    assert [round.num_drafted for round in rounds[:after]] == [0] * after
    assert all(round.num_drafted == K and round.drafter == "code" for round in rounds[after:-2])
    for _ in generate([plain], drafter, target):
        pass
    assert one.tokens == plain.tokens


def test_an_answer_may_end_before_its_forecast_comes(target: ModelBackend, drafter: RoutedDrafter) -> None:
    rounds = rounds_of(sequence(), Future(), target, drafter, after=0)
    assert len(rounds) == 24
    assert all(round.num_drafted == 0 for round in rounds)


def test_a_seed_that_promises_the_same_answer_waits(target: ModelBackend, drafter: RoutedDrafter) -> None:
    pending: Future[list[Forecast]] = Future()
    threading.Timer(0.2, pending.set_result, [[FORECAST]]).start()
    rounds = rounds_of(sequence(temperature=1.0, seed=5), pending, target, drafter, after=0)
    assert rounds[0].num_drafted == K


def test_each_sequence_gets_its_own_forecast(target: ModelBackend, drafter: RoutedDrafter) -> None:
    other = Forecast(FORECAST.arms[::-1], FORECAST.embedding, FORECAST.uncorrected)
    pending: Future[list[Forecast]] = Future()
    pending.set_result([FORECAST, other])
    both = [sequence(), sequence()]
    for _ in generate(both, drafter, target, PendingForecasts(pending, K, FixedLength())):
        pass
    assert [one.route.drafter for one in both] == ["code", "chat"]


def test_a_forecast_that_fails_is_not_kept_quiet(target: ModelBackend, drafter: RoutedDrafter) -> None:
    pending: Future[list[Forecast]] = Future()
    pending.set_exception(ValueError("no such encoder"))
    with pytest.raises(ValueError, match="no such encoder"):
        rounds_of(sequence(), pending, target, drafter, after=0)
