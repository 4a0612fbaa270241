"""A shape and an agreement in, two checkpoint folders out: a target and a draft that cost what real ones of their shape cost.

The weights are random; nothing is trained and nothing is downloaded. The target's first layers, with its embeddings, final norm
and head, are the draft. What the target's later layers add to the residual stream is scaled down, by bisection, until the draft
agrees with the target as often as was asked for. Nothing here knows of drafting, acceptance or requests.

What the random weights are, so that text and distributions resemble a language model's:

- The head is a matrix of its own. With the embeddings as head, the likeliest token after a token would be that token itself.
- The head's scale gives the distributions the mean entropy that was asked for, whatever the vocabulary. At the default of
  2.5 nats a dozen tokens are likely and the rest is a long tail. A larger one brings overlap and agreement closer together.
- Every layer, before it is scaled, adds as much to the residual stream as the embedding brings, and attention is peaked (the
  scores' standard deviation is 3). So the next token depends on more than the last one, and greedy text of the default shape
  goes on for hundreds of tokens without a period. With flat attention each token would follow from the last alone.
- Each row of the head points a little away from its token's embedding, so that a token rarely follows itself. A token that
  repeats is a trap: all that there is to attend to is that token, and greedy text would never leave it.
- Special tokens, and bytes that are no printable ASCII, have rows of zeros in the head, which puts them into the middle of
  the logits, far below the likely ones. So texts run to their length, and every token shows as text at once.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specdecode.backends.loading import resolve_device, resolve_dtype
from specdecode.config import StrictModel
from specdecode.errors import ConfigError

TOLERANCE = 0.01  # half of what is promised; the measured agreement has a standard error of 0.005

_END = "<|end|>"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_MIN_VOCAB_SIZE = 256 + 1 + len(_ROLES)
_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_LETTERS = "etaoinshrdlcumwfgypbvkjxqz"  # as frequent as in English, so that the short words are the common ones

_SCORE_STD = 3.0
_REPULSION = 4.0  # from the embedding, in the head's own scale; the residual stream's growth takes nearly half of it
_GATED_RMS = 0.6  # of silu(x) * y, for standard normal x and y
_NUM_ROWS, _NUM_PROMPT_TOKENS, _NUM_TOKENS = 64, 32, 128  # texts to measure on, random tokens before each, and tokens of each
_NUM_FEW_ROWS, _FAR = 4, 0.1  # so few texts tell on which side an agreement is that is so far off
_NUM_STEPS = 12


class SyntheticConfig(StrictModel):
    """The shape of a target and its draft, both Llama models, and how often they agree."""

    num_layers: int = Field(default=12, gt=1, description="layers of the target")
    draft_layers: int = Field(default=1, gt=0, description="layers of the draft, which are the target's first")
    hidden_size: int = Field(default=512, gt=0)
    num_heads: int = Field(default=8, gt=0)
    num_kv_heads: int = Field(default=4, gt=0)
    intermediate_size: int = Field(default=1376, gt=0)
    vocab_size: int = Field(default=4096, ge=_MIN_VOCAB_SIZE, description="tokens, with all 256 bytes and 4 special ones")
    max_length: int = Field(default=2048, ge=_NUM_PROMPT_TOKENS + _NUM_TOKENS, description="the longest sequence, in tokens")
    agreement: float = Field(
        default=0.65, ge=0, le=1, description="how often both have the same likeliest token, on text that the target samples"
    )
    entropy: float = Field(default=2.5, ge=0.5, le=4, description="the target's mean entropy at temperature 1, in nats")
    seed: int = Field(default=0, ge=0)
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="bfloat16", description="the dtype of the stored weights")
    device: str = Field(default="auto", description="where the agreement is measured: auto, cpu, cuda or cuda:N")

    @model_validator(mode="after")
    def _has_a_shape(self) -> "SyntheticConfig":
        if self.draft_layers >= self.num_layers:
            raise ValueError(f"draft_layers {self.draft_layers}: expected fewer than num_layers {self.num_layers}")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(f"hidden_size {self.hidden_size}: expected an even multiple of num_heads {self.num_heads}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads}: expected a divisor of num_heads {self.num_heads}")
        return self


@dataclass(frozen=True)
class PairFigures:
    """What a pair is, measured on text that the target itself samples at temperature 1.

    Attributes:
        agreement: how often the draft's likeliest token is the target's.
        overlap: the mean over positions of the sum over tokens of min(p, q).
        entropy: the mean entropy of the target's distributions, in nats.
        residual_scale: what the output projections of the target's later layers were multiplied by.
        num_target_parameters: the target's weights, embeddings and head included.
        num_draft_parameters: the draft's.
    """

    agreement: float
    overlap: float
    entropy: float
    residual_scale: float
    num_target_parameters: int
    num_draft_parameters: int


def save_pair(config: SyntheticConfig, folder: str | Path) -> tuple[Path, Path, PairFigures]:
    """Makes a target and a draft with one tokenizer, and writes them to `target` and `draft` in `folder`.

    The same config gives the same weights on the same kind of device; the search for the scale takes one to two minutes for
    the default shape on two CPU cores.

    Returns:
        The target's folder, the draft's, and what was measured.

    Raises:
        ConfigError: no scale gives the agreement, or the folder cannot be written.
        ModelError: this machine does not have the device.
    """
    device = resolve_device(config.device)
    target_folder, draft_folder = Path(folder) / "target", Path(folder) / "draft"
    for path in (target_folder, draft_folder):
        _make_folder(path)
    tokenizer = _create_tokenizer(config.vocab_size, config.max_length)
    model = _create_target(config, tokenizer)
    model.to(dtype=getattr(torch, config.dtype)).to(device, _measured_dtype(config, device))  # measured as rounded for storage
    scale, measured = _search(model, config)
    num_parameters = []
    for path, num_layers in ((target_folder, config.num_layers), (draft_folder, config.draft_layers)):
        _keep_first_layers(model, num_layers)
        model.to(dtype=getattr(torch, config.dtype)).save_pretrained(path)
        tokenizer.save_pretrained(path)
        num_parameters.append(sum(weight.numel() for weight in model.parameters()))
    figures = PairFigures(measured.agreement, measured.overlap, measured.entropy, scale, *num_parameters)
    return target_folder, draft_folder, figures


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from error


def _create_tokenizer(vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose ids are the 256 bytes, short words of lower-case letters, and the special tokens."""
    vocabulary = _byte_tokens()
    words = list(itertools.islice(_words(), vocab_size - _MIN_VOCAB_SIZE))
    merges = [(word[:-1], word[-1]) for word in words]
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(vocabulary + words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_END, *_ROLES])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=_END,
        pad_token=_END,
        additional_special_tokens=list(_ROLES),
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )


