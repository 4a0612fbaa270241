"""How a deployment is set up: the arguments of `serve.app:build`, as a Serve config file holds them."""

import inspect
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, ValidationError, field_validator, model_validator
from ray import serve
from ray.serve.config import AutoscalingConfig

from serve.canary import CanaryConfig
from serve.models import DrafterModel, NgramConfig, TargetModel, TlsConfig
from specdecode.config import StrictModel, describe_validation_error
from specdecode.decoding.sequence import VerifierName
from specdecode.errors import ConfigError
from specdecode.routing.router import RoutingConfig


class BackpressureConfig(StrictModel):
    """How a call is answered that finds the queue full."""

    status_code: Literal[429, 503] = 429
    retry_after_s: float | None = Field(default=1.0, ge=0)


class ActorOptions(StrictModel):
    """What one replica asks of its node."""

    num_cpus: float | None = Field(default=None, ge=0, description="CPUs; 1 if unset")
    num_gpus: float | None = Field(default=None, ge=0, description="whole GPUs, or a fraction of one")
    memory: float | None = Field(default=None, ge=0, description="bytes of memory to reserve")
    resources: dict[str, Annotated[float, Field(ge=0)]] | None = Field(default=None, description="custom resources")
    accelerator_type: str | None = Field(default=None, description="a kind of GPU, by Ray's name for it, such as L4")
    label_selector: dict[str, str] | None = Field(
        default=None, description="labels that the node must have, such as {size: small}; {size: '!small'}: must not"
    )
    fallback_strategy: list[dict[str, Any]] | None = Field(
        default=None, description="label selectors to try in turn where no node has the labels"
    )
    runtime_env: dict[str, Any] | None = Field(default=None, description="of the replica's process, such as env_vars")

    @field_validator("num_gpus")
    @classmethod
    def _check_gpus(cls, num_gpus: float | None) -> float | None:
        if num_gpus is not None and num_gpus > 1 and not num_gpus.is_integer():
            raise ValueError("expected a fraction of one GPU, or whole ones")
        return num_gpus


class DeploymentConfig(StrictModel):
    """Ray Serve's options for one deployment; what is unset keeps Serve's default."""

    num_replicas: int | Literal["auto"] | None = Field(default=None, description="how many replicas; auto for autoscaling")
    autoscaling_config: dict[str, Any] | None = Field(default=None, description="Serve's autoscaling options")
    ray_actor_options: ActorOptions | None = Field(default=None, description="what each replica asks of its node")
    placement_group_bundles: list[dict[str, Annotated[float, Field(ge=0)]]] | None = Field(
        default=None, description="resources that each replica reserves together; itself it runs in the first bundle"
    )
    placement_group_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] | None = Field(
        default=None, description="how the bundles lie on nodes; PACK if unset"
    )
    placement_group_bundle_label_selector: list[dict[str, str]] | None = Field(
        default=None, description="labels that the node of each bundle must have; one selector is for all bundles"
    )
    max_replicas_per_node: int | None = Field(default=None, ge=1, le=100, description="no limit if unset")
    max_ongoing_requests: int | None = Field(default=None, gt=0, description="calls that a replica takes on at a time")
    max_queued_requests: int | None = Field(default=None, ge=-1, description="calls that wait at each caller; -1 for no limit")
    backpressure_config: BackpressureConfig | None = Field(default=None, description="the answer to a call beyond that limit")
    health_check_period_s: float | None = Field(default=None, gt=0)
    health_check_timeout_s: float | None = Field(default=None, gt=0)
    graceful_shutdown_wait_loop_s: float | None = Field(default=None, ge=0)
    graceful_shutdown_timeout_s: float | None = Field(default=None, ge=0)
    rolling_update_percentage: float | None = Field(
        default=None, gt=0, le=1, description="the share of the replicas that an update replaces at a time"
    )
    max_surge_percent: int | None = Field(
        default=None, ge=0, le=100, description="how many more replicas there may be while an update runs; Ray 2.60"
    )

    def options(self) -> dict[str, Any]:
        """The options that are set, for `Deployment.options`."""
        return self.model_dump(exclude_none=True)

    @property
    def wants_device(self) -> bool:
        """Whether a replica asks for more than CPUs, and so for what may be free once only."""
        actor = self.ray_actor_options or ActorOptions()
        named = [actor.resources or {}, *(self.placement_group_bundles or [])]
        return bool(actor.num_gpus) or any(resources.keys() - {"CPU", "memory"} for resources in named)

    @field_validator("autoscaling_config")
    @classmethod
    def _check_autoscaling(cls, values: dict[str, Any] | None) -> dict[str, Any] | None:
        """Serve ignores an option that it does not know; a misspelt one must not be."""
        for name in values or {}:
            if name not in AutoscalingConfig.model_fields:
                raise ValueError(f"{name}: unknown key, expected one of {', '.join(AutoscalingConfig.model_fields)}")
        try:
            AutoscalingConfig.model_validate(values or {}, strict=True)
        except ValidationError as error:
            raise ValueError(describe_validation_error(error)) from error
        return values

    @model_validator(mode="after")
    def _check_together(self) -> "DeploymentConfig":
        """Serve says what does not go together; what an older Ray does not know is no matter here."""
        known = inspect.signature(serve.deployment).parameters
        try:
            serve.deployment(**{name: value for name, value in self.options().items() if name in known})(object)
        except (TypeError, ValueError) as error:
            raise ValueError(" ".join(str(error).split())) from error
        return self


