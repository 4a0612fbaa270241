"""A prompt's features in, the acceptance that each draft is expected to have on it out: a small network, kept as a folder."""

import json
from collections.abc import Sequence as Several
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from specdecode.embedded import resolve_model
from specdecode.errors import ModelError

# Standard deviations from the mean; what is farther counts as so far.
FARTHEST = 4.0
_WEIGHTS, _ABOUT = "model.safetensors", "router.json"


@dataclass(frozen=True)
class About:
    """What a router is for, and how it came about.

    Attributes:
        arms: the drafts, in the order of its outputs.
        encoder: the sentence encoder of its features.
        features: the features' names, in the order of its inputs.
        weights: for each arm, how many verdicts on drafted tokens an expectation is worth.
        provenance: the configuration and the report of its training.
    """

    arms: list[str]
    encoder: str
    features: list[str]
    weights: list[float]
    provenance: dict[str, Any]


class AcceptanceModel:
    """A perceptron with one hidden layer, on standardised features; a logistic function of its outputs, corrected arm by arm.

    Args:
        about: see there.
        tensors: `mean`, `scale` [features]; `hidden.weight` [hidden, features], `hidden.bias`; `output.weight` [arms, hidden],
            `output.bias`; `calibration` [arms, 2], the factor and the shift of each arm's logit.
    """

    def __init__(self, about: About, tensors: dict[str, np.ndarray]) -> None:
        self.about = about
        self._tensors = tensors

    def logits(self, features: np.ndarray) -> np.ndarray:
        """[n, features] -> [n, arms]."""
        t = self._tensors
        standardised = ((features - t["mean"]) / t["scale"]).clip(-FARTHEST, FARTHEST)
        hidden = np.maximum(0.0, standardised @ t["hidden.weight"].T + t["hidden.bias"])
        return (hidden @ t["output.weight"].T + t["output.bias"]) * t["calibration"][:, 0] + t["calibration"][:, 1]

    @property
    def num_parameters(self) -> int:
        """The numbers that it consists of."""
        return sum(tensor.size for tensor in self._tensors.values())

    def predict(self, features: np.ndarray) -> np.ndarray:
        """The expected acceptance of each arm: [n, features] -> [n, arms], in (0, 1)."""
        return sigmoid(self.logits(features))

    def save(self, folder: Path) -> None:
        """Writes a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: np.ascontiguousarray(value) for name, value in self._tensors.items()}, folder / _WEIGHTS)
        (folder / _ABOUT).write_text(json.dumps(asdict(self.about), indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: str | Path, arms: Several[str] | None = None) -> "AcceptanceModel":
        """Reads a folder.

        Args:
            folder: which; or tiny/router, that of the embedded family.
            arms: the drafts that there are, in any order, and perhaps others too; not compared if None.

        Raises:
            ModelError: there is no router, it is broken, or it is one for other drafts.
        """
        folder = Path(resolve_model(str(folder)))
        try:
            about = About(**json.loads((folder / _ABOUT).read_text(encoding="utf-8")))
            tensors = load_file(folder / _WEIGHTS)
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise ModelError(f"router {folder}: expected what jobs.train_router has made: {error}") from error
        if arms is not None and not set(arms) >= set(about.arms):
            raise ModelError(f"router {folder}: is one for the drafts {sorted(about.arms)}: expected one for {sorted(arms)}")
        return AcceptanceModel(about, tensors)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """The logistic function."""
    return 1 / (1 + np.exp(-logits))
