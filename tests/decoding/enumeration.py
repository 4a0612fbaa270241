"""Exact probabilities of token sequences: those that speculative decoding emits, and those of the target alone.

Nothing is drawn. Under rejection and block verification every draft, every number of accepted tokens and every token after
them is followed, with its probability. Under coupled verification the shared noise of each position is one number in [0, 1),
at which target and draft both invert their cumulative distributions; every interval of it on which nothing changes is followed.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise, product
from unittest import mock

import torch

from specdecode.backends.backend import ModelBackend, Row
from specdecode.decoding.constraints import Scored
from specdecode.decoding.distributions import Distributions
from specdecode.decoding.drafters import Drafter
from specdecode.decoding.loop import step
from specdecode.decoding.sequence import Draft, Route, SamplingParams, Sequence
from specdecode.decoding.verification import Block, Verifier
from specdecode.grammar import Grammars

LENGTH = 3
# What the tokens of a model of four tokens are, for those sequences that have a grammar.
GRAMMARS = Grammars([b"a", b"b", b"ab", b""])

Law = Counter[tuple[int, ...]]


def target_law(target: ModelBackend, prompt: list[int], params: SamplingParams) -> Law:
    """The probability of each sequence of the first `LENGTH` tokens, or up to its end, when the target decodes alone."""
    law: Law = Counter({(): 1.0})
    for _ in range(LENGTH):
        going_on = [tokens for tokens in law if not _is_finished(tokens, target, params)]
        rows = [Scored(_sequence(prompt, tokens, params), [], 1) for tokens in going_on]
        p = _distributions(target, rows).dense(torch.arange(len(rows))).tolist() if rows else []
        for tokens, row in zip(going_on, p, strict=True):
            chance = law.pop(tokens)
            for token, p_token in enumerate(row):
                if p_token:
                    law[(*tokens, token)] += chance * p_token
    return law


def emitted_laws(
    target: ModelBackend,
    drafter: Drafter,
    verifiers: list[Verifier],
    *,
    prompt: list[int],
    settings: list[SamplingParams],
    k: int,
    num_choices: int,
) -> list[list[Law]]:
    """The same law for each verifier and setting, over all rounds with at the most `k` drafted tokens each.

    `num_choices` is the most tokens that any q of the drafter gives a probability.
    """
    finished: list[list[Law]] = [[Counter() for _ in settings] for _ in verifiers]
    unfinished = [(number, setting, (), 1.0) for number in range(len(verifiers)) for setting in range(len(settings))]
    while unfinished:
        begun = dict.fromkeys((setting, tokens) for _, setting, tokens, _ in unfinished)
        sequences = [_sequence(prompt, tokens, settings[setting], Route("draft", k)) for setting, tokens in begun]
        laws = _round_laws(target, drafter, verifiers, sequences, num_choices)
        rounds = {key: [of_verifier[index] for of_verifier in laws] for index, key in enumerate(begun)}
        longer: Counter[tuple[int, int, tuple[int, ...]]] = Counter()
        for number, setting, emitted, chance in unfinished:
            for tokens, probability in rounds[setting, emitted][number].items():
                longer[number, setting, _cut(emitted + tokens, target, settings[setting])] += chance * probability
        unfinished = []
        for (number, setting, tokens), chance in longer.items():
            if _is_finished(tokens, target, settings[setting]):
                finished[number][setting][tokens] += chance
            else:
                unfinished.append((number, setting, tokens, chance))
    return finished


def coupled_laws(
    target: ModelBackend, drafter: Drafter, *, prompt: list[int], settings: list[SamplingParams], k: int
) -> list[Law]:
    """The same law under coupled verification for each setting, by decoding in every world that the noise can make."""
    laws: list[Law] = [Counter() for _ in settings]
    worlds = [_World(number) for number in range(len(settings))]
    while worlds:
        sequences = [_sequence(prompt, (), settings[world.setting], Route("draft", k)) for world in worlds]
        for seed, sequence in enumerate(sequences):
            sequence.seed = seed  # by which the noise finds its world
        split: list[_World] = []
        with _shared_noise(worlds, split, num_wanted=len(prompt) + LENGTH):
            emitted = {sequence.id: () for sequence in sequences}
            while open_ := [s for s in sequences if not _is_finished(emitted[s.id], target, s.params)]:
                for sequence, round in zip(open_, step(open_, drafter, target), strict=True):
                    emitted[sequence.id] = _cut(emitted[sequence.id] + tuple(round.tokens), target, sequence.params)
        for world, sequence in zip(worlds, sequences, strict=True):
            laws[world.setting][emitted[sequence.id]] += world.chance
        worlds = split
    return laws


def expected_accepted(
    target: ModelBackend, drafter: Drafter, verifier: Verifier, sequence: Sequence, num_choices: int
) -> float:
    """How many drafted tokens a round accepts on average, over all drafts."""
    drafts, chances, _ = _every_draft(drafter, [sequence], num_choices)
    return float((chances[:, None] * verifier.reach(_block(target, [sequence] * len(drafts), drafts))).sum())


def largest_difference(one: Law, other: Law) -> float:
    """The largest difference between two laws in the probability of any sequence."""
    return max(abs(one[tokens] - other[tokens]) for tokens in one.keys() | other.keys())


def _round_laws(
    target: ModelBackend, drafter: Drafter, verifiers: list[Verifier], sequences: list[Sequence], num_choices: int
) -> list[list[Law]]:
    """The probability of all that one round may add to each sequence."""
    drafts, chances, owners = _every_draft(drafter, sequences, num_choices)
    block = _block(target, [sequences[owner] for owner in owners], drafts)
    laws: list[list[Law]] = []
    for verifier in verifiers:
        of_sequence: list[Law] = [Counter() for _ in sequences]
        reach = verifier.reach(block)  # [drafts, K]
        edge = reach.new_ones(len(drafts), 1)
        exactly = torch.cat([edge, reach], 1) - torch.cat([reach, 0 * edge], 1)  # [drafts, K + 1]
        for length in range(exactly.shape[1]):
            tokens, weights = verifier.emission(block, block.k.clamp(max=length))
            share = chances * exactly[:, length]
            for number, draft in enumerate(drafts):
                if draft.continues and len(draft.tokens) == length:
                    of_sequence[owners[number]][tuple(draft.tokens)] += float(share[number])
                    share[number] = 0
            joint = torch.where(share > 0, share / weights.sum(-1), 0.0)[:, None] * weights  # [drafts, m]
            for number, place in joint.nonzero().tolist():
                emitted = (*drafts[number].tokens[:length], int(tokens[number, place]))
                of_sequence[owners[number]][emitted] += float(joint[number, place])
        laws.append(of_sequence)
    return laws


def _block(target: ModelBackend, sequences: list[Sequence], drafts: list[Draft]) -> Block:
    scored = [Scored(s, draft.context, len(draft.context) + 1) for s, draft in zip(sequences, drafts, strict=True)]
    return Block.of(drafts, _distributions(target, scored))


def _every_draft(drafter: Drafter, sequences: list[Sequence], num_choices: int) -> tuple[list[Draft], torch.Tensor, list[int]]:
    """All drafts that the drafter can make, as it reports them; the probability of each, [drafts]; and whose each is."""
    k = max(sequence.route.k for sequence in sequences)
    scripts = torch.tensor(list(product(range(num_choices), repeat=k)), dtype=torch.float64).reshape(num_choices**k, k)
    copies = [_sequence_like(sequence) for sequence in sequences for _ in scripts]
    script_of = {copy.seed: scripts[number % len(scripts)] for number, copy in enumerate(copies)}  # also where it is told of
    with (
        mock.patch("specdecode.decoding.drafters._uniforms", lambda drawn, _: [script_of[s.seed] for s in drawn]),
        mock.patch("specdecode.decoding.drafters.sample", _follow_script),
    ):
        proposed = drafter.propose(copies)
    # Several scripts give one draft where it ends early or draws from fewer tokens.
    distinct = {
        (number // len(scripts), *draft.tokens): draft for number, draft in enumerate(proposed) if (draft_chance(draft)) > 0
    }
    chances = torch.tensor([draft_chance(draft) for draft in distinct.values()], dtype=torch.float64)
    owners = [key[0] for key in distinct]
    totals = torch.zeros(len(sequences), dtype=torch.float64).index_add_(0, torch.tensor(owners), chances)
    assert (totals - 1).abs().max() < 1e-12
    return list(distinct.values()), chances, owners


def draft_chance(draft: Draft) -> float:
    """The probability that the draft says it had."""
    chosen = draft.support == torch.tensor(draft.tokens, dtype=torch.long)[:, None]
    return float((draft.q * chosen).sum(-1).prod())


def _follow_script(weights: torch.Tensor, script: torch.Tensor) -> torch.Tensor:
    chosen = script.long().clamp(max=weights.shape[1] - 1)
    return torch.where(weights.gather(1, chosen[:, None]).squeeze(1) > 0, chosen, 0)


@dataclass
class _World:
    """For each absolute position, the interval that its noise is known to lie in."""

    setting: int
    intervals: dict[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def chance(self) -> float:
        chance = 1.0
        for low, high in self.intervals.values():
            chance *= high - low
        return chance


@contextmanager
def _shared_noise(worlds: list[_World], split: list[_World], num_wanted: int) -> Iterator[None]:
    """Puts one number for each position in the place of Gumbel noise.

    Where a choice depends on where in its interval the number lies, the world goes on with the first part of the interval, and
    the others are added to `split`. Noise from position `num_wanted` on changes nothing that is emitted, and is not split.
    """

    def choose(log_p: torch.Tensor, listed: torch.Tensor, seeds: list[int], positions: list[int]) -> torch.Tensor:
        p_by_token = log_p.new_zeros(len(log_p), 1 + int(listed.max())).scatter_add(1, listed, log_p.exp())
        tokens = []
        for row, p, seed, position in zip(p_by_token.cumsum(-1).tolist(), p_by_token.tolist(), seeds, positions, strict=True):
            world = worlds[seed]
            low, high = world.intervals.get(position, (0.0, 1.0))
            cuts = [cut for cut in row if low + 1e-13 < cut < high - 1e-13] if position < num_wanted else []
            for start, end in pairwise([*cuts, high]):
                split.append(_World(world.setting, {**world.intervals, position: (start, end)}))
            high = cuts[0] if cuts else high
            world.intervals[position] = (low, high)
            middle = (low + high) / 2
            tokens.append(
                next((t for t, cut in enumerate(row) if middle < cut and p[t]), max(t for t in range(len(p)) if p[t]))
            )
        return torch.tensor(tokens)

    with mock.patch("specdecode.decoding.distributions.shared_choice", choose):
        yield


def _distributions(target: ModelBackend, scored: list[Scored]) -> Distributions:
    rows = [Row(str(number), part.tokens, part.num_scored) for number, part in enumerate(scored)]
    return Distributions.of(target.logits(rows), scored, target.eos_token_ids)


def _sequence(prompt: list[int], emitted: tuple[int, ...], params: SamplingParams, route: Route | None = None) -> Sequence:
    matcher = None if params.grammar is None else GRAMMARS.matcher(params.grammar)
    return Sequence(prompt + list(emitted), params, route or Route(), num_prompt_tokens=len(prompt), matcher=matcher)


def _sequence_like(sequence: Sequence) -> Sequence:
    prompt, emitted = sequence.tokens[: sequence.num_prompt_tokens], sequence.tokens[sequence.num_prompt_tokens :]
    return _sequence(prompt, tuple(emitted), sequence.params, sequence.route)


def _cut(tokens: tuple[int, ...], target: ModelBackend, params: SamplingParams) -> tuple[int, ...]:
    """The first tokens, up to an end."""
    for count in range(1, len(tokens)):
        if _is_finished(tokens[:count], target, params):
            return tokens[:count]
    return tokens


def _is_finished(tokens: tuple[int, ...], target: ModelBackend, params: SamplingParams) -> bool:
    if params.grammar is not None and GRAMMARS.matcher(params.grammar).allowed(list(tokens)).is_over:
        return True
    return len(tokens) >= min(LENGTH, params.max_tokens) or tokens[-1:] in [
        (token,) for token in params.end_token_ids(target.eos_token_ids)
    ]