def _byte_tokens() -> list[str]:
    """All bytes as a byte-level tokenizer writes them, in an order that does not change from call to call."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _words() -> Iterator[str]:
    """Words of two letters, of three, and so on, those that begin with a space first; each is one before it and a letter."""
    for length in itertools.count(1):
        for first, *rest in itertools.product("Ġ" + _LETTERS, *[_LETTERS] * length):
            yield first + "".join(rest)


def _create_target(config: SyntheticConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama model with the weights that the module's docstring describes, none scaled yet."""
    shape = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws weights of its own
        model = LlamaForCausalLM(shape).eval()
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    silent = [id for id in range(config.vocab_size) if not _is_shown(tokenizer, id)]
    _draw_weights(model, _logit_std(config.vocab_size - len(silent), config.entropy), silent, config.seed)
    return model


def _is_shown(tokenizer: PreTrainedTokenizerFast, id: int) -> bool:
    text = tokenizer.decode([id], skip_special_tokens=True)
    return bool(text) and text.isascii() and text.isprintable()


@torch.no_grad()
def _draw_weights(model: LlamaForCausalLM, logit_std: float, silent: list[int], seed: int) -> None:
    hidden_size, intermediate_size = model.config.hidden_size, model.config.intermediate_size
    stds = {
        "embed_tokens": 1.0,
        "q_proj": math.sqrt(_SCORE_STD / hidden_size),
        "k_proj": math.sqrt(_SCORE_STD / hidden_size),
        "v_proj": 1 / math.sqrt(hidden_size),
        "o_proj": 1 / math.sqrt(hidden_size),
        "gate_proj": 1 / math.sqrt(hidden_size),
        "up_proj": 1 / math.sqrt(hidden_size),
        "down_proj": 1 / (_GATED_RMS * math.sqrt(intermediate_size)),
        "lm_head": logit_std / math.sqrt(hidden_size),
    }
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        kind = name.split(".")[-2]
        if kind in stds:  # norms stay ones
            weight.normal_(0, stds[kind], generator=generator)
    model.lm_head.weight.sub_(model.model.embed_tokens.weight, alpha=_REPULSION * logit_std / hidden_size)
    model.lm_head.weight[silent] = 0


