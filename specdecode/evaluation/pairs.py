"""What a pair is in, a target, a draft and prompts out: models by name, a synthetic pair, or a well-known one's shapes."""

import json
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator

from specdecode.backends.backend import ModelConfig, open_model
from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.backends.presets import PRESETS, PresetName, make_preset
from specdecode.backends.synthetic import SyntheticConfig, save_pair
from specdecode.config import StrictModel
from specdecode.decoding.drafters import Drafter, ModelDrafter
from specdecode.errors import ConfigError, ModelError
from specdecode.evaluation.prompts import load_prompts
from specdecode.evaluation.remote import RemoteConfig, draft_process
from specdecode.evaluation.stopwatch import DRAFT_PASS, DRAFTING, Stopwatch, WatchedModel
from specdecode.exchange.messages import ModelTokens
from specdecode.text import Tokenizer
from specdecode.vocabulary import SameVocabulary

_MADE = "pair.json"


class PairConfig(StrictModel):
    """One of three: `target` and `draft`, `synthetic`, or `preset`."""

    target: ModelConfig | None = Field(default=None, description="the target, embedded, a folder or on the Hub")
    draft: str | None = Field(default=None, description="its draft, which is opened as the target is")
    synthetic: SyntheticConfig | None = Field(default=None, description="a pair of this shape that agrees so often")
    folder: str = Field(default="results/pair", description="where the synthetic pair is, or is put once it is made")
    preset: PresetName | None = Field(default=None, description="the shapes of a well-known pair, with random weights")
    device: str = Field(default="auto", description="of a preset: auto, cpu, cuda or cuda:N")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="bfloat16", description="of a preset")

    @model_validator(mode="after")
    def _is_one(self) -> "PairConfig":
        ways = {"target": self.target, "synthetic": self.synthetic, "preset": self.preset}
        given = [name for name, value in ways.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of target, synthetic and preset, got {' and '.join(given) or 'none'}")
        if (self.draft is None) != (self.target is None):
            raise ValueError(f"expected target and draft together, got draft {self.draft!r}")
        return self

    def names(self) -> tuple[str, str]:
        """What target and draft are called."""
        if self.preset is not None:
            return PRESETS[self.preset]
        if self.target is not None and self.draft is not None:
            return self.target.model, self.draft
        return f"{self.folder}/target", f"{self.folder}/draft"


@dataclass(frozen=True)
class Pair:
    """Two models that are open; without text, prompts are tokens drawn at random."""

    target: HuggingFaceBackend
    draft: HuggingFaceBackend
    has_text: bool

    def drafter(self, watch: Stopwatch, stack: ExitStack) -> Drafter:
        """The draft in this process, watched for as long as the stack stands."""
        watched = stack.enter_context(WatchedModel(self.draft, watch, DRAFT_PASS, DRAFTING))
        if self.has_text:
            return ModelDrafter.between(watched, self.target)
        same = SameVocabulary(self.draft.vocab_size, self.target.vocab_size)
        return ModelDrafter(watched, same, eos_token_ids=self.target.eos_token_ids)

    def remote_drafter(self, num_threads: int | None, stack: ExitStack) -> Drafter:
        """The draft in a process of its own, for as long as the stack stands.

        Raises:
            ConfigError: the draft has no name by which another process could open it.
        """
        if not self.has_text:
            raise ConfigError("is_remote: expected a draft with a name or a folder, got one that is only a shape")
        config = RemoteConfig(target=self.target.name, draft=self.draft.name, num_threads=num_threads or 1)
        return stack.enter_context(draft_process(config, ModelTokens.of(self.target), run_ahead=False))

    def prompts(self, domain: str, count: int, num_tokens: int) -> list[list[int]]:
        """`count` prompts: the built-in ones of a domain, over and over; `num_tokens` tokens each where there is no text."""
        if not self.has_text:
            return self.random_prompts(count, num_tokens)
        tokenizer = Tokenizer(self.target.name)
        found = [prompt.encode(tokenizer) for prompt in load_prompts(domain)]
        return [found[number % len(found)] for number in range(count)]

    def random_prompts(self, count: int, num_tokens: int) -> list[list[int]]:
        """Tokens that both models have, drawn at random."""
        size = min(self.target.vocab_size, self.draft.vocab_size)
        generator = torch.Generator().manual_seed(0)
        return torch.randint(size, (count, num_tokens), generator=generator).tolist()


def open_pair(config: PairConfig) -> Pair:
    """Opens the pair, and makes it first where that is asked for.

    Raises:
        ConfigError: no synthetic pair can be made so, or another one is in its folder.
        ModelError: a model does not load, or is none of transformers' in this process.
    """
    if config.preset is not None:
        return Pair(*make_preset(config.preset, config.device, config.dtype), has_text=False)
    target, draft = config.names()
    options = config.target or ModelConfig(model=target)
    if config.synthetic is not None:
        _make_once(config.synthetic, Path(config.folder))
        options = ModelConfig(model=target, device=config.synthetic.device)
    models = [open_model(options.model_copy(update={"model": name})) for name in (target, draft)]
    if any(not isinstance(model, HuggingFaceBackend) or model.device != models[0].device for model in models):  # type: ignore[attr-defined]
        raise ModelError(f"{target} with {draft}: expected both models whole, on one device")
    return Pair(models[0], models[1], has_text=True)  # type: ignore[arg-type]


def _make_once(config: SyntheticConfig, folder: Path) -> None:
    """The search for a pair takes minutes, so one that is there already is taken."""
    made = {"config": config.model_dump(mode="json", exclude={"device"})}
    path = folder / _MADE
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8"))["config"] != made["config"]:
            raise ConfigError(f"pair.folder {str(folder)!r}: holds a pair of another shape: expected another folder")
        return
    _, _, figures = save_pair(config, folder)
    path.write_text(json.dumps({**made, "figures": asdict(figures)}, indent=1) + "\n", encoding="utf-8")
