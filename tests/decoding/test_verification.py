"""Where the target's distributions are one-hot, comparing tokens gives what the verifier's law does."""

import pytest
import torch

from specdecode.decoding.constraints import Scored
from specdecode.decoding.distributions import Distributions
from specdecode.decoding.sequence import Draft, SamplingParams, Sequence
from specdecode.decoding.verification import Block, accept, draw, verifier
from specdecode.errors import ModelError

VOCAB_SIZE = 6


def batch(seed: int, **params: object) -> tuple[list[Sequence], list[Draft], list[Scored], torch.Tensor]:
    """Sequences with drafts of 0 to 3 tokens, of which many are the target's choices, and some say that they were drawn."""
    generator = torch.Generator().manual_seed(seed)
    sequences = [Sequence([1, 2], SamplingParams(seed=number, **params)) for number in range(4)]  # type: ignore[arg-type]
    logits, drafts, scored = [], [], []
    for k, sequence in enumerate(sequences):
        rows = 2 * torch.randn(k + 1, VOCAB_SIZE, generator=generator)
        p = Distributions.of(rows.clone(), [Scored(sequence, [0] * k, k + 1)], frozenset())
        tokens = p.choice[:k].tolist()
        if k and torch.rand((), generator=generator) < 0.6:
            place = int(torch.randint(k, (), generator=generator))
            tokens[place] = (tokens[place] + 1) % VOCAB_SIZE
        drafts.append(Draft.certain(tokens) if tokens else Draft.empty())
        scored.append(Scored(sequence, tokens, k + 1))
        logits.append(rows)
    return sequences, drafts, scored, torch.cat(logits)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("temperature", "name"), [(0.0, "rejection"), (0.0, "block"), (0.8, "coupled")])
def test_one_hot_targets_are_compared_as_the_law_would_decide(temperature: float, name: str, seed: int) -> None:
    sequences, drafts, scored, logits = batch(seed, temperature=temperature, verifier=name)
    p = Distributions.of(logits, scored, frozenset())
    lengths, added = accept(sequences, drafts, p)
    expected, tokens = draw(verifier(sequences[0].params.verifier), Block.of(drafts, p), sequences)
    assert lengths == expected
    assert added == [[*draft.tokens[:length], token] for draft, length, token in zip(drafts, expected, tokens, strict=True)]


def test_a_greedy_target_that_is_not_finite_is_an_error() -> None:
    sequences, drafts, scored, logits = batch(0)
    logits[:] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        accept(sequences, drafts, Distributions.of(logits, scored, frozenset()))
