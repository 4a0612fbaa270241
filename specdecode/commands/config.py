"""`specdecode config`: any configuration file in; whether it is right, all that it says, and the memory it takes out."""

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from specdecode.commands.options import Commands, add_command, add_json, add_set
from specdecode.commands.tables import print_json
from specdecode.config import check_config, read_yaml, with_overrides
from specdecode.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from specdecode.backends.backend import ModelConfig
    from specdecode.backends.memory import MemoryEstimate

# Each kind by who reads it: a command of this program, or a job.
_MODELS = {
    "benchmark": "specdecode.evaluation.suite:BenchmarkConfig",
    "profile": "specdecode.evaluation.profile:ProfileConfig",
    "load": "specdecode.evaluation.load_plan:LoadConfig",
    "generate": "specdecode.commands.generate:GenerateConfig",
    "overhead": "specdecode.evaluation.overhead:OverheadConfig",
    "exchange": "serve.ladder:LadderConfig",
    "remote": "specdecode.evaluation.remote:RemoteConfig",
    "http": "serve.http_speed:HttpSpeedConfig",
    "routing": "serve.routing_speed:RoutingSpeedConfig",
    "train_draft": "specdecode.training.draft:DraftTrainingConfig",
    "train_target": "specdecode.training.target:TargetTrainingConfig",
    "train_tokenizer": "specdecode.training.tokenizer:TokenizerConfig",
    "generate_data": "specdecode.training.completions:CompletionJobConfig",
    "compare_drafts": "specdecode.training.comparison:ComparisonConfig",
    "release": "specdecode.training.release:ReleaseConfig",
    "collect_router_data": "jobs.collect_router_data:CollectionConfig",
    "train_router": "specdecode.routing.trainer:RouterTrainingConfig",
    "report_router": "specdecode.routing.report:RouterReportConfig",
    "improve": "jobs.improve:ImproveConfig",
    "training_speed": "jobs.training_speed:TrainingSpeedConfig",
    "scaling": "jobs.scaling:ScalingConfig",
    "drills": "jobs.drills:DrillsConfig",
    "soak": "jobs.soak:SoakConfig",
}
_SERVE, _CLUSTER, _RAY_SERVICE = "serve", "cluster", "rayservice"
KINDS = (_SERVE, _CLUSTER, _RAY_SERVICE, *_MODELS)
# Keys whose values name models, where they are not sections of their own.
_NAMING = ("target", "draft", "generic_draft", "draft_models", "drafts", "model", "draft_model", "target_model")


def add_config(commands: Commands) -> None:
    config = add_command(
        commands,
        "config",
        _config,
        "check any configuration file, and print it whole with the memory that its models take",
        "specdecode config configs/tiny/serve.yaml",
    )
    config.add_argument("file", help="any file of configs/, or one like it")
    config.add_argument(
        "--kind", choices=KINDS, metavar="KIND", help=f"what it is for, if that is not clear: {', '.join(KINDS)}"
    )
    add_set(config, "K=3; not for a Serve or a cluster file")
    add_json(config)


