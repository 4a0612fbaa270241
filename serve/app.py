"""All the wiring: a configuration in, a Ray Serve application out.

`serve run`, `serve deploy` and `specdecode serve` all take the same file, whose `import_path` is `serve.app:build`.
"""

from ray import serve
from ray.serve import Application

from serve.channel import ModelTokens
from serve.config import ServeConfig
from serve.draft import DraftServer
from serve.reader import Defaults
from serve.router import Router
from serve.target import TargetServer
from specdecode.backends.loading import read_config
from specdecode.decoding.sequence import Route
from specdecode.text import Tokenizer
from specdecode.vocabulary import translate

# Calls beside the requests themselves, health checks and descriptions, that a replica must always have room for.
_HEADROOM = 16


def build(config: ServeConfig) -> Application:
    """Wires a router to a target, and the target to its drafts, each a deployment of its own.

    Raises:
        ModelError: a model has no tokenizer, or the tokenizers of a draft and the target have too little in common.
    """
    check_vocabularies(config)
    drafts = {name: draft for name, draft in config.draft_models.items() if draft.is_deployed}
    handles = {
        name: serve.deployment(DraftServer)
        .options(**{"name": f"Draft-{name}", "max_ongoing_requests": 64, **draft.deployment.options()})
        .bind(draft)
        for name, draft in drafts.items()
    }
    engine = config.target.engine
    target = (
        serve.deployment(TargetServer)
        .options(
            **{
                "name": "Target",
                "max_ongoing_requests": engine.max_batch + engine.max_queued + _HEADROOM,
                **config.target.deployment.options(),
            }
        )
        .bind(config.target, config.drafts, handles)
    )
    return (
        serve.deployment(serve.ingress()(Router))
        .options(**{"name": "Router", "max_ongoing_requests": 256, **config.router.deployment.options()})
        .bind(
            config.model_name,
            config.target.model,
            list(config.drafts),
            Defaults(Route(config.default_draft, config.k) if config.default_draft else Route(), config.verifier),
            config.router,
            target,
        )
    )


def check_vocabularies(config: ServeConfig) -> None:
    """Raises a `ModelError` unless every draft can be translated into the target's tokens; loads no weights."""
    target = _tokens(config.target.model)
    for draft in config.draft_models.values():
        translate(_tokens(draft.model), target)


def _tokens(model: str) -> ModelTokens:
    return ModelTokens(model, Tokenizer(model).vocabulary_id, read_config(model).get_text_config().vocab_size)
