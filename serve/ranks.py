"""The further processes of a target that runs on several GPUs: an actor for each, in the replica's placement group."""

import asyncio
import logging
from tempfile import TemporaryDirectory

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from serve.log import begin_log
from serve.process import end_replica
from specdecode.backends.backend import CachingBackend, ModelConfig, open_model
from specdecode.backends.ranks import join
from specdecode.errors import ConfigError

logger = logging.getLogger("ray.serve")


class Rank:
    """One more process of a model."""

    def follow(self, config: ModelConfig, rank: int, folder: str) -> None:
        """Has its part of the model, and makes every pass that the first process makes."""
        begin_log(config.model)
        join(rank, config.tp, folder)
        model = open_model(config)
        assert isinstance(model, CachingBackend)
        model.follow()


class Ranks:
    """The further processes of a model; the first is to join them.

    Args:
        config: the model; `tp` processes have it.

    Attributes:
        folder: where all processes find each other.

    Raises:
        ConfigError: the replica has no placement group with a bundle for each.
    """

    def __init__(self, config: ModelConfig) -> None:
        group = ray.util.get_current_placement_group()
        num_bundles = 0 if group is None else group.bundle_count
        if group is None or num_bundles < config.tp:
            raise ConfigError(f"tp: expected a placement group with {config.tp} bundles, got {num_bundles}")
        self._folder = TemporaryDirectory(prefix="ranks-")  # for this user alone
        self.folder = self._folder.name
        self._actors = [_actor(group, rank) for rank in range(1, config.tp)]  # they end when nobody holds them any more
        self._following = [actor.follow.remote(config, rank, self.folder) for rank, actor in enumerate(self._actors, start=1)]

    async def watch(self) -> None:
        """Ends this process once one of the others has ended: it may wait for that in the midst of a pass, for ever."""
        following = [asyncio.wrap_future(reference.future()) for reference in self._following]
        ended, _ = await asyncio.wait(following, return_when=asyncio.FIRST_COMPLETED)
        end_replica(f"a further process of it has ended: {ended.pop().exception()!r}")


def _actor(group: PlacementGroup, rank: int) -> "ray.actor.ActorHandle":
    """Starts a process that takes all of its bundle."""
    bundle = dict(group.bundle_specs[rank])
    asked = {"num_cpus": bundle.pop("CPU", 0), "num_gpus": bundle.pop("GPU", 0), "memory": bundle.pop("memory", None)}
    place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
    return ray.remote(Rank).options(**asked, resources=bundle, scheduling_strategy=place).remote()
