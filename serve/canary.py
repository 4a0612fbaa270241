"""A share of a draft's requests goes to another draft, to see how it does: which ones is a function of their ids."""

from collections.abc import Mapping
from dataclasses import replace

from pydantic import Field

from specdecode.chance import chance
from specdecode.config import StrictModel
from specdecode.decoding.sequence import Route


class CanaryConfig(StrictModel):
    """Who takes a share of a draft's requests."""

    draft: str = Field(description="the other draft")
    share: float = Field(gt=0, le=1, description="of the requests, of 1")

    def takes(self, request_id: str) -> bool:
        """Whether it takes a request."""
        return chance(request_id) < self.share


def with_canaries(route: Route, canaries: Mapping[str, CanaryConfig], request_id: str) -> Route:
    """The route, with other drafts in the place of those whose share this request falls into."""
    names = {name: canary.draft for name, canary in canaries.items() if canary.takes(request_id)}
    drafter = None if route.drafter is None else names.get(route.drafter, route.drafter)
    arms = tuple(replace(arm, drafter=names.get(arm.drafter, arm.drafter)) for arm in route.arms)
    return replace(route, drafter=drafter, arms=arms)
