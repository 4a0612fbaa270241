"""A router and prompts whose every arm was tried in, what it chooses and what that costs out."""

from collections import defaultdict
from collections.abc import Sequence as Several
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from specdecode.config import StrictModel
from specdecode.decoding.metrics import expected_tokens
from specdecode.errors import ConfigError
from specdecode.routing.examples import Trial, arms_of, gather
from specdecode.routing.features import HINT_NAMES, Features
from specdecode.routing.model import AcceptanceModel
from specdecode.routing.records import ADAPTIVE, NONE, Record, read_records

_NUM_RESAMPLES = 2000


class RouterReportConfig(StrictModel):
    """A router, and prompts to try it on."""

    checkpoint: str = Field(description="a folder that jobs.train_router has made")
    records: list[str] = Field(min_length=1, description="what it has learned from: costs and centroids are taken from there")
    test_records: list[str] = Field(min_length=1, description="prompts that each of its drafts was tried on")
    encoder: str | None = Field(default=None, description="its sentence encoder by another name or path")
    device: str | None = Field(default="cpu", description="of the encoder; the best there is if null")
    seed: int = 0


@dataclass(frozen=True)
class Policy:
    """A way to choose an arm.

    Attributes:
        name: `adaptive`; `oracle`, which knows what each arm came to on each prompt; `domain`, which knows the prompt's domain
            and which arm is fastest there; `random`, `centroid`, or `always` an arm; and `adaptive, decoded` where a router was
            tried too, which may go from draft to draft and chooses how much they draft.
        tokens_per_second: over all prompts, as if all answers were as long: the harmonic mean.
        interval: of that, 95 % of resamples of the prompts.
        to_oracle: by the oracle's, with its interval, the prompts being resampled for both.
        to_plain: by plain decoding's, likewise; infinite where that was not tried.
        accuracy: how often it chooses the fastest arm, or one that is at most 2 % slower.
        domain_accuracy: how often it chooses the arm that is fastest in the prompt's domain; None of what is no choice of one.
    """

    name: str
    tokens_per_second: float
    interval: tuple[float, float]
    to_oracle: float
    to_oracle_interval: tuple[float, float]
    to_plain: float
    to_plain_interval: tuple[float, float]
    accuracy: float
    domain_accuracy: float | None


@dataclass(frozen=True)
class ArmError:
    """How far forecasts of an arm's acceptance are off: the mean absolute error, and the mean error."""

    arm: str
    mean_acceptance: float
    absolute: float
    bias: float


@dataclass(frozen=True)
class Report:
    """What a router does on prompts that it has not learned from."""

    num_prompts: int
    errors: list[ArmError]
    policies: list[Policy]
    speeds: dict[str, dict[str, float]]  # by arm and domain


def report_on(config: RouterReportConfig) -> Report:
    """Reports on a router that was trained before.

    Raises:
        ConfigError: the records are not there, or are of other drafts.
        ModelError: the checkpoint or the encoder does not load.
    """
    model = AcceptanceModel.load(config.checkpoint)
    features = Features(config.encoder or model.about.encoder, device=config.device)
    known, test = ([r for path in paths for r in read_records(path)] for paths in (config.records, config.test_records))
    for name, records in (("records", known), ("test_records", test)):
        if (arms := arms_of(records)) != model.about.arms:
            raise ConfigError(f"{name}: expected records of the arms {model.about.arms}, got {arms}")
    learned, tried = (gather(records, model.about.arms, features) for records in (known, test))
    return report(model, learned.trials, learned.features, tried.trials, tried.features, config.seed)


def report(
    model: AcceptanceModel,
    known: Several[Trial],
    known_features: np.ndarray,
    test: Several[Trial],
    features: np.ndarray,
    seed: int = 0,
) -> Report:
    """Compares the router's choice with others on test prompts.

    Args:
        model: the router.
        known, known_features: what it has learned from: costs of rounds and centroids are taken from there.
        test, features: what to report on; prompts of which an arm is missing are left out.
        seed: of the resampling, and of the random arm.
    """
    drafts = model.about.arms
    arms = [*drafts, NONE]
    whole = [place for place, trial in enumerate(test) if all(arm in trial.arms for arm in drafts)]
    expected = model.predict(features)
    speeds = np.array([[_speed(test[place], arm) for arm in arms] for place in whole])  # [n, arms]
    costs = _round_times(known, arms)
    lengths = [test[place].arms[drafts[0]].k for place in whole]
    forecast = np.stack([predicted_speeds(expected[place], k, costs) for place, k in zip(whole, lengths, strict=True)])
    rng = np.random.default_rng(seed)
    choices = {
        "adaptive": forecast.argmax(1),
        "oracle": speeds.argmax(1),
        "domain": (of_domain := _fastest_of_domain([test[place].domain for place in whole], speeds)),
        "centroid": _nearest(known, known_features, features[whole], arms),
        "random": rng.integers(0, len(arms), len(whole)),
        **{f"always {arm}": np.full(len(whole), column) for column, arm in enumerate(arms)},
    }
    resamples = rng.integers(0, len(whole), (_NUM_RESAMPLES, len(whole)))
    best = speeds.max(1)
    achieved = {name: speeds[np.arange(len(whole)), chosen] for name, chosen in choices.items()}
    if all(ADAPTIVE in test[place].arms for place in whole):
        achieved[f"{ADAPTIVE}, decoded"] = np.array([_speed(test[place], ADAPTIVE) for place in whole])
    same = {name: float((chosen == of_domain).mean()) for name, chosen in choices.items()}
    policies = [_policy(name, values, best, speeds[:, -1], resamples, same.get(name)) for name, values in achieved.items()]
    return Report(len(whole), _errors(test, expected, drafts), policies, _by_domain([test[p] for p in whole], speeds, arms))


