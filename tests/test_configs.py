"""Every file under configs/ loads as what it is for; those of configs/cluster are tested in test_cluster.py."""

from pathlib import Path

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
    "benchmark.yaml": BenchmarkConfig,
    "benchmark_profile.yaml": ProfileConfig,
    "distill_chat.yaml": DraftTrainingConfig,
    "distill_code.yaml": DraftTrainingConfig,
    "distill_reasoning.yaml": DraftTrainingConfig,
    "load.yaml": LoadConfig,
    "router_collect.yaml": CollectionConfig,
    "router_train.yaml": RouterTrainingConfig,
    "tiny/benchmark.yaml": BenchmarkConfig,
    "tiny/benchmark_profile.yaml": ProfileConfig,
    "tiny/compare_drafts.yaml": ComparisonConfig,
    "tiny/compare_losses.yaml": ComparisonConfig,
    "tiny/distill_chat.yaml": DraftTrainingConfig,
    "tiny/distill_code.yaml": DraftTrainingConfig,
    "tiny/distill_generic.yaml": DraftTrainingConfig,
    "tiny/distill_reasoning.yaml": DraftTrainingConfig,
    "tiny/drills.yaml": DrillsConfig,
    "tiny/load.yaml": LoadConfig,
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
SERVE_FILES = ("serve.yaml", "tiny/demo.yaml", "tiny/serve.yaml")
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
