"""What users would run instead, on the same weights: transformers' own `generate`, plain, assisted, and with prompt lookup."""

import time
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from specdecode.decoding.sequence import SamplingParams

PeerName = Literal["hf_plain", "hf_assisted", "prompt_lookup"]
PEERS: tuple[PeerName, ...] = ("hf_plain", "hf_assisted", "prompt_lookup")


@dataclass
class PeerAnswer:
    """What came of it: generated ids, when each pass was done, and how many tokens it gave; seconds from the start."""

    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    round_tokens: list[int] = field(default_factory=list)


class _Watch(StoppingCriteria):
    """Notes when tokens have come; stops nothing."""

    def __init__(self, num_prompt_tokens: int) -> None:
        self.answer = PeerAnswer()
        self._length = num_prompt_tokens
        self._started = time.perf_counter()

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.Tensor:
        del scores
        length = input_ids.shape[1]
        self.answer.times_s.append(time.perf_counter() - self._started)
        self.answer.round_tokens.append(length - self._length)
        self._length = length
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def peer_generate(
    peer: PeerName,
    target: PreTrainedModel,
    draft: PreTrainedModel | None,
    prompt: Several[int],
    params: SamplingParams,
    k: int,
    stops: Several[str] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PeerAnswer:
    """Answers one prompt as transformers would.

    Args:
        peer: how. With a draft, always with k tokens: transformers' own schedule changes their number, which
            `num_assistant_tokens_schedule` of the draft's generation config would choose.
        target, draft: the models.
        prompt: ids.
        params: temperature, top-p, top-k and the number of tokens; others have no meaning here.
        k: tokens to draft in a round.
        stops: texts that end the answer; need the tokenizer.
        tokenizer: the target's.
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
    if stops:
        options |= {"stop_strings": list(stops), "tokenizer": tokenizer}
    if params.seed is not None:
        torch.manual_seed(params.seed)
    watch = _Watch(len(prompt))
    output = target.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=params.max_tokens, stopping_criteria=[watch], **options
    )
    watch.answer.tokens = output[0, len(prompt) :].tolist()
    return watch.answer
