"""The embedded family, which is what a user meets first: greedy decoding with any draft is the target's own."""

import pytest
import torch

from specdecode import Route, SamplingParams, Sequence, create_backend, generate, speculative_decode
from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.decoding.loop import as_drafter
from specdecode.evaluation.prompts import DOMAINS, load_prompts
from specdecode.text import Tokenizer

DRAFTS = ("generic", "code", "chat", "reasoning")
KS = range(1, 9)
NUM_NEW = 32


@pytest.fixture(scope="module")
def target() -> HuggingFaceBackend:
    backend = create_backend("tiny/target", dtype="float32")
    assert isinstance(backend, HuggingFaceBackend)
    return backend


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = Tokenizer("tiny/target")
    return [prompt.encode(tokenizer) for domain in DOMAINS for prompt in load_prompts(domain)[:7]]


@pytest.fixture(scope="module")
def references(target: HuggingFaceBackend, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers generates, prompt by prompt."""
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = target.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_NEW)
        outputs.append(output[0].tolist())
    return outputs


@pytest.mark.parametrize("name", DRAFTS)
def test_greedy_decoding_equals_transformers_alone_and_batched(
    target: HuggingFaceBackend, prompts: list[list[int]], references: list[list[int]], name: str
) -> None:
    assert len(prompts) >= 20
    draft = create_backend(f"tiny/draft-{name}", dtype="float32")
    for k in KS:
        batch = [Sequence(list(prompt), SamplingParams(max_tokens=NUM_NEW), Route("draft", k)) for prompt in prompts]
        for _ in generate(batch, as_drafter(draft, target), target):
            pass
        assert [sequence.tokens for sequence in batch] == references, k
    for number, (prompt, reference) in enumerate(zip(prompts, references, strict=True)):
        k = KS[number % len(KS)]  # every one is some prompts' turn
        output, _ = speculative_decode(target, draft, torch.tensor([prompt]), NUM_NEW, K=k)
        assert output[0].tolist() == reference, k


def test_sixteen_different_requests_get_together_what_they_get_alone(
    target: HuggingFaceBackend, prompts: list[list[int]]
) -> None:
    draft = as_drafter(create_backend("tiny/draft-generic", dtype="float32"), target)

    def requests() -> list[Sequence]:
        return [
            Sequence(
                list(prompt[: 5 + 3 * number]),
                SamplingParams(
                    temperature=0.25 * (number % 5), top_p=1 - 0.05 * (number % 3), max_tokens=16 + number, seed=number
                ),
                Route("draft", number % 7),
            )
            for number, prompt in enumerate(prompts[:16])
        ]

    together, alone = requests(), requests()
    for _ in generate(together, draft, target):
        pass
    for sequence in alone:
        for _ in generate([sequence], draft, target):
            pass
    assert [sequence.tokens for sequence in together] == [sequence.tokens for sequence in alone]
    assert len({tuple(sequence.tokens) for sequence in together}) == 16
