"""A replica's log: what the library has to say, and where the replica runs."""

import logging
import os

import ray

logger = logging.getLogger("ray.serve")


def begin_log(model: str) -> None:
    """Has the library's lines written to Serve's log too, and logs the node and the GPUs of this replica of a model.

    Outside of Ray there is no such log.
    """
    if not ray.is_initialized():
        return
    library = logging.getLogger("specdecode")
    library.setLevel(logging.INFO)
    for handler in set(logger.handlers) - set(library.handlers):
        library.addHandler(handler)
    node_id, address = ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    logger.info("model=%s placed node=%s address=%s gpus=%s", model, node_id, address, gpus)
