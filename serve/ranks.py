"""The further processes of a target that runs on several GPUs: an actor for each, in the replica's placement group."""

import asyncio
import logging
import os
from tempfile import TemporaryDirectory

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from serve.log import begin_log
from specdecode.backends.backend import ModelConfig, open_model
from specdecode.backends.huggingface import HuggingFaceBackend
from specdecode.backends.ranks import join
from specdecode.errors import ConfigError, ModelError

logger = logging.getLogger("ray.serve")


class Rank:
    """One more process of a model."""

    def follow(self, config: ModelConfig, rank: int, folder: str) -> None:
        """Has its part of the model, and makes every pass that the first process makes."""
        begin_log(config.model)
        join(rank, config.tp, folder)
        _open(config).follow()


class Ranks:
    """All processes of a model, of which this replica is the first.

    Args:
        config: the model; `tp` processes have it.

    Attributes:
        backend: the model.

    Raises:
        ConfigError: the replica has no placement group with a bundle for each.
    """

    def __init__(self, config: ModelConfig) -> None:
        group = ray.util.get_current_placement_group()
        num_bundles = 0 if group is None else group.bundle_count
        if group is None or num_bundles < config.tp:
            raise ConfigError(f"tp: expected a placement group with {config.tp} bundles, got {num_bundles}")
        self._folder = TemporaryDirectory(prefix="ranks-")  # where the processes find each other, for this user alone
        self._actors = [_actor(group, rank) for rank in range(1, config.tp)]  # they end when nobody holds them any more
        self._following = [
            actor.follow.remote(config, rank, self._folder.name) for rank, actor in enumerate(self._actors, start=1)
        ]
        join(0, config.tp, self._folder.name)
        self.backend = _open(config)

    async def watch(self) -> None:
        """Ends this process once one of the others has ended: it may wait for that in the midst of a pass, for ever."""
        following = [asyncio.wrap_future(reference.future()) for reference in self._following]
        ended, _ = await asyncio.wait(following, return_when=asyncio.FIRST_COMPLETED)
        _end(f"a further process of it has ended: {ended.pop().exception()!r}")

    def end_if_lost(self) -> None:
        """Ends this process if a pass has failed, after which there is no other."""
        try:
            self.backend.check()
        except ModelError as error:
            _end(str(error))


def _open(config: ModelConfig) -> HuggingFaceBackend:
    backend = open_model(config)
    assert isinstance(backend, HuggingFaceBackend)
    return backend


def _end(reason: str) -> None:
    """Ends this process. It is replaced then, and what it did is taken up elsewhere; an error would go to the clients."""
    logger.error("the model is lost, and this replica with it: %s", reason)
    os._exit(1)


def _actor(group: PlacementGroup, rank: int) -> "ray.actor.ActorHandle":
    """Starts a process that takes all of its bundle."""
    bundle = dict(group.bundle_specs[rank])
    asked = {"num_cpus": bundle.pop("CPU", 0), "num_gpus": bundle.pop("GPU", 0), "memory": bundle.pop("memory", None)}
    place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
    return ray.remote(Rank).options(**asked, resources=bundle, scheduling_strategy=place).remote()
