"""What a target decodes with: its own model and engine, the drafts beside it. Knows no deployment, and not Ray."""

import ssl
from typing import Literal, TypeVar

from pydantic import BaseModel, Field, model_validator

from specdecode.backends.backend import ModelConfig
from specdecode.config import StrictModel
from specdecode.decoding.drafters import DEFAULT_SUPPORT
from specdecode.decoding.engine import EngineConfig
from specdecode.errors import ConfigError

Part = TypeVar("Part", bound=BaseModel)


def part(kind: type[Part], config: BaseModel) -> Part:
    """Those values of a configuration that are also of `kind`, such as how a model is opened without where it runs."""
    return kind.model_validate({name: getattr(config, name) for name in kind.model_fields})


class TargetModel(ModelConfig):
    """The model whose output it is, and its engine."""

    engine: EngineConfig = Field(default_factory=EngineConfig)
    stream_interval_s: float = Field(
        default=0.05,
        ge=0,
        description="rounds of so long are sent on together, those of all streams at the same instants",
    )

    @model_validator(mode="after")
    def _check_rows(self) -> "TargetModel":
        if self.max_rows <= self.engine.max_batch:
            raise ValueError(f"max_rows: expected more than engine.max_batch ({self.engine.max_batch}), got {self.max_rows}")
        return self


class Lookup(StrictModel):
    """Copying what followed the last tokens before."""

    prompt_lookup_max: int = Field(
        default=4, gt=0, description="the longest run of last tokens that is looked for in the text before"
    )
    prompt_lookup_min: int = Field(default=2, gt=0, description="the shortest such run")

    @model_validator(mode="after")
    def _check_lookup(self) -> "Lookup":
        if self.prompt_lookup_min > self.prompt_lookup_max:
            limit, value = self.prompt_lookup_max, self.prompt_lookup_min
            raise ValueError(f"prompt_lookup_min: expected at most prompt_lookup_max ({limit}), got {value}")
        return self


class NgramConfig(Lookup):
    """A draft that copies what followed the last tokens before; it is part of the target's process."""

    method: Literal["ngram"]


class DrafterModel(ModelConfig, Lookup):
    """A model that guesses."""

    method: Literal["draft_model"] = "draft_model"
    placement: Literal["deployment", "local"] = Field(
        default="deployment", description="a deployment of its own, or local: in the target's process, on its device"
    )
    support: int = Field(default=DEFAULT_SUPPORT, gt=0, le=4096, description="how many tokens each q covers at the most")
    min_confidence: float = Field(
        default=0.0, ge=0, le=1, description="a draft ends where its model gives all of it less than this probability"
    )
    lookup_first: bool = Field(default=False, description="ask the model only where a lookup as of method ngram finds nothing")
    idle_share: float = Field(
        default=0.0,
        ge=0,
        le=0.5,
        description="how much of its time, of 1, it may read answers that others drafted, while it has nothing else to do: "
        "the learned router is told how it would have done",
    )
    run_ahead: bool = Field(
        default=False,
        description="draft on while the target verifies, as if it accepted everything; for a draft with a device of its own",
    )
    deadline_s: float = Field(default=2.0, gt=0, description="an answer that takes longer is not waited for")
    retry_after_s: float = Field(default=1.0, ge=0, description="how long nothing is asked after a failure")

    @property
    def is_deployed(self) -> bool:
        """Whether it has a deployment of its own."""
        return self.placement == "deployment"

    @model_validator(mode="after")
    def _check_tp(self) -> "DrafterModel":
        if self.tp > 1:
            raise ValueError(f"tp: expected 1 of a draft, got {self.tp}")
        return self

    @model_validator(mode="after")
    def _check_lookup_first(self) -> "DrafterModel":
        for name, field in Lookup.model_fields.items():
            if not self.lookup_first and getattr(self, name) != field.default:
                raise ValueError(f"{name}: of use only with lookup_first, or with method ngram")
        return self


class TlsConfig(StrictModel):
    """Certificates for the connections between targets and drafts, as PEM files that every node has."""

    certificate: str = Field(description="the draft's certificate, with those that sign it")
    key: str = Field(description="its private key")
    authority: str = Field(description="who must have signed it; the certificate itself if it is self-signed")

    def server_context(self) -> ssl.SSLContext:
        """What a draft shows; raises a `ConfigError` if the files cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certificate, self.key)
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(f"exchange.tls: {self.certificate} with {self.key} cannot be used: {error}") from error
        return context

    def client_context(self) -> ssl.SSLContext:
        """What a target insists on; the name in the certificate is not compared, as a draft may run on any node.

        Raises:
            ConfigError: the file cannot be used.
        """
        try:
            context = ssl.create_default_context(cafile=self.authority)
        except OSError as error:
            raise ConfigError(f"exchange.tls: authority: {self.authority} cannot be used: {error}") from error
        context.check_hostname = False
        return context