def predicted_speeds(acceptance: np.ndarray, k: int, round_times: np.ndarray) -> np.ndarray:
    """Tokens per second of each draft and of none, [arms + 1], from what is accepted and what a round of each takes."""
    return np.append(expected_tokens(acceptance, k), 1.0) / round_times


def _round_times(trials: Several[Trial], arms: list[str]) -> np.ndarray:
    """Seconds of a round of each arm: the median over the prompts."""
    times = []
    for arm in arms:
        records = [trial.arms[arm] for trial in trials if arm in trial.arms and trial.arms[arm].tokens_per_second > 0]
        times.append(np.median([_tokens_of_a_round(record) / record.tokens_per_second for record in records] or [np.inf]))
    return np.array(times)


def _tokens_of_a_round(record: Record) -> float:
    return record.accepted_lengths[record.k - 1] if record.k and record.accepted_lengths else 1.0


def _speed(trial: Trial, arm: str) -> float:
    return trial.arms[arm].tokens_per_second if arm in trial.arms else 0.0


def _nearest(known: Several[Trial], known_features: np.ndarray, features: np.ndarray, arms: list[str]) -> np.ndarray:
    """The arm that was fastest on most prompts of a kind, by the centroid of the kind's embeddings."""
    width = known_features.shape[1] - len(HINT_NAMES)
    members: dict[int, list[int]] = defaultdict(list)
    for place, trial in enumerate(known):
        members[int(np.argmax([_speed(trial, arm) for arm in arms]))].append(place)
    centroids = np.stack([known_features[places, :width].mean(0) for places in members.values()])
    nearest = ((features[:, None, :width] - centroids) ** 2).sum(-1).argmin(1)
    return np.array(list(members))[nearest]


def _fastest_of_domain(domains: list[str], speeds: np.ndarray) -> np.ndarray:
    """For each prompt the arm with the best mean speed in the prompt's domain, [n]."""
    found = np.zeros(len(domains), dtype=int)
    for domain in set(domains):
        places = np.array([other == domain for other in domains])
        found[places] = (1 / np.maximum(speeds[places], 1e-9)).mean(0).argmin()
    return found


def _policy(
    name: str, chosen: np.ndarray, best: np.ndarray, plain: np.ndarray, resamples: np.ndarray, same: float | None
) -> Policy:
    everywhere = np.arange(len(chosen))[None]
    speed, ideal, without = (_mean_speed(values, everywhere)[0] for values in (chosen, best, plain))
    speeds, ideals, withouts = (_mean_speed(values, resamples) for values in (chosen, best, plain))
    return Policy(
        name,
        tokens_per_second=float(speed),
        interval=_interval(speeds),
        to_oracle=float(speed / ideal),
        to_oracle_interval=_interval(speeds / ideals),
        to_plain=float(speed / without),
        to_plain_interval=_interval(speeds / withouts),
        accuracy=float((chosen >= 0.98 * best).mean()),
        domain_accuracy=same,
    )


def _mean_speed(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The harmonic means over rows of places, [rows, n]: answers of one length, divided by what they took together."""
    seconds: np.ndarray = 1 / np.maximum(values, 1e-9)
    return np.asarray(1 / seconds[places].mean(1))


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _errors(trials: Several[Trial], expected: np.ndarray, drafts: list[str]) -> list[ArmError]:
    found = []
    for column, arm in enumerate(drafts):
        places = [place for place, trial in enumerate(trials) if arm in trial.arms and trial.arms[arm].num_verdicts]
        actual = np.array([trials[place].arms[arm].acceptance for place in places])
        error = expected[places, column] - actual
        found.append(ArmError(arm, float(actual.mean()), float(np.abs(error).mean()), float(error.mean())))
    return found


def _by_domain(trials: list[Trial], speeds: np.ndarray, arms: list[str]) -> dict[str, dict[str, float]]:
    """The harmonic mean of each arm's tokens per second, by arm and domain."""
    domains = sorted({trial.domain for trial in trials})
    table: dict[str, dict[str, float]] = {}
    for column, arm in enumerate(arms):
        rows = {d: speeds[[t.domain == d for t in trials], column] for d in domains}
        table[arm] = {domain: float(1 / (1 / np.maximum(values, 1e-9)).mean()) for domain, values in rows.items()}
    return table