class TargetConfig(TargetModel):
    """The model whose output it is, its engine, and the deployment that it runs in."""

    deployment: DeploymentConfig = Field(default_factory=DeploymentConfig)

    def options(self) -> dict[str, Any]:
        """Those of the deployment; a replica of several processes reserves what it asks for as often, on one node."""
        options = self.deployment.options()
        if self.tp == 1:
            return options
        actor = {"num_cpus": 1.0, "num_gpus": 1.0, **options.get("ray_actor_options", {})}
        named = {"CPU": actor["num_cpus"], "GPU": actor["num_gpus"], "memory": actor.get("memory", 0)}
        named |= actor.get("resources", {})
        if "accelerator_type" in actor:
            named[f"accelerator_type:{actor['accelerator_type']}"] = 0.001  # as Ray counts it
        bundle = {name: amount for name, amount in named.items() if amount > 0}
        group: dict[str, Any] = {"placement_group_bundles": [bundle] * self.tp, "placement_group_strategy": "STRICT_PACK"}
        if "label_selector" in actor:
            group["placement_group_bundle_label_selector"] = [actor["label_selector"]]
        return {**group, **options, "ray_actor_options": actor}

    @property
    def wants_device(self) -> bool:
        """Whether a replica asks for more than CPUs, and so for what may be free once only."""
        return DeploymentConfig.model_validate(self.options()).wants_device

    @model_validator(mode="after")
    def _check_bundles(self) -> "TargetConfig":
        if self.tp == 1:
            return self
        bundles, strategy = self.deployment.placement_group_bundles, self.deployment.placement_group_strategy
        if bundles is not None and len(bundles) < self.tp:
            raise ValueError(f"deployment.placement_group_bundles: expected one for each of tp {self.tp}, got {len(bundles)}")
        if strategy not in (None, "STRICT_PACK"):
            raise ValueError(f"deployment.placement_group_strategy: expected STRICT_PACK with tp {self.tp}, got {strategy}")
        return self


class DraftModelConfig(DrafterModel):
    """A model that guesses, and the deployment that it may run in."""

    deployment: DeploymentConfig = Field(default_factory=DeploymentConfig)


def _method(draft: Any) -> str | None:
    """The tag by which a draft's kind is told."""
    return draft.get("method", "draft_model") if isinstance(draft, dict) else getattr(draft, "method", None)


DraftConfig = Annotated[
    Annotated[NgramConfig, Tag("ngram")] | Annotated[DraftModelConfig, Tag("draft_model")],
    Discriminator(_method, custom_error_type="method", custom_error_message="expected a draft of method draft_model or ngram"),
]


class ExchangeConfig(StrictModel):
    """How targets and deployed drafts talk to each other."""

    ports: list[int] | None = Field(
        default=None, min_length=2, max_length=2, description="the first and the last port to listen on; any if unset"
    )
    max_sessions: int = Field(default=64, gt=0, description="how many targets a draft's replica takes on")
    max_frame_bytes: int = Field(default=16 << 20, ge=1 << 12, description="the longest message")
    tls: TlsConfig | None = Field(default=None, description="encrypts the connections; plain if unset")

    @property
    def port_range(self) -> range | None:
        """The ports to try."""
        return None if self.ports is None else range(self.ports[0], self.ports[1] + 1)

    @model_validator(mode="after")
    def _check_ports(self) -> "ExchangeConfig":
        if self.ports is not None and not 0 < self.ports[0] <= self.ports[1] < 1 << 16:
            raise ValueError(f"ports: expected two port numbers, the first not above the last, got {self.ports}")
        return self


class RecordsConfig(StrictModel):
    """Where records of served requests go; they are written on the routers' nodes."""

    folder: str = Field(min_length=1, description="each router appends to a file of its own there")
    keep_prompts: bool = Field(default=False, description="write down what was asked: only so can anything be learned from it")


