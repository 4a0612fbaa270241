"""`specdecode generate`: a prompt in, its continuation and what it took out."""

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from specdecode.commands.options import Commands, add_command, add_json
from specdecode.commands.tables import print_json
from specdecode.config import StrictModel, check_config, read_yaml
from specdecode.errors import ConfigError

if TYPE_CHECKING:
    from specdecode.decoding.metrics import DecodingMetrics
    from specdecode.decoding.sequence import Round, SamplingParams
    from specdecode.grammar import Grammar
    from specdecode.text import Tokenizer

VerifierName = Literal["rejection", "block", "coupled"]  # of decoding.sequence, which takes seconds to import
_FLAG: dict[str, Any] = {"action": "store_true", "default": None}


class GenerateConfig(StrictModel):
    """What `specdecode generate` does; a file given with --config holds these keys, and options override it."""

    model: str = Field(description="the target: a Hugging Face name, a checkpoint folder, or an embedded model")
    draft: str | None = Field(default=None, description="the draft model; plain decoding if unset")
    lookup: bool = Field(default=False, description="guess by prompt lookup first, by the draft where it finds nothing")
    prompt: str = Field(description="the text to continue, or the message to answer with --chat")
    chat: bool = Field(default=False, description="treat the prompt as a user's message")
    max_tokens: int = 128
    K: int = 5
    adaptive: bool = Field(default=False, description="draft at the most K tokens, as many as pay")
    min_confidence: float = Field(default=0.0, ge=0, le=1, description="a draft ends where its own probability falls below")
    n: int = Field(default=1, ge=1, description="how many answers to generate")
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = Field(default_factory=dict)
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = Field(default_factory=list, description="texts that are never generated")
    stop: list[str] = Field(default_factory=list, description="the answer ends before these texts")
    stop_token_ids: list[int] = Field(default_factory=list)
    json_schema: str | None = Field(default=None, description="a file with a JSON schema, of which the answer is JSON")
    regex: str | None = Field(default=None, description="a regular expression, which all of the answer matches")
    min_tokens: int = 0
    ignore_eos: bool = False
    seed: int | None = None
    verifier: VerifierName = "rejection"
    dtype: str = "auto"
    device: str = "auto"


def add_generate(commands: Commands) -> None:
    generate = add_command(
        commands,
        "generate",
        _generate,
        "continue a prompt, and print what it took",
        'specdecode generate --model tiny/target --draft tiny/draft-code --prompt "def read_lines(path):" --K 4',
    )
    generate.add_argument("--config", metavar="FILE", help="a YAML file with these options as keys")
    generate.add_argument("--model", help="the target: a Hugging Face name, a checkpoint folder, or tiny/target")
    generate.add_argument("--draft", help="the draft model; plain decoding without it")
    generate.add_argument("--lookup", **_FLAG, help="guess by prompt lookup first, by the draft where it finds nothing")
    generate.add_argument("--prompt", help="the text to continue")
    generate.add_argument("--chat", **_FLAG, help="treat the prompt as a user's message")
    generate.add_argument("--max-tokens", type=int, help="generate at the most so many tokens (default 128)")
    generate.add_argument("--K", type=int, help="how many tokens to draft in a round (default 5)")
    generate.add_argument("--adaptive", **_FLAG, help="draft at the most K tokens, as many as pay")
    generate.add_argument("--min-confidence", type=float, help="a draft ends where its own probability falls below (default 0)")
    generate.add_argument("--n", type=int, help="how many answers to generate (default 1)")
    generate.add_argument("--temperature", type=float, help="0 takes the most likely token (default 0)")
    generate.add_argument("--top-p", type=float, help="keep the most likely tokens up to this probability (default 1)")
    generate.add_argument("--top-k", type=int, help="keep so many most likely tokens; 0 keeps all (default 0)")
    generate.add_argument("--min-p", type=float, help="keep tokens with this share of the largest probability (default 0)")
    generate.add_argument("--repetition-penalty", type=float, help="above 1, makes tokens that are there rarer (default 1)")
    generate.add_argument("--presence-penalty", type=float, help="makes tokens of the answer rarer (default 0)")
    generate.add_argument("--frequency-penalty", type=float, help="the same, for each time they are there (default 0)")
    generate.add_argument("--bad-words", action="append", metavar="TEXT", help="never generate this text; may be repeated")
    generate.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    generate.add_argument("--json-schema", metavar="FILE", help="the answer is JSON of the schema in this file")
    generate.add_argument("--regex", metavar="PATTERN", help="all of the answer matches this regular expression")
    generate.add_argument("--min-tokens", type=int, help="generate at least so many tokens (default 0)")
    generate.add_argument("--ignore-eos", **_FLAG, help="go on after the model's end token")
    generate.add_argument("--seed", type=int, help="makes sampling repeatable")
    generate.add_argument("--verifier", help="how drafted tokens are accepted: rejection, block or coupled (default rejection)")
    generate.add_argument("--dtype", help="auto, float32, bfloat16 or float16 (default auto)")
    generate.add_argument("--device", help="auto, cpu, cuda or cuda:N (default auto)")
    add_json(generate)


