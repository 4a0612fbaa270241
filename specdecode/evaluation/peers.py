"""What users would run instead, on the same weights: transformers' own `generate`, plain, assisted, and with prompt lookup."""

import time
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, StoppingCriteria

from specdecode.backends.grouped import ungrouped
from specdecode.backends.packing import unpacked
from specdecode.decoding.sequence import SamplingParams
from specdecode.text import StopCriterion

PeerName = Literal["hf_plain", "hf_assisted", "prompt_lookup"]
PEERS: tuple[PeerName, ...] = ("hf_plain", "hf_assisted", "prompt_lookup")


@dataclass
class PeerAnswer:
    """What came of it: generated ids, when each pass was done, and how many tokens it gave; seconds from the start."""

    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    round_tokens: list[int] = field(default_factory=list)


class _Watch(StoppingCriteria):
    """Notes when tokens have come, and ends at a text that ends the answer: assisted generation takes no `stop_strings`."""

    def __init__(self, num_prompt_tokens: int, stop: StopCriterion | None) -> None:
        self.answer = PeerAnswer()
        self._stop = stop
        self._length = num_prompt_tokens
        self._started = time.perf_counter()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.Tensor:
        del scores
        tokens = input_ids[0, self._length :].tolist()
        self._length = input_ids.shape[1]
        self.answer.times_s.append(time.perf_counter() - self._started)
        count = None if self._stop is None else self._stop.feed(tokens)
        self.answer.tokens += tokens[:count]
        self.answer.round_tokens.append(len(tokens[:count]))
        return torch.full((len(input_ids),), count is not None, device=input_ids.device)


@torch.inference_mode()
def peer_generate(
    peer: PeerName,
    target: PreTrainedModel,
    draft: PreTrainedModel | None,
    prompt: Several[int],
    params: SamplingParams,
    k: int,
    stop: StopCriterion | None = None,
) -> PeerAnswer:
    """Answers one prompt as transformers would.

    Args:
        peer: how. With a draft, always with k tokens: transformers' own schedule changes their number, which
            `num_assistant_tokens_schedule` of the draft's generation config would choose.
        target, draft: the models.
        prompt: ids.
        params: temperature, top-p, top-k and the number of tokens; others have no meaning here.
        k: tokens to draft in a round.
        stop: watches for texts that end the answer.
    """
    ids = torch.tensor([list(prompt)], device=target.device)
    options: dict[str, Any] = {"do_sample": params.temperature > 0}
    if params.temperature > 0:
        options |= {"temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k or 0}
    if peer == "hf_assisted":
        assert draft is not None, "assisted generation has a draft"
        draft.generation_config.num_assistant_tokens = k
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0
        options["assistant_model"] = draft
    elif peer == "prompt_lookup":
        options["prompt_lookup_num_tokens"] = k
    if params.seed is not None:
        torch.manual_seed(params.seed)
    models = [target] if draft is None else [target, draft]
    with unpacked(*models), ungrouped(*models):
        watch = _Watch(len(prompt), stop)  # which starts the clock
        target.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=params.max_tokens, stopping_criteria=[watch], **options
        )
    return watch.answer