class RouterConfig(StrictModel):
    """The HTTP side: its deployment, and what a request may ask for."""

    deployment: DeploymentConfig = Field(default_factory=DeploymentConfig)
    max_body_bytes: int = Field(default=4 << 20, gt=0, description="the largest request body")
    max_prompt_tokens: int | None = Field(default=None, gt=0, description="the longest prompt; the model's context if unset")
    max_choices: int = Field(default=32, gt=0, description="the most generations that one request may ask for")
    max_k: int = Field(default=16, ge=0, description="the most tokens that a request may have drafted in a round")
    max_stop: int = Field(default=16, ge=0, description="the most stop strings that a request may name")
    max_stop_length: int = Field(default=256, gt=0, description="the most characters of a stop string, or of a bad word")
    max_logit_bias: int = Field(default=300, ge=0, description="the most tokens whose logits a request may change")
    request_timeout_s: float | None = Field(default=None, gt=0, description="how long a request may take; no limit if unset")
    failover_timeout_s: float = Field(
        default=30.0, gt=0, description="how long a request waits for a replica of the target, at first and when it is lost"
    )
    max_resumptions: int = Field(
        default=3, ge=0, description="on how many further replicas an answer is taken up at the most when its own is lost"
    )
    records: RecordsConfig | None = Field(default=None, description="writes down what requests came to; nothing if unset")
    cors_origins: list[str] = Field(
        default_factory=list, description="web pages that a browser lets call, such as https://chat.example.org; * for all"
    )
    api_keys_env: str | None = Field(default=None, min_length=1, description="an environment variable that holds API keys")
    api_keys_file: str | None = Field(default=None, min_length=1, description="a file that holds API keys, one a line")
    demo: bool = Field(
        default=False, description="a page at /demo to try it on; takes the extra demo, and a router of one replica"
    )

    @model_validator(mode="after")
    def _check_demo(self) -> "RouterConfig":
        """What a page asks for must come to the replica that it came from."""
        deployment = self.deployment
        if self.demo and (deployment.num_replicas not in (None, 1) or deployment.autoscaling_config is not None):
            raise ValueError("demo: expected a router of one replica, without autoscaling")
        return self


class RouterSettings(StrictModel):
    """What may be changed of a running router, as the `user_config` of its deployment; what is unset is as in the arguments."""

    default_draft: str | None = None
    k: int | None = Field(default=None, ge=0)
    verifier: VerifierName | None = None

    def check(self, drafts: list[str], max_k: int, where: str) -> None:
        """Raises a `ConfigError` unless there is such a draft, and it may draft so much; `where` names their origin."""
        if self.default_draft is not None and self.default_draft not in drafts:
            raise ConfigError(f"{where}: default_draft: expected one of {sorted(drafts)}, got {self.default_draft!r}")
        if self.k is not None and self.k > max_k:
            raise ConfigError(f"{where}: k: expected at most router.max_k ({max_k}), got {self.k}")


class ServeConfig(StrictModel):
    """One target, its drafts, and the router before them."""

    target: TargetConfig
    drafts: dict[str, DraftConfig] = Field(default_factory=dict)
    default_draft: str | None = Field(
        default=None,
        description="who drafts unless a request says otherwise: a draft, or auto for the learned router; if unset that one if "
        "there is one, or else nobody",
    )
    k: int = Field(default=5, ge=0, description="how many tokens are drafted in a round unless a request says otherwise")
    verifier: VerifierName = Field(default="rejection", description="how drafts are accepted unless a request says otherwise")
    served_model_name: str | None = Field(default=None, description="the model's name over HTTP; target.model if unset")
    router: RouterConfig = Field(default_factory=RouterConfig)
    routing: RoutingConfig | None = Field(default=None, description="the learned router, which chooses a draft by the prompt")
    canaries: dict[str, CanaryConfig] = Field(
        default_factory=dict, description="by draft, another one that takes a share of its requests; not of those that name it"
    )
    exchange: ExchangeConfig = Field(default_factory=ExchangeConfig)

    @property
    def model_name(self) -> str:
        """The model's name over HTTP."""
        return self.served_model_name or self.target.model

    @property
    def choosable(self) -> list[str]:
        """Who may be the default."""
        return sorted(self.drafts) + (["auto"] if self.routing else [])

    @property
    def default_drafter(self) -> str | None:
        """Who drafts unless a request says otherwise."""
        return self.default_draft or ("auto" if self.routing else None)

    @property
    def draft_models(self) -> dict[str, DraftModelConfig]:
        """The drafts that are models."""
        return {name: draft for name, draft in self.drafts.items() if isinstance(draft, DraftModelConfig)}

    @model_validator(mode="after")
    def _check_drafts(self) -> "ServeConfig":
        if self.default_draft is not None and self.default_draft not in self.choosable:
            raise ValueError(f"default_draft: expected one of {self.choosable}, got {self.default_draft!r}")
        for name, canary in self.canaries.items():
            if missing := {name, canary.draft} - self.drafts.keys():
                raise ValueError(f"canaries: {name}: expected drafts of {sorted(self.drafts)}, got {min(missing)!r}")
        if self.model_name in self.drafts:
            raise ValueError(f"drafts: {self.model_name} is the target's name, and cannot be a draft's")
        for name, meaning in (("none", "turns drafting off"), ("auto", "leaves the choice to the learned router")):
            if name in self.drafts:
                raise ValueError(f"drafts: {name} is how a request {meaning}, and cannot be a draft's name")
        if self.k > self.router.max_k:
            raise ValueError(f"k: expected at most router.max_k ({self.router.max_k}), got {self.k}")
        return self
