"""A target's replica decodes with each kind of draft as the library does with the same one."""

import asyncio
from typing import Any

import pytest
import torch

from serve.config import DraftModelConfig, ExchangeConfig, NgramConfig, TargetConfig
from serve.generation import Generation
from serve.target import TargetServer
from specdecode import DecodingMetrics, speculative_decode
from specdecode.backends.backend import ModelBackend
from specdecode.decoding.drafters import ChainDrafter, Drafter, ModelDrafter, PromptLookupDrafter
from specdecode.decoding.engine import EngineConfig
from specdecode.decoding.sequence import Round, Route, SamplingParams
from specdecode.text import Tokenizer

LOCAL: dict[str, Any] = {"model": "tiny/draft-code", "placement": "local"}
DRAFTS = {
    "lookup": NgramConfig(method="ngram", prompt_lookup_max=3, prompt_lookup_min=1),
    "model": DraftModelConfig(**LOCAL),
    "careful": DraftModelConfig(**LOCAL, min_confidence=0.4),
    "chain": DraftModelConfig(**LOCAL, lookup_first=True, prompt_lookup_max=5),
}


def decode(prompt: list[int], params: SamplingParams) -> dict[str, list[Round]]:
    """Decodes the prompt with every draft, one after the other."""

    config = TargetConfig(model="tiny/target", engine=EngineConfig(draft_length="fixed"))

    async def run() -> dict[str, list[Round]]:
        server = TargetServer.__new__(TargetServer)
        await TargetServer.__init__(server, config, DRAFTS, {}, ExchangeConfig())  # as Serve does
        rounds: dict[str, list[Round]] = {name: [] for name in DRAFTS}
        for name in DRAFTS:
            async for item in server.generate(Generation(prompt, params, Route(name, 4))):
                rounds[name] += item if isinstance(item, list) else []
        server._process.close()
        return rounds

    return asyncio.run(run())


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_every_kind_of_draft_drafts(models: dict[str, ModelBackend], tokenizer: Tokenizer, temperature: float) -> None:
    prompt = tokenizer.encode("def read_lines(path):\n    lines = []\n    for line in path:\n")
    sampling: dict[str, Any] = {"temperature": temperature, "seed": 3, "repetition_penalty": 1.1}
    rounds = decode(prompt, SamplingParams(max_tokens=40, **sampling))
    drafters: dict[str, Drafter] = {
        "lookup": PromptLookupDrafter(3, 1),
        "model": ModelDrafter(models["code"]),
        "careful": ModelDrafter(models["code"], min_confidence=0.4),
        "chain": ChainDrafter([PromptLookupDrafter(5, 2), ModelDrafter(models["code"])]),
    }
    for name, drafter in drafters.items():
        output, expected = speculative_decode(models["target"], drafter, torch.tensor([prompt]), 40, 4, **sampling)
        assert [token for round in rounds[name] for token in round.tokens] == output[0, len(prompt) :].tolist(), name
        metrics = DecodingMetrics()
        for round in rounds[name]:
            metrics.add(round, 0.0)
        assert metrics.num_drafted_at == expected.num_drafted_at, name
        assert metrics.num_accepted_at == expected.num_accepted_at, name
        assert metrics.num_drafted > 0, name
