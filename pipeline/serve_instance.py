"""Ray Serve on a cluster that others may use, too: there is one, and whoever started it decides where it listens."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.serve.config import HTTPOptions

_CONTROLLER = {"name": "SERVE_CONTROLLER_ACTOR", "namespace": "serve"}


def runs() -> bool:
    """Whether somebody has started Serve on this cluster."""
    import ray

    return _CONTROLLER in ray.util.list_named_actors(all_namespaces=True)


def listening() -> HTTPOptions | None:
    """Where the Serve that runs takes requests, with host and port; None where it takes none over HTTP."""
    import ray
    from ray.serve.config import ProxyLocation

    controller = ray.get_actor(**_CONTROLLER)
    options, location = ray.get([controller.get_http_config.remote(), controller.get_proxy_location.remote()])
    return None if location == ProxyLocation.Disabled or options.host is None else options


def end(applications: Collection[str], started: bool) -> None:
    """Takes applications away, and Serve itself where it was started with them and nobody else has come to use it."""
    from ray import serve

    others = serve.status().applications.keys() - set(applications)
    if started and not others:
        serve.shutdown()
        return
    for name in applications:
        serve.delete(name)
    if started:
        logging.getLogger(__name__).warning("Serve stays: it runs %s, too", ", ".join(sorted(others)))
