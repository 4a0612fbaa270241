"""Every file under configs/ loads as what it is for; those of configs/cluster are tested in test_cluster.py."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from jobs.collect_router_data import CollectionConfig
from jobs.drills import DrillsConfig
from jobs.scaling import ScalingConfig
from jobs.soak import SoakConfig
from jobs.training_speed import TrainingSpeedConfig
from serve.config import ServeConfig
from specdecode.config import check_config, load_config
from specdecode.evaluation.load_plan import LoadConfig
from specdecode.evaluation.profile import ProfileConfig
from specdecode.evaluation.suite import BenchmarkConfig
from specdecode.routing.report import RouterReportConfig
from specdecode.routing.trainer import RouterTrainingConfig
from specdecode.training.comparison import ComparisonConfig
from specdecode.training.draft import DraftTrainingConfig
from specdecode.training.release import ReleaseConfig
from specdecode.training.target import TargetTrainingConfig
from specdecode.training.tokenizer import TokenizerConfig

ROOT = Path(__file__).parents[1]

MODELS: dict[str, type[BaseModel]] = {
    "base.yaml": BenchmarkConfig,
    "benchmark.yaml": BenchmarkConfig,
    "benchmark_profile.yaml": ProfileConfig,
    "distill_chat.yaml": DraftTrainingConfig,
    "distill_code.yaml": DraftTrainingConfig,
    "distill_reasoning.yaml": DraftTrainingConfig,
    "eval_full.yaml": BenchmarkConfig,
    "eval_quick.yaml": BenchmarkConfig,
    "eval_routed.yaml": BenchmarkConfig,
    "load.yaml": LoadConfig,
    "router_collect.yaml": CollectionConfig,
    "router_train.yaml": RouterTrainingConfig,
    "tiny/base.yaml": BenchmarkConfig,
    "tiny/benchmark.yaml": BenchmarkConfig,
    "tiny/benchmark_profile.yaml": ProfileConfig,
    "tiny/compare_drafts.yaml": ComparisonConfig,
    "tiny/compare_losses.yaml": ComparisonConfig,
    "tiny/compare_steps.yaml": ComparisonConfig,
    "tiny/distill_chat.yaml": DraftTrainingConfig,
    "tiny/distill_code.yaml": DraftTrainingConfig,
    "tiny/distill_generic.yaml": DraftTrainingConfig,
    "tiny/distill_reasoning.yaml": DraftTrainingConfig,
    "tiny/distill_chat_deeper.yaml": DraftTrainingConfig,
    "tiny/distill_chat_further.yaml": DraftTrainingConfig,
    "tiny/distill_reasoning_further.yaml": DraftTrainingConfig,
    "tiny/drills.yaml": DrillsConfig,
    "tiny/eval_full.yaml": BenchmarkConfig,
    "tiny/eval_quick.yaml": BenchmarkConfig,
    "tiny/eval_routed.yaml": BenchmarkConfig,
    "tiny/load.yaml": LoadConfig,
    "tiny/load_vllm.yaml": LoadConfig,
    "tiny/pretrain_target.yaml": TargetTrainingConfig,
    "tiny/profile_synthetic.yaml": ProfileConfig,
    "tiny/release.yaml": ReleaseConfig,
    "tiny/router_collect.yaml": CollectionConfig,
    "tiny/router_mixed.yaml": CollectionConfig,
    "tiny/router_report.yaml": RouterReportConfig,
    "tiny/router_test.yaml": CollectionConfig,
    "tiny/router_train.yaml": RouterTrainingConfig,
    "tiny/scaling.yaml": ScalingConfig,
    "tiny/soak.yaml": SoakConfig,
    "tiny/spec_bench.yaml": BenchmarkConfig,
    "tiny/tokenizer.yaml": TokenizerConfig,
    "tiny/train_chat.yaml": DraftTrainingConfig,
    "tiny/train_code.yaml": DraftTrainingConfig,
    "tiny/train_reasoning.yaml": DraftTrainingConfig,
    "tiny/training_speed.yaml": TrainingSpeedConfig,
    "tiny/verifiers.yaml": BenchmarkConfig,
    "train_chat.yaml": DraftTrainingConfig,
    "train_code.yaml": DraftTrainingConfig,
    "train_reasoning.yaml": DraftTrainingConfig,
}
SERVE_FILES = ("serve.yaml", "tiny/demo.yaml", "tiny/serve.yaml", "tiny/serve_pair.yaml", "tiny/serve_pair_bfloat16.yaml")
CLUSTER_FILES = ("cluster/on_premises.yaml", "cluster/rayservice.yaml")


def test_every_file_is_known() -> None:
    files = {str(file.relative_to(ROOT / "configs")) for file in (ROOT / "configs").rglob("*.yaml")}
    assert files == {*MODELS, *SERVE_FILES, *CLUSTER_FILES}


@pytest.mark.parametrize("name", MODELS)
def test_a_job_file_loads(name: str) -> None:
    load_config(ROOT / "configs" / name, MODELS[name])


@pytest.mark.parametrize("name", SERVE_FILES)
def test_a_serve_file_holds_the_arguments_of_build(name: str) -> None:
    [application] = yaml.safe_load((ROOT / "configs" / name).read_text())["applications"]
    assert application["import_path"] == "serve.app:build"
    check_config(application["args"], ServeConfig, where=name)


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """All values by their keys, such as quality.judge; a list is a value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


@pytest.mark.parametrize("name", ["base.yaml", "tiny/base.yaml"])
def test_the_base_file_has_every_parameter_at_its_default(name: str) -> None:
    written = yaml.safe_load((ROOT / "configs" / name).read_text())
    whole = load_config(ROOT / "configs" / name, BenchmarkConfig).model_dump(mode="json")
    assert leaves(written).keys() == leaves(whole).keys()
    assert written["datasets"][0].keys() == whole["datasets"][0].keys()
    needed = {"target": {"model": "m"}, "datasets": [{"name": "builtin"}], "output_dir": "d", "experiments": ["baseline"]}
    defaults = leaves(check_config(needed, BenchmarkConfig, where="test").model_dump(mode="json"))
    chosen = ("target.model", "generic_draft", "draft_models", "routing", "datasets", "output_dir", "experiments")
    small = ("max_new_tokens",) if name.startswith("tiny") else ()
    for key, value in leaves(written).items():
        assert key.startswith((*chosen, *small)) or value == defaults[key], key
    experiments = BenchmarkConfig.model_fields["experiments"].default
    assert written["experiments"] == experiments


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model is BenchmarkConfig and "/" not in name])
def test_a_file_for_real_models_has_a_tiny_twin(name: str) -> None:
    file, twin = (load_config(ROOT / "configs" / place / name, BenchmarkConfig) for place in ("", "tiny"))
    assert file.experiments == twin.experiments
    assert (file.quality, file.temperatures) == (twin.quality, twin.temperatures)
    assert file.output_dir != twin.output_dir
