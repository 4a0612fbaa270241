"""Ray: the cluster at RAY_ADDRESS, or one that is started on this machine. To be imported before all else that imports Ray."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

# A local Ray asks for a token, which it makes if there is none yet; since 2.59 that is its default too. Whoever reaches an open
# one can run any code as this user.
if "RAY_ADDRESS" not in os.environ:
    os.environ.setdefault("RAY_AUTH_MODE", "token")

import ray


def connect(*, quiet: bool = True, dashboard: bool = False) -> None:
    """Connects this process; `quiet` keeps what others print to themselves, a local Ray has its `dashboard` on 127.0.0.1."""
    level = logging.WARNING if quiet else logging.INFO
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=not quiet, logging_level=level)
        return
    ray.init(
        address="local",
        include_dashboard=dashboard,
        dashboard_host="127.0.0.1",
        log_to_driver=not quiet,
        logging_level=level,
    )


@contextmanager
def connected(*, quiet: bool = True, dashboard: bool = False) -> Iterator[None]:
    """Connects this process for as long as the context lasts, unless it is connected already."""
    is_ours = not ray.is_initialized()
    if is_ours:
        connect(quiet=quiet, dashboard=dashboard)
    try:
        yield
    finally:
        if is_ours:
            ray.shutdown()
