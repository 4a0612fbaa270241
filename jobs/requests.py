"""Prompts in, requests and the answers that the library gives to them alone out: what the drills and the soak ask a server."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from serve.config import DraftModelConfig, ServeConfig
from serve.decoder import model_drafter
from serve.models import part
from serve.schema import NO_DRAFT
from specdecode.backends.backend import ModelBackend, ModelConfig, open_model
from specdecode.decoding.drafters import Drafter, RoutedDrafter
from specdecode.decoding.loop import end_at, generate
from specdecode.decoding.sequence import Round, Route, SamplingParams, Sequence
from specdecode.evaluation.prompts import Prompt, load_prompts
from specdecode.exchange.messages import ModelTokens
from specdecode.text import StopCriterion, Tokenizer

_LOGPROB_TOLERANCE = 1e-3  # a batch is not computed in the same order as a sequence alone
ENDLESS, PROBE = "endless", "probe"
_WORDS = ["\n\n", " the ", "return", "."]


@dataclass(frozen=True)
class Form:
    """A kind of request.

    Attributes:
        name: names it in the records.
        draft: who drafts.
        sampling: the body's fields that say how tokens are chosen.
        others: its other fields.
        max_tokens: the longest answer.
        length: of the prompt, in tokens: the end of so much text; a whole prompt if None.
    """

    name: str
    draft: str
    sampling: dict[str, Any]
    others: dict[str, Any] = field(default_factory=dict)
    max_tokens: int = 40
    length: int | None = None

    @property
    def verifier(self) -> str:
        """How its drafts are accepted."""
        return "coupled" if self.name.startswith("coupled") else "rejection"


def forms(remote: list[str], local: str) -> list[Form]:
    """All kinds, with the deployed drafts `remote` and the local one: half are coupled and sampled, half greedy or seeded.

    Besides, one that is soon answered for every draft, and one with a long answer for clients who do not wait for its end.
    """
    one, other = remote[0], remote[-1]
    warm: dict[str, Any] = {"temperature": 0.8}
    seeded: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95}
    greedy: dict[str, Any] = {"temperature": 0}
    return [
        Form("coupled", one, {"temperature": 0.8}),
        Form("coupled long", other, {"temperature": 1.0, "top_p": 0.9}, max_tokens=72),
        Form("coupled short prompt", one, warm, length=1),
        Form("coupled long prompt", other, warm, length=700),
        Form("coupled local", local, {"temperature": 0.7, "top_k": 40}),
        Form("coupled two", one, warm, {"n": 2}, max_tokens=24),
        Form("coupled stop", other, warm, {"stop": _WORDS[:2]}),
        Form("coupled logprobs", one, warm, {"logprobs": 2}),
        Form("coupled penalties", other, {**warm, "frequency_penalty": 0.5, "repetition_penalty": 1.1}),
        Form("coupled whole", one, warm, {"stream": False}),
        Form("greedy", one, greedy),
        Form("greedy long", other, greedy, max_tokens=72, length=300),
        Form("greedy local", local, greedy, {"ignore_eos": True}),
        Form("greedy stop", one, greedy, {"stop": _WORDS[2:]}),
        Form("greedy two", other, greedy, {"n": 2, "stream": False}, max_tokens=24),
        Form("greedy logprobs", other, greedy, {"logprobs": 0}),
        Form("greedy plain", NO_DRAFT, greedy, length=4),
        Form("seeded local", local, seeded),
        Form("seeded", one, seeded),
        Form("seeded long prompt", other, seeded, length=500),
        *(Form(PROBE, draft, greedy, max_tokens=12) for draft in [*remote, local]),
        Form(ENDLESS, one, {"temperature": 0}, {"ignore_eos": True, "logprobs": 5}, max_tokens=200),
    ]


@dataclass(frozen=True)
class Answer:
    """One of a request's answers.

    Attributes:
        text: all of it.
        finish_reason: why it ends.
        logprobs: of its tokens, if they were asked for.
        rounds: for each round how many tokens were drafted, and the text until then; empty if nobody was told.
    """

    text: str
    finish_reason: str | None
    logprobs: list[float] | None = None
    rounds: list[tuple[int, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Question:
    """A request and its answers.

    Attributes:
        form: its kind.
        path: where it is sent.
        body: what is sent.
        answers: what the library gives.
        depends_on_drafts: whether the answer may be another one where a round had to do without its draft.
    """

    form: Form
    path: str
    body: dict[str, Any]
    answers: list[Answer]
    depends_on_drafts: bool

    def difference(self, answers: list[Answer]) -> str | None:
        """What is wrong with these answers, in a few words; None if nothing is."""
        for expected, given in zip(self.answers, answers, strict=True):
            if self.depends_on_drafts:
                if difference := _difference_of_rounds(expected, given):
                    return difference
            elif (given.text, given.finish_reason) != (expected.text, expected.finish_reason):
                return f"expected {expected.text!r} ({expected.finish_reason}), got {given.text!r} ({given.finish_reason})"
            elif difference := _difference_of_logprobs(expected, given):
                return difference
        return None


def _difference_of_rounds(expected: Answer, given: Answer) -> str | None:
    """Compares until a round had another number of drafted tokens than it should: from there on a seed promises nothing."""
    text = expected.text
    for number, ((num_expected, text_until), (num_drafted, text_given)) in enumerate(
        zip(expected.rounds, given.rounds, strict=False)
    ):
        if num_expected != num_drafted:
            return None
        if text_until != text_given:
            return f"round {number}: expected {text_until!r}, got {text_given!r}"
    if given.text != text or given.finish_reason != expected.finish_reason:
        return f"expected {text!r} ({expected.finish_reason}), got {given.text!r} ({given.finish_reason})"
    return None


def _difference_of_logprobs(expected: Answer, given: Answer) -> str | None:
    if expected.logprobs is None:
        return None
    logprobs = given.logprobs or []
    is_close = len(logprobs) == len(expected.logprobs) and all(
        abs(one - other) < _LOGPROB_TOLERANCE for one, other in zip(expected.logprobs, logprobs, strict=True)
    )
    return None if is_close else f"expected log-probabilities {expected.logprobs}, got {logprobs}"


class Library:
    """The models of an application in this process.

    Args:
        config: of the application.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._target: ModelBackend = open_model(part(ModelConfig, config.target))
        self._tokenizer = Tokenizer(config.target.model)
        drafters: dict[str, Drafter] = {
            name: model_drafter(open_model(part(ModelConfig, draft)), draft, ModelTokens.of(self._target))
            for name, draft in config.draft_models.items()
        }
        self._drafter = RoutedDrafter(drafters)
        self._drafts = config.draft_models
        self._model = config.model_name

    def questions(self, num_each: int, k: int) -> list[Question]:
        """So many questions of every form; those whose answers depend on it say that `k` tokens are to be drafted."""
        remote = [name for name, draft in self._drafts.items() if draft.is_deployed]
        [local, *_] = [name for name, draft in self._drafts.items() if _is_local(draft)]
        prompts = {domain: load_prompts(domain) for domain in ("code", "chat")}
        lines = [f"{prompt.prompt}\n" for prompt in prompts["chat"] + prompts["code"]]
        text = [token for line in lines for token in self._tokenizer.encode(line)]
        found = []
        for index, form in enumerate(forms(remote, local)):
            for number in range(1 if form.name in (ENDLESS, PROBE) else num_each):
                place = index * num_each + number
                domain = "chat" if form.draft == "chat" else "code"
                prompt = prompts[domain][place % len(prompts[domain])]
                found.append(self._question(form, prompt, text, place, k))
        return found

    def _question(self, form: Form, prompt: Prompt, text: list[int], seed: int, k: int) -> Question:
        depends_on_drafts = form.name.startswith("seeded")
        is_chat = form.length is None and prompt.format == "chat"
        logprobs = form.others.get("logprobs")
        others = dict(form.others)
        if is_chat and logprobs is not None:
            others |= {"logprobs": True, "top_logprobs": logprobs}
        options: dict[str, Any] = {"draft": form.draft, "verifier": form.verifier}
        if depends_on_drafts:
            options |= {"K": k, "rounds": True}
        body = {
            "model": self._model,
            "max_tokens": form.max_tokens,
            "seed": seed,
            "stream": True,
            **form.sampling,
            **others,
            "speculative_decoding": options,
        }
        if form.length is not None:
            start = 37 * seed % (len(text) - form.length)
            ids = text[start : start + form.length]
            body["prompt"] = ids
        else:
            ids = prompt.encode(self._tokenizer)
            body |= {"messages": [{"role": "user", "content": prompt.prompt}]} if is_chat else {"prompt": prompt.prompt}
        params = SamplingParams(
            **form.sampling,
            max_tokens=form.max_tokens,
            seed=seed,
            verifier=form.verifier,  # type: ignore[arg-type]
            ignore_eos=form.others.get("ignore_eos", False),
            logprobs=logprobs,
        )
        route = Route() if form.draft == NO_DRAFT else Route(form.draft, k)
        answers = [
            self._answer(Sequence(ids, choice, route), form.others.get("stop", []))
            for choice in params.choices(form.others.get("n", 1))
        ]
        path = "/v1/chat/completions" if is_chat else "/v1/completions"
        return Question(form, path, body, answers, depends_on_drafts)

    def _answer(self, sequence: Sequence, stop: list[str]) -> Answer:
        """Decodes one sequence alone."""
        rounds = list(self._rounds(sequence, stop))
        tokens = sequence.tokens[sequence.num_prompt_tokens :]
        detokenizer, so_far, told = self._tokenizer.detokenizer(), "", []
        for round in rounds:
            so_far += detokenizer.decode(round.tokens)
            if round.finish_reason is not None:
                so_far += detokenizer.flush()
            told.append((round.num_drafted, so_far))
        text = self._tokenizer.decode(tokens)
        end = min((text.index(word) for word in stop if word in text), default=len(text))
        logprobs = [logprob.logprob for round in rounds for logprob in round.logprobs or []]
        has_logprobs = sequence.params.logprobs is not None
        return Answer(text[:end], sequence.finish_reason, logprobs if has_logprobs else None, told)

    def _rounds(self, sequence: Sequence, stop: list[str]) -> Iterator[Round]:
        criterion = StopCriterion(self._tokenizer, stop)
        for ((_, round),) in generate([sequence], self._drafter, self._target):
            yield end_at(sequence, round, criterion.feed(round.tokens))


def _is_local(draft: DraftModelConfig) -> bool:
    return not draft.is_deployed


def use_threads(count: int) -> None:
    """Leaves the processors to the application, which runs beside this process."""
    torch.set_num_threads(count)