def read_file(file: str) -> dict[str, Any]:
    """What a file says; of several documents, as Kubernetes takes them, the `RayService`.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return read_yaml(file)
    except ConfigError:
        services = _ray_services(file)
        if not services:
            raise
        return services[0]


def find_kind(values: dict[str, Any], file: str) -> str:
    """The kind whose keys the file has: the fewest that are unknown, or missing; of several such, the one that it is right for.

    Raises:
        ConfigError: several are as likely.
    """
    if "applications" in values:
        return _SERVE
    if "cluster_name" in values:
        return _CLUSTER
    if values.get("kind") == "RayService":
        return _RAY_SERVICE
    misfits = {kind: _num_misfits(values, _model(kind)) for kind in _MODELS}
    likely = [kind for kind, number in misfits.items() if number == min(misfits.values())]
    right = [kind for kind in likely if len(likely) == 1 or _is_right(values, kind)]
    if len(right) != 1:
        raise ConfigError(f"{file}: expected --kind, as it may be one of {', '.join(right or likely)}")
    return right[0]


def check_file(file: str, kind: str, overrides: list[str]) -> dict[str, Any]:
    """All that the file says, defaults included.

    Raises:
        ConfigError: something is wrong with it.
    """
    values = read_file(file)
    if kind in (_SERVE, _CLUSTER, _RAY_SERVICE) and overrides:
        raise ConfigError(f"--set {overrides[0]}: not for a file of kind {kind}")
    if kind == _CLUSTER:
        from serve.cluster_files import check_cluster

        return check_cluster(values, file)
    if kind in (_SERVE, _RAY_SERVICE):
        from serve.cluster_files import check_service
        from serve.local import check_deployment

        return (check_deployment if kind == _SERVE else check_service)(values, file).config.model_dump(mode="json")
    return check_config(with_overrides(values, overrides), _model(kind), where=file).model_dump(mode="json")


def models_of(kind: str, values: dict[str, Any]) -> Iterator[tuple[str, "ModelConfig"]]:
    """The models that a checked file opens for decoding, by where it says so; those of a training or an endpoint are not."""
    from specdecode.backends.backend import ModelConfig

    if kind in ("train_draft", "train_target", "improve", "load"):
        return
    target = values.get("target")
    like: dict[str, Any] = target if isinstance(target, dict) else {}
    for place, value in _named(values):
        fields = value if isinstance(value, dict) else {**like, "tp": 1, "model": value}
        yield place, ModelConfig.model_validate({name: fields[name] for name in ModelConfig.model_fields if name in fields})


def _config(parsed: argparse.Namespace) -> None:
    import yaml

    kind = parsed.kind or find_kind(with_overrides(read_file(parsed.file), parsed.set), parsed.file)
    values = check_file(parsed.file, kind, parsed.set)
    if kind in (_SERVE, _RAY_SERVICE):
        _compare_vocabularies(values)
    memory: dict[str, Any] = {place: _estimate(model) for place, model in models_of(kind, values)}
    if kind == "train_draft":
        memory = {"draft": _training_memory(values["model"]["draft_model"])}
    if parsed.json:
        print_json({"kind": kind, "config": values, "memory": memory})
        return
    print(f"# {Path(parsed.file).name}: {_reader(kind)}")
    print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), end="")
    for place, found in memory.items():
        print(f"# {place}: {found if isinstance(found, str) else found.describe()}")


def _ray_services(file: str) -> list[dict[str, Any]]:
    import yaml

    try:
        documents = list(yaml.safe_load_all(Path(file).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return []
    return [document for document in documents if isinstance(document, dict) and document.get("kind") == "RayService"]


def _compare_vocabularies(values: dict[str, Any]) -> None:
    """Refuses a draft that does not fit its target, if the tokenizers of both are to be had here."""
    from serve.app import check_vocabularies
    from serve.config import ServeConfig
    from specdecode.text import Tokenizer

    config = check_config(values, ServeConfig, where="config")
    try:
        for _, model in models_of(_SERVE, values):
            Tokenizer(model.model)
    except ModelError:
        return  # which the memory's line tells
    check_vocabularies(config)


def _estimate(model: "ModelConfig") -> "MemoryEstimate | str":
    """What the model takes, or why that is not known here: the file may be right, and the model on another machine."""
    from specdecode.backends.memory import estimate_memory

    try:
        return estimate_memory(model)
    except ModelError as error:
        return f"memory not known here: {error}"


def _training_memory(name: str) -> str:
    """What a draft takes on each worker while it learns, activations and the target aside."""
    from specdecode.backends.facts import read_facts
    from specdecode.backends.memory import readable_bytes

    try:
        size = readable_bytes(16 * read_facts(name).num_parameters)
    except ModelError as error:
        return f"memory not known here: {error}"
    return f"weights, gradients and AdamW's two moments in float32, of all its layers = {size}, beside activations"


def _reader(kind: str) -> str:
    if kind in (_CLUSTER, _RAY_SERVICE):
        return "for ray up" if kind == _CLUSTER else "for kubectl apply; its application is"
    is_command = kind == _SERVE or _MODELS[kind].startswith(("serve.", "specdecode.commands.", "specdecode.evaluation."))
    return f"for {'specdecode ' if is_command else 'python -m jobs.'}{kind} --config"


def _model(kind: str) -> type[BaseModel]:
    import serve.cluster  # noqa: F401  before all else that imports Ray

    module, _, name = _MODELS[kind].partition(":")
    model: type[BaseModel] = getattr(importlib.import_module(module), name)
    return model


def _num_misfits(values: dict[str, Any], model: type[BaseModel]) -> int:
    required = {name for name, field in model.model_fields.items() if field.is_required()}
    return len(values.keys() - model.model_fields.keys()) + len(required - values.keys())


def _is_right(values: dict[str, Any], kind: str) -> bool:
    try:
        check_config(values, _model(kind), where=kind)
    except ConfigError:
        return False
    return True


def _named(values: dict[str, Any], inside: str = "") -> Iterator[tuple[str, Any]]:
    """Sections that describe a model, and keys that name one, with their places, the first place of each only."""
    for key, value in values.items():
        place = f"{inside}{key}"
        if (isinstance(value, dict) and "model" in value) or (key in _NAMING and isinstance(value, str)):
            yield place, value
        elif key in ("draft_models", "drafts") and isinstance(value, dict):
            for name, model in value.items():
                if isinstance(model, str) or "model" in model:
                    yield f"{place}.{name}", model
        elif isinstance(value, dict):
            yield from _named(value, f"{place}.")
