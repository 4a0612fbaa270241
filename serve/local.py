"""Deploys a Serve config file from this process, on a local Ray or on the cluster at RAY_ADDRESS."""

from serve.cluster import connect  # isort: skip  # before all else that imports Ray

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from pydantic import BaseModel, ValidationError
from ray import serve
from ray.serve.schema import DeploymentSchema, ServeApplicationSchema, ServeDeploySchema

from serve.app import check_page, check_vocabularies, deployment_names, wire
from serve.config import DeploymentConfig, RouterSettings, ServeConfig
from serve.keys import ApiKeys
from specdecode.config import check_config, describe_validation_error, read_yaml
from specdecode.errors import ConfigError

IMPORT_PATH = "serve.app:build"


@dataclass(frozen=True)
class Deployment:
    """What a Serve config file says.

    Attributes:
        name: of the application.
        route_prefix: of its routes.
        config: the arguments of `serve.app:build`.
        host, port: where the HTTP proxy listens.
        proxy_location: on which nodes it does.
        overrides: options of deployments, by name, that take the place of those in the arguments.
    """

    name: str
    route_prefix: str
    config: ServeConfig
    host: str
    port: int
    proxy_location: str
    overrides: dict[str, dict[str, Any]]

    @property
    def url(self) -> str:
        """The endpoint's address, as an OpenAI client's base URL without /v1."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{host}:{self.port}{self.route_prefix.rstrip('/')}"


def load_deployment(path: str | Path, port: int | None = None) -> Deployment:
    """Reads a Serve config file that holds one application of ours; `port` overrides its HTTP port.

    Raises:
        ConfigError: it is no such file; the message is one line.
        ModelError: a draft does not fit the target.
    """
    deployment = check_deployment(read_yaml(path), path, port)
    check_vocabularies(deployment.config)
    check_page(deployment.config)
    return deployment


def check_deployment(values: dict[str, Any], path: str | Path, port: int | None = None) -> Deployment:
    """The same for what was read from `path`, without a look at the models."""
    try:
        schema = ServeDeploySchema.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe_validation_error(error)}") from error
    _check_keys(values, ServeDeploySchema, path)
    if len(schema.applications) != 1 or schema.applications[0].import_path != IMPORT_PATH:
        raise ConfigError(f"{path}: applications: expected exactly one, with import_path {IMPORT_PATH}")
    application = schema.applications[0]
    _check_keys(values["applications"][0], ServeApplicationSchema, path)
    config = check_config(dict(application.args), ServeConfig, where=f"{path}: applications.0.args")
    overrides = _overrides(application, values["applications"][0].get("deployments", []), config, path)
    return Deployment(
        name=application.name,
        route_prefix=application.route_prefix or "/",
        config=config,
        host=schema.http_options.host,
        port=schema.http_options.port if port is None else port,
        proxy_location=schema.proxy_location.value,
        overrides=overrides,
    )


def _overrides(
    application: ServeApplicationSchema, values: list[dict[str, Any]], config: ServeConfig, path: str | Path
) -> dict[str, dict[str, Any]]:
    """What the application's `deployments` change, checked as far as that can be done before they are there."""
    overrides: dict[str, dict[str, Any]] = {}
    for number, (deployment, given) in enumerate(zip(application.deployments, values, strict=True)):
        where = f"{path}: applications.0.deployments.{number}"
        _check_keys(given, DeploymentSchema, where)
        names = deployment_names(config)
        if deployment.name not in names:
            raise ConfigError(f"{where}.name: expected one of {', '.join(names)}, got {deployment.name!r}")
        ours = {key: value for key, value in given.items() if key in DeploymentConfig.model_fields}
        check_config(ours, DeploymentConfig, where)
        options = deployment.model_dump(exclude_unset=True, exclude={"name"})
        if options.get("user_config") is not None:
            _check_user_config(deployment.name, options["user_config"], config, f"{where}.user_config")
        overrides[deployment.name] = options
    return overrides


def _check_user_config(name: str, values: dict[str, Any], config: ServeConfig, where: str) -> None:
    if name != "Router":
        raise ConfigError(f"{where}: only Router takes one, not {name}")
    check_config(values, RouterSettings, where).check(list(config.drafts), config.router.max_k, where)


def _check_keys(values: dict[str, Any], schema: type[BaseModel], path: str | Path) -> None:
    """Serve's own schemas ignore a key that they do not know; a misspelt one must not be."""
    for key in values:
        if key not in schema.model_fields:
            raise ConfigError(f"{path}: {key}: unknown key, expected one of {', '.join(schema.model_fields)}")


@contextmanager
def deployed(deployment: Deployment, *, quiet: bool = False) -> Iterator[str]:
    """Deploys, waits until it answers, and yields where the dashboard is; takes everything down again at the end.

    Ray is started on this machine unless RAY_ADDRESS names a cluster or this process is connected to one already.
    """
    app = wire(deployment.config, deployment.overrides)
    if "RAY_ADDRESS" not in os.environ:
        ApiKeys.load(deployment.config.router, os.environ)  # the router does so itself, but less clearly
    with started(deployment, quiet=quiet):
        serve.run(app, name=deployment.name, route_prefix=deployment.route_prefix)
        yield f"{dashboard_url()}{_token_hint()}"


@contextmanager
def started(deployment: Deployment, *, quiet: bool = False) -> Iterator[None]:
    """Ray and Serve, as `deployed` needs them; takes down whatever was deployed by that name at the end."""
    is_ours = not ray.is_initialized()
    if is_ours:
        _connect(deployment, quiet)
    try:
        serve.start(proxy_location=deployment.proxy_location, http_options={"host": deployment.host, "port": deployment.port})
        yield
    finally:
        serve.delete(deployment.name)  # lets running requests end
        if is_ours:
            ray.shutdown()


def dashboard_url() -> str:
    """The Ray dashboard's address; empty if there is none."""
    url = ray.get_runtime_context().gcs_address and ray._private.worker.get_dashboard_url()
    return f"http://{url}" if url else ""


def _token_hint() -> str:
    """How to get the token that the dashboard asks for, if it does."""
    return "  (its token: ray get-auth-token)" if os.environ.get("RAY_AUTH_MODE") == "token" else ""


def wait_for_signal() -> None:
    """Returns when the process is asked to end, by Ctrl-C or SIGTERM."""
    asked = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())
    asked.wait()


def _connect(deployment: Deployment, quiet: bool) -> None:
    if "RAY_ADDRESS" not in os.environ:
        _check_port(deployment)
        # Ray gives way to all else on a machine; the replicas are what it is for, and decode a tenth faster when they do not.
        os.environ.setdefault("RAY_worker_niceness", "0")
    connect(quiet=quiet, dashboard=True)


def _check_port(deployment: Deployment) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((deployment.host, deployment.port))
        except OSError as error:
            raise ConfigError(
                f"http_options.port: expected a free port on {deployment.host}, got {deployment.port}: {error.strerror}"
            ) from error
