"""The service as an application of Ray Serve: `pipeline.service.app:build` in infra/configs/serve.yaml."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from infra import config as configs
from pipeline.service.config import ServiceConfig

if TYPE_CHECKING:
    from ray.serve import Application


def build(args: dict[str, Any]) -> Application:
    """The application of a configuration: the fields of `ServiceConfig`. Raises ConfigError."""
    return application(configs.load(ServiceConfig, overrides=args))


def application(config: ServiceConfig) -> Application:
    from ray import serve

    from pipeline.service.engine import SpeechEngine
    from pipeline.service.ingress import Ingress

    gpus = config.gpu_share if _on_gpu(config.device) else 0
    engine = serve.deployment(
        SpeechEngine,
        name="SpeechEngine",
        num_replicas=config.engines,
        # More than it holds: it is the engine that refuses, at once and with a reason.
        max_ongoing_requests=2 * config.most_requests + 16,
        max_queued_requests=config.most_requests,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=config.timeout_s,
        ray_actor_options={"num_cpus": config.threads, "num_gpus": gpus},
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="SpeechIngress",
        max_ongoing_requests=4 * config.most_requests * config.engines + 64,
        ray_actor_options={"num_cpus": 0.1},
    )
    return ingress.bind(config, engine.bind(config))


def _on_gpu(device: str) -> bool:
    """`auto` is decided by what the cluster has."""
    import ray

    return device == "cuda" or (device == "auto" and ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0)
