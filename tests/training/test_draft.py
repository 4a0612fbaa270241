"""A draft learns from blocks: closer to its target, as well on two accumulated halves, and on from where it was stopped."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    TrainerCallback,
    TrainerState,
)

from specdecode.backends.backend import create_backend
from specdecode.config import check_config
from specdecode.errors import ConfigError, ModelError
from specdecode.training import trainer
from specdecode.training.checkpoints import load_model
from specdecode.training.data import TRAINING, VALIDATION, validation_blocks, write_blocks
from specdecode.training.draft import PROMPTS, DraftModelConfig, DraftTrainingConfig, check_models, learn, load_draft
from specdecode.training.examples import Example
from specdecode.training.losses import LossConfig
from specdecode.training.packing import Block
from specdecode.training.teacher_cache import Annotator, check_teacher, note_teacher
from specdecode.training.trainer import DraftTrainer, Pace
from tests.conftest import SaveModel


def config_of(values: dict[str, Any], **changes: Any) -> DraftTrainingConfig:
    """The configuration after changes such as training__seed=1."""
    values = json.loads(json.dumps(values))
    for name, value in changes.items():
        *sections, last = name.split("__")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return check_config(values, DraftTrainingConfig, where="test")


class Losses(TrainerCallback):
    """Notes the loss of each step."""

    def __init__(self) -> None:
        self.values: dict[int, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:  # noqa: ARG002
        if logs and "loss" in logs:
            self.values[state.global_step] = logs["loss"]


def losses(config: DraftTrainingConfig, blocks: Path) -> list[float]:
    noted = Losses()
    learn(config, blocks, callbacks=[noted])
    return [noted.values[step] for step in sorted(noted.values)]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"])
def test_distillation_brings_the_draft_closer_to_its_target(values: dict[str, Any], blocks: Path, divergence: str) -> None:
    values["distillation"]["loss"] = {"divergence": divergence}
    before = learn(config_of(values, training__num_train_steps=1, training__output_dir=f"{blocks}-1"), blocks).validation
    after = learn(config_of(values, training__num_train_steps=60, training__validate_every=20), blocks).validation
    assert after["loss"] < before["loss"]
    assert after["acceptance"] > before["acceptance"]
    assert after["accepted_length"] > before["accepted_length"]


def test_fine_tuning_lowers_the_texts_surprise_and_needs_no_target(values: dict[str, Any], blocks: Path) -> None:
    values["distillation"] = {}
    result = learn(config_of(values, model__target_model=None, training__num_train_steps=40), blocks)
    assert result.validation["loss"] < 4.5  # the logarithm of 285 tokens is 5.7
    assert set(result.validation) == {"loss"}  # there is nothing to compare it with


def test_fine_tuning_beside_a_target_says_what_it_would_accept(values: dict[str, Any], blocks: Path) -> None:
    values["distillation"] = {}
    assert learn(config_of(values), blocks).validation.keys() == {"loss", "acceptance", "accepted_length", "agreement"}


def test_what_validation_says_is_what_decoding_does(values: dict[str, Any], blocks: Path) -> None:
    """A draft that is its own target is always right."""
    result = learn(config_of(values, model__num_layers=None, training__learning_rate=1e-12), blocks)
    assert result.validation["acceptance"] == pytest.approx(1, abs=1e-4)
    assert result.validation["agreement"] == pytest.approx(1)
    assert result.validation["accepted_length"] > 4


@pytest.mark.parametrize("family", [LlamaConfig, Qwen2Config])  # without and with biases
def test_new_layers_change_nothing_until_they_are_trained(family: type[PreTrainedConfig], save_model: SaveModel) -> None:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2} | heads
    folder = save_model(family(**shape), 0)
    config = DraftModelConfig(draft_model=folder, num_layers=1, new_layers=2)
    start, grown = load_draft(config.model_copy(update={"new_layers": 0})), load_draft(config)
    assert grown.config.num_hidden_layers == 3
    tokens = torch.arange(40)[None]
    torch.testing.assert_close(grown(tokens).logits, start(tokens).logits)
    torch.testing.assert_close(  # each with keys and values of its own
        grown(tokens[:, 30:], past_key_values=grown(tokens[:, :30]).past_key_values).logits, start(tokens).logits[:, 30:]
    )
    grown(tokens, labels=tokens).loss.backward()
    for layer in grown.model.layers[1:]:
        assert layer.self_attn.o_proj.weight.grad.any()
        assert layer.mlp.down_proj.weight.grad.any()


def test_new_layers_need_layers_as_llamas(save_model: SaveModel) -> None:
    folder = save_model(GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=2), 0)
    for check in (check_models, load_draft):  # the first of them before there is any work
        with pytest.raises(ModelError, match=r"model.new_layers: expected layers .* which GPT2LMHeadModel does not have"):
            check(DraftModelConfig(draft_model=folder, target_model=None, new_layers=1))


def test_a_draft_is_trained_and_written_with_its_new_layers(values: dict[str, Any], blocks: Path) -> None:
    config = config_of(values, model__new_layers=1, training__num_train_steps=3)
    learn(config, blocks)
    best = load_model(str(Path(config.training.output_dir) / "best"))
    assert best.config.num_hidden_layers == 2
    assert best.model.layers[1].mlp.down_proj.weight.any()


def test_a_group_has_its_own_figures_though_a_batch_holds_several(
    values: dict[str, Any], examples: list[Example], blocks: Path
) -> None:
    found = validation_blocks({"": examples[:20]}, 8, 32, 0, 0)[""]
    groups = {"a": found[:3], "b": found[3:8]}  # of 4 in a batch

    def validate(shown: dict[str, list[Block]]) -> dict[str, float]:
        folder = blocks / "-".join(shown)
        write_blocks(folder / VALIDATION, shown.items())
        (folder / TRAINING).symlink_to(blocks / TRAINING)
        config = config_of(
            values, training__learning_rate=1e-12, training__num_train_steps=1, training__output_dir=str(folder / "draft")
        )
        return learn(config, folder).validation

    together = validate(groups)
    for name, shown in groups.items():
        for figure, value in validate({name: shown}).items():
            assert together[f"{name}_{figure}"] == pytest.approx(value, rel=1e-5)


def test_what_is_looked_at_aside_does_not_count(values: dict[str, Any], examples: list[Example], blocks: Path) -> None:
    found = validation_blocks({"": examples[:20]}, 8, 32, 0, 0)[""]
    write_blocks(blocks / VALIDATION, {"own": found[:4], "chat": found[4:]}.items())
    values["also_validate"] = {"chat": values["data"]}
    figures = learn(config_of(values, training__num_train_steps=1), blocks).validation
    assert figures["loss"] == pytest.approx(figures["own_loss"]) != pytest.approx(figures["chat_loss"])
    assert figures["acceptance"] == pytest.approx(figures["own_acceptance"])


def test_figures_go_to_tensorboard_where_that_is_asked_for(values: dict[str, Any], blocks: Path) -> None:
    config = config_of(values, logging__use_tensorboard=True)
    learn(config, blocks)
    [events] = Path(config.training.output_dir).rglob("events.out.tfevents.*")
    written = events.read_bytes()
    for name in (b"train/loss", b"eval/acceptance", b"eval/accepted_length", b"train/tokens_per_second"):
        assert name in written
    quiet = config_of(values, training__output_dir=f"{blocks}-2")
    learn(quiet, blocks)
    assert not list(Path(quiet.training.output_dir).rglob("events.*"))


def test_the_pace_is_counted_from_where_a_run_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 12.0, 13.0])
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: next(now))
    pace = Pace()
    pace.on_train_begin(None, TrainerState(global_step=1000), None)
    assert pace.measure(1004) == 2
    assert pace.measure(1005) == 1


def test_fine_tuning_asks_its_target_only_in_validation(
    values: dict[str, Any], blocks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["distillation"] = {}
    heard: list[bool] = []
    listen = DraftTrainer._listen
    monkeypatch.setattr(DraftTrainer, "_listen", lambda self, inputs: heard.append(self.model.training) or listen(self, inputs))
    learn(config_of(values), blocks)
    assert heard
    assert not any(heard)


def test_the_best_checkpoint_loads_at_once(values: dict[str, Any], blocks: Path) -> None:
    config = config_of(values)
    result = learn(config, blocks)
    best = Path(config.training.output_dir) / "best"
    model = AutoModelForCausalLM.from_pretrained(best, dtype=torch.float32)
    assert model.config.num_hidden_layers == 1
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert create_backend(str(best)).vocab_size == model.config.vocab_size
    assert result.best_step in (4, 8, 12)


def test_the_best_and_not_the_last_is_kept(values: dict[str, Any], blocks: Path) -> None:
    """A rate that is far too high makes it worse and worse."""
    config = config_of(values, training__learning_rate=3.0, training__max_gradient_norm=100.0, training__num_warmup_steps=8)
    result = learn(config, blocks)
    assert result.best_step < 12


def test_two_runs_of_one_config_are_equal_and_another_seed_is_not(values: dict[str, Any], blocks: Path) -> None:
    first = losses(config_of(values), blocks)
    assert losses(config_of(values, training__output_dir=f"{blocks}-2"), blocks) == first
    assert losses(config_of(values, training__output_dir=f"{blocks}-3", training__seed=5), blocks) != first


def test_accumulated_halves_are_as_good_as_the_whole(values: dict[str, Any], blocks: Path) -> None:
    whole = losses(config_of(values), blocks)
    halves = losses(
        config_of(
            values,
            training__output_dir=f"{blocks}-2",
            training__per_device_batch_size=2,
            training__gradient_accumulation_steps=2,
            training__gradient_checkpointing=True,
        ),
        blocks,
    )
    np.testing.assert_allclose(halves, whole, rtol=1e-4)


def test_a_run_goes_on_as_if_it_had_not_been_stopped(values: dict[str, Any], blocks: Path) -> None:
    whole = losses(config_of(values), blocks)

    class Stop(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> Any:  # noqa: ARG002
            control.should_training_stop = True
            return control

    config = config_of(values, training__output_dir=f"{blocks}-2")
    learn(config, blocks, callbacks=[Stop()])
    checkpoint = Path(config.training.output_dir) / "trainer" / "checkpoint-4"
    noted = Losses()
    result = learn(config, blocks, checkpoint, [noted])
    np.testing.assert_allclose([noted.values[step] for step in range(5, 13)], whole[4:], rtol=1e-5)
    assert result.num_steps == 12


def annotated(blocks: Path, config: DraftTrainingConfig, vocab_size: int) -> Path:
    """The blocks with what the target says of them, as `jobs.cache_teacher` writes them."""
    folder = blocks.with_name("cache")
    folder.mkdir()
    annotator = Annotator(config.model.target_model or "", config.loss.model_dump(), vocab_size, "cpu")
    for name in (TRAINING, VALIDATION):
        pq.write_table(annotator(pq.read_table(blocks / name)), folder / name)
    return folder


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"])
def test_a_cached_teacher_teaches_what_the_live_one_does(values: dict[str, Any], blocks: Path, divergence: str) -> None:
    values["distillation"]["loss"] = {"divergence": divergence, "top_k": 20, "temperature": 1.5, "greedy_weight": 0.3}
    config = config_of(values)
    live = losses(config, blocks)
    cache = annotated(blocks, config, 285)
    cached = config_of(values, training__output_dir=f"{blocks}-2", distillation__teacher_cache=str(cache))
    np.testing.assert_allclose(losses(cached, cache), live, rtol=1e-4)


def test_a_cache_that_is_made_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no cache"):
        check_teacher(tmp_path, {"target": "a"})
    note_teacher(tmp_path, {"target": "a", "top_k": 4})
    check_teacher(tmp_path, {"target": "a", "top_k": 4})
    with pytest.raises(ConfigError, match="another top_k"):
        check_teacher(tmp_path, {"target": "a", "top_k": 8})


def test_the_student_learns_from_its_own_words(values: dict[str, Any], blocks: Path) -> None:
    pq.write_table(pa.table({"prompt": [[5, 6, 7], [8, 9], [10, 11, 12, 13]]}), blocks / PROMPTS)
    values["distillation"] |= {"student_share": 1.0, "target_share": 0.0}
    own = losses(config_of(values), blocks)
    values["distillation"]["student_share"] = 0.0
    other = losses(config_of(values, training__output_dir=f"{blocks}-2"), blocks)
    assert own != other
    assert all(np.isfinite(own))
    values["distillation"]["student_share"] = 1.0
    assert losses(config_of(values, training__output_dir=f"{blocks}-3"), blocks) == own


def test_another_vocabulary_is_refused(values: dict[str, Any], blocks: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in Path(values["model"]["target_model"]).iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tokenizer_json = other / "tokenizer.json"
    tokenizer_json.write_text(tokenizer_json.read_text().replace("<|system|>", "<|tool|>"))

    with pytest.raises(ModelError, match="another vocabulary"):
        learn(config_of(values, model__target_model=str(other)), blocks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__target_model": None}, "model.target_model: expected a model to distil from"),
        ({"data__sources": {}}, "data: expected either dataset_name or sources"),
        ({"data__sources": {"gsm8k": -1.0}}, "expected weights above 0"),
        ({"data__domain": "poetry"}, "data.domain: input should be 'code', 'chat', 'reasoning' or 'generic'"),
        ({"training__num_train_steps": "many"}, "training.num_train_steps: input should be a valid integer"),
        ({"training__num_train_steps": 0}, "training.num_train_steps: input should be greater than 0"),
        ({"training__per_device_batch_size": 0}, "training.per_device_batch_size: input should be greater than 0"),
        ({"training__sequence_length": 0}, "training.sequence_length: input should be greater than 1"),
        ({"training__epochs": 3}, "training.epochs: unknown key"),
        ({"distillation__student_share": 0.5, "training__parallelism": "fsdp"}, "student_share: expected 0"),
        ({"distillation__loss": {"divergence_weight": 0.0}}, "weight"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(values: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        config_of(values, **changes)


def test_the_defaults_are_those_of_the_documentation() -> None:
    config = check_config(
        {
            "data": {"domain": "code", "dataset_name": "transformersbook/codeparrot"},
            "training": {"output_dir": "checkpoints/draft-code/"},
        },
        DraftTrainingConfig,
        where="test",
    )
    assert (config.model.draft_model, config.model.target_model) == ("Qwen/Qwen2.5-1.5B", "Qwen/Qwen2.5-7B")
    assert (config.training.num_train_steps, config.training.per_device_batch_size) == (50_000, 4)
    assert (config.distillation.enabled, config.logging.use_wandb) == (False, False)
    assert config.loss == LossConfig(divergence_weight=0.0, cross_entropy_weight=1.0)
