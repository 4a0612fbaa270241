"""All the wiring: a configuration in, a Ray Serve application out.

`serve run`, `serve deploy` and `specdecode serve` all take the same file, whose `import_path` is `serve.app:build`.
"""

import importlib.util
import inspect
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from serve.config import ServeConfig
from serve.decoder import PLAIN
from serve.draft import DraftServer
from serve.reader import Defaults
from serve.router import Router
from serve.served import DraftModel
from serve.target import TargetServer
from specdecode.backends.loading import read_config
from specdecode.decoding.sequence import Route
from specdecode.errors import ConfigError
from specdecode.exchange.messages import ModelTokens
from specdecode.routing.model import AcceptanceModel
from specdecode.text import Tokenizer
from specdecode.vocabulary import translate

# Calls beside the requests themselves, health checks and descriptions, that a replica must always have room for.
_HEADROOM = 16
# A router holds its clients' connections, which nobody can take over: those that it has are answered to the end. What a target
# has not ended by then is resumed on another.
_ROUTER_DRAIN_S, _TARGET_DRAIN_S = 600.0, 60.0
# Requests that wait at Serve's proxy for a place at a router; the next one is refused there.
_MAX_QUEUED = 256


def build(config: ServeConfig) -> Application:
    """Wires a router to a target, and the target to its drafts, each a deployment of its own.

    Raises:
        ConfigError: a deployment has an option that this version of Ray does not know, or options that do not go together; or
            a page is to be served, and Gradio is not installed.
        ModelError: a model has no tokenizer, the tokenizers of a draft and the target have too little in common, or the learned
            router is one for other drafts.
    """
    return wire(config, {})


def wire(
    config: ServeConfig, overrides: dict[str, dict[str, Any]], draft_server: type[DraftServer] = DraftServer
) -> Application:
    """The same with some deployments' options changed, by name, as `serve deploy` does itself, or with other draft servers."""
    check_vocabularies(config)
    check_page(config)
    if config.routing is not None:
        AcceptanceModel.load(config.routing.checkpoint, list(config.drafts))
    drafts = {name: draft for name, draft in config.draft_models.items() if draft.is_deployed}
    handles = {
        name: _deployment(
            draft_server, {"name": f"Draft-{name}", **_draft_options(config), **draft.deployment.options()}, overrides
        ).bind(name, draft, config.exchange)
        for name, draft in drafts.items()
    }
    target = _deployment(
        TargetServer, {"name": "Target", **_target_options(config), **config.target.options()}, overrides
    ).bind(config.target, config.drafts, handles, config.exchange)
    return _deployment(
        serve.ingress()(Router),
        {"name": "Router", **_router_options(config), **config.router.deployment.options()},
        overrides,
    ).bind(
        config.model_name,
        config.target.model,
        list(config.drafts),
        Defaults(Route(config.default_drafter, config.k), config.verifier),
        config.router,
        target,
        config.routing,
        config.canaries,
        [name for name, draft in config.draft_models.items() if draft.idle_share],
        {name: DraftModel(draft.model, handles.get(name)) for name, draft in config.draft_models.items()},
    )


def deployment_names(config: ServeConfig) -> list[str]:
    """What the deployments are called."""
    return ["Router", "Target", *(f"Draft-{name}" for name, draft in config.draft_models.items() if draft.is_deployed)]


def _deployment(cls: Any, options: dict[str, Any], overrides: dict[str, dict[str, Any]]) -> Any:
    options = {**options, **overrides.get(options["name"], {})}
    if unknown := options.keys() - inspect.signature(serve.deployment).parameters:
        raise ConfigError(f"deployment {options['name']}: {min(unknown)}: Ray {ray.__version__} has no such option")
    try:
        return serve.deployment(**options)(cls)
    except (TypeError, ValueError) as error:  # Serve says which options do not go together
        raise ConfigError(f"deployment {options['name']}: {' '.join(str(error).split())}") from error


def _num_places(config: ServeConfig) -> int:
    """How many generations a replica of the target takes on at a time; it refuses the next one itself."""
    return config.target.engine.max_batch + config.target.engine.max_queued


def _router_options(config: ServeConfig) -> dict[str, Any]:
    """A router has room for all that the targets take on: who comes then is refused by a target, in OpenAI's words."""
    num_replicas = config.target.deployment.num_replicas
    num_targets = num_replicas if isinstance(num_replicas, int) else 1
    return {
        "max_ongoing_requests": num_targets * _num_places(config) + _HEADROOM,
        "max_queued_requests": _MAX_QUEUED,
        "backpressure_config": {"status_code": 429, "retry_after_s": 1.0},
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": _ROUTER_DRAIN_S,
        **_surge(100),
    }


def _target_options(config: ServeConfig) -> dict[str, Any]:
    """A target that asks for no device of its own can be started beside the one that it replaces."""
    return {
        "max_ongoing_requests": _num_places(config) + _HEADROOM,
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": _TARGET_DRAIN_S,
        **_surge(0 if config.target.wants_device else 100),
    }


def _surge(percent: int) -> dict[str, int]:
    """By how many replicas an update may exceed their number, where Ray can do that (2.60)."""
    is_known = "max_surge_percent" in inspect.signature(serve.deployment).parameters
    return {"max_surge_percent": percent} if is_known else {}


def _draft_options(config: ServeConfig) -> dict[str, Any]:
    """Every target holds one call open as long as it works with the draft, which may be cut off at any time."""
    num_calls = config.exchange.max_sessions + PLAIN.max_batch + PLAIN.max_queued
    return {"max_ongoing_requests": num_calls + _HEADROOM, "graceful_shutdown_timeout_s": 2.0}


def check_vocabularies(config: ServeConfig) -> None:
    """Raises a `ModelError` unless every draft can be translated into the target's tokens; loads no weights."""
    target = _tokens(config.target.model)
    for draft in config.draft_models.values():
        translate(_tokens(draft.model), target)


def check_page(config: ServeConfig) -> None:
    """Raises a `ConfigError` if a page is to be served without what it is made with."""
    if config.router.demo and importlib.util.find_spec("gradio") is None:
        raise ConfigError("router.demo: the page takes Gradio: pip install 'specdecode[demo]'")


def _tokens(model: str) -> ModelTokens:
    return ModelTokens(model, Tokenizer(model).vocabulary_id, read_config(model).get_text_config().vocab_size)
