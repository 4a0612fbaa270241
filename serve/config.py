"""How a deployment is set up: the arguments of `serve.app:build`, as a Serve config file holds them."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from specdecode.backends.backend import ModelConfig
from specdecode.config import StrictModel
from specdecode.decoding.drafters import DEFAULT_SUPPORT
from specdecode.decoding.engine import EngineConfig
from specdecode.decoding.sequence import VerifierName


class DeploymentConfig(StrictModel):
    """Ray Serve's options for one deployment; what is unset keeps Serve's default."""

    num_replicas: int | Literal["auto"] | None = Field(default=None, description="how many replicas; auto for autoscaling")
    autoscaling_config: dict[str, Any] | None = Field(default=None, description="Serve's autoscaling options")
    ray_actor_options: dict[str, Any] | None = Field(default=None, description="num_cpus, num_gpus, resources, ...")
    max_ongoing_requests: int | None = Field(default=None, gt=0, description="calls that a replica takes on at a time")
    health_check_period_s: float | None = Field(default=None, gt=0)
    health_check_timeout_s: float | None = Field(default=None, gt=0)
    graceful_shutdown_wait_loop_s: float | None = Field(default=None, ge=0)
    graceful_shutdown_timeout_s: float | None = Field(default=None, ge=0)

    def options(self) -> dict[str, Any]:
        """The options that are set, for `Deployment.options`."""
        return self.model_dump(exclude_none=True)


class DeployedModel(ModelConfig):
    """A model, and the deployment that it runs in."""

    deployment: DeploymentConfig = Field(default_factory=DeploymentConfig)

    def model_config_only(self) -> ModelConfig:
        """How the model is opened, without where it runs."""
        return ModelConfig.model_validate({name: getattr(self, name) for name in ModelConfig.model_fields})


class TargetConfig(DeployedModel):
    """The model whose output it is, and its engine."""

    engine: EngineConfig = Field(default_factory=EngineConfig)

    @model_validator(mode="after")
    def _check_rows(self) -> "TargetConfig":
        if self.max_rows <= self.engine.max_batch:
            raise ValueError(f"max_rows: expected more than engine.max_batch ({self.engine.max_batch}), got {self.max_rows}")
        return self


class _Lookup(StrictModel):
    prompt_lookup_max: int = Field(
        default=4, gt=0, description="the longest run of last tokens that is looked for in the text before"
    )
    prompt_lookup_min: int = Field(default=2, gt=0, description="the shortest such run")

    @model_validator(mode="after")
    def _check_lookup(self) -> "_Lookup":
        if self.prompt_lookup_min > self.prompt_lookup_max:
            limit, value = self.prompt_lookup_max, self.prompt_lookup_min
            raise ValueError(f"prompt_lookup_min: expected at most prompt_lookup_max ({limit}), got {value}")
        return self


class NgramConfig(_Lookup):
    """A draft that copies what followed the last tokens before; it is part of the target's process."""

    method: Literal["ngram"]


class DraftModelConfig(DeployedModel, _Lookup):
    """A model that guesses."""

    method: Literal["draft_model"] = "draft_model"
    placement: Literal["deployment", "local"] = Field(
        default="deployment", description="a deployment of its own, or local: in the target's process, on its device"
    )
    support: int = Field(default=DEFAULT_SUPPORT, gt=0, description="how many tokens each q covers at the most")
    min_confidence: float = Field(
        default=0.0, ge=0, le=1, description="a draft ends where its model gives all of it less than this probability"
    )
    lookup_first: bool = Field(default=False, description="ask the model only where a lookup as of method ngram finds nothing")
    deadline_s: float = Field(default=2.0, gt=0, description="an answer that takes longer is not waited for")
    retry_after_s: float = Field(default=1.0, ge=0, description="how long nothing is asked after a failure")

    @property
    def is_deployed(self) -> bool:
        """Whether it has a deployment of its own."""
        return self.placement == "deployment"

    @model_validator(mode="after")
    def _check_lookup_first(self) -> "DraftModelConfig":
        for name, field in _Lookup.model_fields.items():
            if not self.lookup_first and getattr(self, name) != field.default:
                raise ValueError(f"{name}: of use only with lookup_first, or with method ngram")
        return self


def _method(draft: Any) -> str | None:
    """The tag by which a draft's kind is told."""
    return draft.get("method", "draft_model") if isinstance(draft, dict) else getattr(draft, "method", None)


DraftConfig = Annotated[
    Annotated[NgramConfig, Tag("ngram")] | Annotated[DraftModelConfig, Tag("draft_model")],
    Discriminator(_method, custom_error_type="method", custom_error_message="expected a draft of method draft_model or ngram"),
]


class RouterConfig(StrictModel):
    """The HTTP side: its deployment, and what a request may ask for."""

    deployment: DeploymentConfig = Field(default_factory=DeploymentConfig)
    max_body_bytes: int = Field(default=4 << 20, gt=0, description="the largest request body")
    max_choices: int = Field(default=32, gt=0, description="the most generations that one request may ask for")
    max_k: int = Field(default=16, ge=0, description="the most tokens that a request may have drafted in a round")
    max_stop: int = Field(default=16, ge=0, description="the most stop strings that a request may name")
    max_logit_bias: int = Field(default=300, ge=0, description="the most tokens whose logits a request may change")


class ServeConfig(StrictModel):
    """One target, its drafts, and the router before them."""

    target: TargetConfig
    drafts: dict[str, DraftConfig] = Field(default_factory=dict)
    default_draft: str | None = Field(default=None, description="who drafts unless a request says otherwise; nobody if unset")
    k: int = Field(default=5, ge=0, description="how many tokens are drafted in a round unless a request says otherwise")
    verifier: VerifierName = Field(default="rejection", description="how drafts are accepted unless a request says otherwise")
    served_model_name: str | None = Field(default=None, description="the model's name over HTTP; target.model if unset")
    router: RouterConfig = Field(default_factory=RouterConfig)

    @property
    def model_name(self) -> str:
        """The model's name over HTTP."""
        return self.served_model_name or self.target.model

    @property
    def draft_models(self) -> dict[str, DraftModelConfig]:
        """The drafts that are models."""
        return {name: draft for name, draft in self.drafts.items() if isinstance(draft, DraftModelConfig)}

    @model_validator(mode="after")
    def _check_drafts(self) -> "ServeConfig":
        if self.default_draft is not None and self.default_draft not in self.drafts:
            raise ValueError(f"default_draft: expected one of {sorted(self.drafts)}, got {self.default_draft!r}")
        if "none" in self.drafts:
            raise ValueError("drafts: none is how a request turns drafting off, and cannot be a draft's name")
        if self.k > self.router.max_k:
            raise ValueError(f"k: expected at most router.max_k ({self.router.max_k}), got {self.k}")
        return self
