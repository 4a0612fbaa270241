"""Lossless speculative decoding with several drafts: token ids in, accepted ids out."""

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
