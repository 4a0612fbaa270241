"""Lossless speculative decoding with several drafts: token ids in, accepted ids out."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdecode.backends.backend import ModelBackend, create_backend
    from specdecode.decoding.loop import generate, speculative_decode, step
    from specdecode.decoding.metrics import DecodingMetrics
    from specdecode.decoding.sequence import Draft, Round, Route, SamplingParams, Sequence
    from specdecode.grammar import Grammar

__all__ = [
    "DecodingMetrics",
    "Draft",
    "Grammar",
    "ModelBackend",
    "Round",
    "Route",
    "SamplingParams",
    "Sequence",
    "create_backend",
    "generate",
    "speculative_decode",
    "step",
]

# Each is imported when it is asked for: torch takes seconds, and much of this package does without it.
_HOMES = {
    "DecodingMetrics": "specdecode.decoding.metrics",
    "Draft": "specdecode.decoding.sequence",
    "Grammar": "specdecode.grammar",
    "ModelBackend": "specdecode.backends.backend",
    "Round": "specdecode.decoding.sequence",
    "Route": "specdecode.decoding.sequence",
    "SamplingParams": "specdecode.decoding.sequence",
    "Sequence": "specdecode.decoding.sequence",
    "create_backend": "specdecode.backends.backend",
    "generate": "specdecode.decoding.loop",
    "speculative_decode": "specdecode.decoding.loop",
    "step": "specdecode.decoding.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