def _generate(parsed: argparse.Namespace) -> None:
    from specdecode.backends.backend import create_backend  # torch and transformers take seconds to import
    from specdecode.decoding.control import AdaptiveLength
    from specdecode.decoding.drafters import ChainDrafter, PromptLookupDrafter
    from specdecode.decoding.loop import as_drafter, generate
    from specdecode.decoding.metrics import DecodingMetrics
    from specdecode.decoding.sequence import Route, Sequence
    from specdecode.text import Tokenizer

    config = _generate_config(parsed)
    tokenizer = Tokenizer(config.model)
    params = _sampling_params(config, tokenizer)
    message = [{"role": "user", "content": config.prompt}]
    prompt = tokenizer.encode_chat(message) if config.chat else tokenizer.encode(config.prompt)
    target = create_backend(config.model, config.dtype, config.device)
    draft = create_backend(config.draft, config.dtype, config.device) if config.draft else None
    drafter = as_drafter(draft, target, min_confidence=config.min_confidence)
    if config.lookup:
        drafter = ChainDrafter([PromptLookupDrafter(), drafter])
    answers = []
    for number, choice in enumerate(params.choices(config.n)):
        sequence = Sequence(prompt, choice, Route("draft", config.K))
        rounds = generate([sequence], drafter, target, AdaptiveLength() if config.adaptive else None)
        metrics = DecodingMetrics()
        texts = _texts((round for ((_, round),) in rounds), metrics, tokenizer, config)
        if parsed.json:
            answers.append({"text": "".join(texts), **_as_json(metrics)})
            continue
        if config.n > 1:
            print(f"--- {number + 1} of {config.n}")
        for text in texts:
            print(text, end="", flush=True)
        print()
        print(_figures(metrics), file=sys.stderr)
    if parsed.json:
        print_json(answers)


def _texts(
    rounds: "Iterable[Round]", metrics: "DecodingMetrics", tokenizer: "Tokenizer", config: GenerateConfig
) -> Iterator[str]:
    """The answer as it comes, up to a stop string; rounds are counted in `metrics`."""
    from specdecode.text import StopStrings

    detokenizer, stops = tokenizer.detokenizer(), StopStrings(config.stop)
    started = time.perf_counter()
    for round in rounds:
        metrics.add(round, time.perf_counter() - started)
        text = detokenizer.decode(round.tokens)
        yield stops.feed(text) if metrics.num_generated > config.min_tokens else text
        if stops.is_stopped:
            return
    yield stops.feed(detokenizer.flush()) + stops.flush()


def _sampling_params(config: GenerateConfig, tokenizer: "Tokenizer") -> "SamplingParams":
    from specdecode.decoding.sequence import SamplingParams

    names = GenerateConfig.model_fields.keys() & SamplingParams.__dataclass_fields__.keys()
    options = {name: getattr(config, name) for name in names}
    return SamplingParams(**options, bad_words_ids=tuple(tokenizer.spellings(config.bad_words)), grammar=_grammar(config))


def _grammar(config: GenerateConfig) -> "Grammar | None":
    from specdecode.grammar import Grammar

    if config.json_schema is not None and config.regex is not None:
        raise ConfigError("regex: expected no json_schema beside it")
    if config.regex is not None:
        return Grammar("regex", config.regex, field="regex")
    if config.json_schema is None:
        return None
    try:
        return Grammar("json_schema", Path(config.json_schema).read_text(encoding="utf-8"), field="json_schema")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"json_schema: {config.json_schema} cannot be read: {error}") from error


def _figures(metrics: "DecodingMetrics") -> str:
    return (
        f"[{metrics.num_generated} tokens in {metrics.total_time_s:.2f} s, {metrics.tokens_per_second:.1f} tok/s, "
        f"first after {metrics.time_to_first_token_s:.3f} s; {metrics.num_target_passes} target passes, "
        f"{metrics.tokens_per_target_pass:.2f} tokens each; acceptance {metrics.acceptance_rate:.2f} "
        f"({metrics.num_accepted} of {metrics.num_drafted} drafted)]"
    )


def _as_json(metrics: "DecodingMetrics") -> dict[str, float]:
    counts = ("num_generated", "num_target_passes", "num_drafted", "num_accepted")
    figures = ("acceptance_rate", "tokens_per_target_pass", "tokens_per_second", "time_to_first_token_s", "total_time_s")
    return {name: getattr(metrics, name) for name in counts + figures}


def _generate_config(parsed: argparse.Namespace) -> GenerateConfig:
    """The options, over the file's keys if there is one."""
    values = read_yaml(parsed.config) if parsed.config else {}
    given = {name: getattr(parsed, name, None) for name in GenerateConfig.model_fields}  # some only the file has
    values.update({name: value for name, value in given.items() if value is not None})
    return check_config(values, GenerateConfig, where=parsed.config or "generate")
