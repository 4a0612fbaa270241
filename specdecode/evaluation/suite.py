"""A configuration in, what is compared and the questions out: the experiments of the benchmark.

    data sets --> parts of a few questions each --> Runner --> records of a part, whole or not there
                                                      |
        for each group of questions, all cells in turns: a drift of the machine meets all alike

A cell is an experiment with one draft, K, temperature, verifier and batch size.
"""

from collections.abc import Sequence as Several
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from specdecode.backends.backend import ModelConfig
from specdecode.config import StrictModel
from specdecode.decoding.sequence import VerifierName
from specdecode.evaluation.datasets import Dataset, DatasetConfig, Item
from specdecode.evaluation.peers import PEERS
from specdecode.evaluation.sandbox import SandboxConfig
from specdecode.routing.router import RoutingConfig
from specdecode.training.reporting import WandbConfig

ExperimentName = Literal[
    "baseline",
    "generic_draft",
    "specialized_drafts",
    "adaptive_routing",
    "ablation_K",
    "hf_plain",
    "hf_assisted",
    "prompt_lookup",
]
EXPERIMENTS: tuple[ExperimentName, ...] = get_args(ExperimentName)
BASELINE, NONE, GENERIC, OWN, AUTO = "baseline", "none", "generic", "own", "auto"


class QualityConfig(StrictModel):
    """What is said of the answers themselves."""

    judge: bool = Field(default=True, description="whether an answer is right, for data sets that tell")
    perplexity: bool = Field(default=False, description="of each answer under the target; takes a pass for each")
    sandbox: SandboxConfig = Field(default_factory=SandboxConfig, description="where generated programs are run")


class BenchmarkConfig(StrictModel):
    """What is compared, on what, and where it goes."""

    target: ModelConfig
    generic_draft: str | None = Field(default=None, description="the draft for everything")
    draft_models: dict[str, str] = Field(default={}, description="the drafts that are at home in a domain, by its name")
    routing: RoutingConfig | None = Field(default=None, description="the router of adaptive_routing")
    datasets: list[DatasetConfig] = Field(min_length=1)
    experiments: list[ExperimentName] = Field(
        default=["baseline", "generic_draft", "specialized_drafts", "adaptive_routing", "ablation_K"], min_length=1
    )
    K: int = Field(default=5, gt=0, description="tokens drafted in a round")
    ablation_K: list[int] = Field(default=[3, 5, 7], min_length=1, description="what ablation_K compares")  # noqa: N815
    draft_length: Literal["fixed", "adaptive"] = Field(
        default="fixed", description="always K, or at the most K as many as pay; adaptive_routing always chooses"
    )
    temperatures: list[float] = Field(default=[0.0], min_length=1)
    verifiers: list[VerifierName] = Field(default=["rejection"], min_length=1, description="compared where answers are sampled")
    batches: list[int] = Field(default=[1], min_length=1, description="how many questions are answered together")
    max_new_tokens: int = Field(default=128, gt=0)
    num_repeats: int = Field(default=1, gt=0, description="answers to each question, in turns")
    quality: QualityConfig = Field(default_factory=QualityConfig)
    seed: int = 0
    num_threads: int | None = Field(default=None, gt=0, description="CPU threads of each process; torch's choice if unset")
    output_dir: str = Field(description="records, report and charts")
    report: bool = Field(default=True, description="whether charts are drawn and report.html is written; needs matplotlib")
    logging: WandbConfig = Field(default_factory=WandbConfig)
    part: int = Field(default=8, gt=0, description="questions of a part, which is kept whole or not at all")
    num_actors: int = Field(default=1, gt=0, description="processes of jobs.benchmark that each hold all models")
    num_cpus: float = Field(default=1.0, ge=0, description="of each of them")
    num_gpus: float = Field(default=0.0, ge=0, description="of each of them")

    @model_validator(mode="after")
    def _check(self) -> "BenchmarkConfig":
        wanted = set(self.experiments)
        if len(self.experiments) > 1 and BASELINE not in wanted:
            raise ValueError("experiments: expected baseline among them, which the others are compared with")
        if wanted & {"generic_draft", "hf_assisted"} and self.generic_draft is None:
            raise ValueError(f"generic_draft: expected a model, for {min(wanted & {'generic_draft', 'hf_assisted'})}")
        if wanted & {"specialized_drafts", "ablation_K"} and not self.draft_models:
            raise ValueError(f"draft_models: expected drafts, for {min(wanted & {'specialized_drafts', 'ablation_K'})}")
        if "adaptive_routing" in wanted and self.routing is None:
            raise ValueError("routing: expected a router's checkpoint, for adaptive_routing")
        if wanted & set(PEERS) and 1 not in self.batches:
            raise ValueError(f"batches: expected 1 among them, for {min(wanted & set(PEERS))}")
        if self.part % max(self.batches):
            raise ValueError(f"part: expected a multiple of the largest batch, {max(self.batches)}, got {self.part}")
        if reserved := set(self.draft_models) & {NONE, GENERIC, OWN, AUTO}:
            raise ValueError(f"draft_models: expected names of domains, got {min(reserved)}")
        return self

    @property
    def drafts(self) -> dict[str, str]:
        """All models that draft, by their names in records."""
        generic = {} if self.generic_draft is None else {GENERIC: self.generic_draft}
        return {**self.draft_models, **generic}


@dataclass(frozen=True)
class Cell:
    """One way to decode."""

    experiment: ExperimentName
    draft: str
    K: int
    temperature: float
    verifier: VerifierName
    batch: int


def cells(config: BenchmarkConfig) -> list[Cell]:
    """All that is compared, the baseline first."""
    ways: dict[ExperimentName, list[tuple[str, int]]] = {
        "baseline": [(NONE, 0)],
        "generic_draft": [(GENERIC, config.K)],
        "specialized_drafts": [(name, config.K) for name in config.draft_models],
        "adaptive_routing": [(AUTO, config.K)],
        "ablation_K": [(OWN, k) for k in config.ablation_K],
        "hf_plain": [(NONE, 0)],
        "hf_assisted": [(GENERIC, config.K)],
        "prompt_lookup": [(NONE, config.K)],
    }
    return [
        Cell(experiment, draft, k, temperature, verifier, batch)
        for batch in config.batches
        for temperature in config.temperatures
        for experiment in sorted(set(config.experiments), key=EXPERIMENTS.index)
        if experiment not in PEERS or batch == 1
        for draft, k in ways[experiment]
        for verifier in (config.verifiers if temperature > 0 and drafts_itself(experiment) else config.verifiers[:1])
    ]


def drafts_itself(experiment: ExperimentName) -> bool:
    """Whether it is ours, and has drafts."""
    return experiment not in (BASELINE, *PEERS)


def load_items(config: BenchmarkConfig) -> list[tuple[str, Item]]:
    """All questions with their data sets' names, in an order in which each part has some of every data set.

    Raises:
        ConfigError: a data set is not there.
    """
    datasets = [Dataset(dataset) for dataset in config.datasets]
    placed = [((place + 0.5) / len(dataset), dataset.name, item) for dataset in datasets for place, item in enumerate(dataset)]
    placed.sort(key=lambda one: one[0])
    return [(name, item) for _, name, item in placed]


def as_rows(items: Several[tuple[str, Item]], size: int) -> list[dict[str, Any]]:
    """Questions in parts of `size`, as they travel."""
    return [
        {"number": number, "items": [(name, asdict(item)) for name, item in items[start : start + size]]}
        for number, start in enumerate(range(0, len(items), size))
    ]