def _logit_std(num_tokens: int, entropy: float) -> float:
    """The standard deviation of normal logits at which distributions over `num_tokens` have that mean entropy."""
    normal = torch.randn(64, num_tokens, generator=torch.Generator().manual_seed(0))
    low, high = 0.0, 16.0
    for _ in range(_NUM_STEPS):
        std = (low + high) / 2
        if _entropies(std * normal).mean() > entropy:
            low = std
        else:
            high = std
    return (low + high) / 2


def _entropies(logits: torch.Tensor) -> torch.Tensor:
    """Of [n, vocab] logits, [n] in nats."""
    return torch.distributions.Categorical(logits=logits, validate_args=False).entropy()


def _measured_dtype(config: SyntheticConfig, device: torch.device) -> torch.dtype:
    """The one that a backend computes in: argmax agreement in a short dtype differs a little from that in float32."""
    dtype = resolve_dtype("auto", device)
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, config.dtype)


@dataclass(frozen=True)
class _Measured:
    agreement: float
    overlap: float
    entropy: float


def _search(model: LlamaForCausalLM, config: SyntheticConfig) -> tuple[float, _Measured]:
    """Scales the later layers so that the agreement is the one asked for; returns the scale and what was measured.

    Bisects the fraction f of scale = f / (1 - f), which is 0 for an agreement of 1 and may grow without bound for one of 0.
    """
    projections = _LaterProjections(model, config)
    low, high, fraction = 0.0, 1.0, 0.0 if config.agreement == 1 else 0.5
    tried = []
    for _ in range(_NUM_STEPS):
        scale = fraction / (1 - fraction)
        projections.scale(scale)
        measured = _measure(model, config, _NUM_FEW_ROWS)
        if abs(measured.agreement - config.agreement) < _FAR:
            measured = _measure(model, config, _NUM_ROWS)
            if abs(measured.agreement - config.agreement) <= TOLERANCE:
                return scale, measured
        tried.append(measured.agreement)
        low, high = (fraction, high) if measured.agreement > config.agreement else (low, fraction)
        fraction = (low + high) / 2
    nearest = min(tried, key=lambda agreement: abs(agreement - config.agreement))
    raise ConfigError(
        f"agreement: expected one that this shape can have, got {config.agreement}; the nearest was {nearest:.3f}"
    )


class _LaterProjections:
    """The output projections of the layers that the draft does not have, whole and as they are scaled."""

    def __init__(self, model: LlamaForCausalLM, config: SyntheticConfig) -> None:
        layers = model.model.layers[config.draft_layers :]
        self._weights = [weight for layer in layers for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight)]
        self._whole = [weight.detach().clone() for weight in self._weights]
        self._dtype = getattr(torch, config.dtype)

    @torch.no_grad()
    def scale(self, scale: float) -> None:
        for weight, whole in zip(self._weights, self._whole, strict=True):
            weight.copy_((scale * whole).to(self._dtype))


@torch.inference_mode()
def _measure(model: LlamaForCausalLM, config: SyntheticConfig, num_rows: int) -> _Measured:
    """Samples texts from the target, and compares each of its distributions with the draft's at the same place."""
    generator = torch.Generator(model.device).manual_seed(config.seed)
    tokens = torch.randint(config.vocab_size, (num_rows, _NUM_PROMPT_TOKENS), generator=generator, device=model.device)
    cache: Any = None
    sums = torch.zeros(3, dtype=torch.float64, device=model.device)
    for _ in range(_NUM_TOKENS):
        output = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1, output_hidden_states=True)
        cache = output.past_key_values
        logits = output.logits[:, -1].float()  # [num_rows, vocab_size]
        draft_logits = model.lm_head(model.model.norm(output.hidden_states[config.draft_layers][:, -1])).float()
        p, q = logits.softmax(-1), draft_logits.softmax(-1)
        is_same = logits.argmax(-1) == draft_logits.argmax(-1)
        sums += torch.stack([is_same.sum(), torch.minimum(p, q).sum(), _entropies(logits).sum()])
        tokens = torch.multinomial(p, 1, generator=generator)
    return _Measured(*(sums / (num_rows * _NUM_TOKENS)).tolist())


def _keep_first_layers(model: LlamaForCausalLM, num_layers: int) -> None:
    model.model.layers = model.model.layers[:num_layers]
    model.config.num_hidden_layers = num_layers
