"""A file that starts a cluster in, checked by Ray's own code, all that it says out."""

from serve.local import Deployment, check_deployment  # isort: skip  # before all else that imports Ray

import contextlib
import io
import json
from typing import Any

import jsonschema
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from specdecode.errors import ConfigError


def check_cluster(values: dict[str, Any], where: str) -> dict[str, Any]:
    """What a file for `ray up` says, Ray's defaults included.

    Raises:
        ConfigError: Ray would refuse it.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Ray has some words of its own for people
            prepared: dict[str, Any] = json.loads(json.dumps(prepare_config(values), default=str))
            validate_config(prepared)
    except jsonschema.ValidationError as error:
        raise ConfigError(f"{where}: {'.'.join(map(str, error.absolute_path)) or 'top level'}: {error.message}") from error
    except (KeyError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error
    return prepared


def check_service(values: dict[str, Any], where: str) -> Deployment:
    """The application of a `RayService`; Kubernetes itself checks the rest.

    Raises:
        ConfigError: it holds none, or there is something wrong with it.
    """
    text = values.get("spec", {}).get("serveConfigV2")
    application = yaml.safe_load(text) if isinstance(text, str) else None
    if not isinstance(application, dict):
        raise ConfigError(f"{where}: spec.serveConfigV2: expected a Serve config file, as text")
    return check_deployment(application, f"{where}: spec.serveConfigV2")
