"""The service as an application of Ray Serve: `pipeline.service.app:app` in infra/configs/serve.yaml."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from infra import config as configs
from infra import devices, storage
from pipeline.service.config import ServiceConfig

if TYPE_CHECKING:
    from ray.serve import Application


NAME = "speech"


def app(args: dict[str, Any]) -> Application:
    """The application, from fields of `ServiceConfig`. Raises ConfigError for what they cannot be."""
    return build(configs.load(ServiceConfig, overrides=args))


def build(config: ServiceConfig) -> Application:
    """The application, for the cluster that this process is connected to."""
    from ray import serve

    from pipeline.service.engine import SpeechEngine
    from pipeline.service.ingress import Ingress
    from pipeline.service.recordings import SampleReader

    config = resolved(config)
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    gpus = config.gpu_share if _on_gpu(config.device) else 0
    engine = serve.deployment(
        SpeechEngine,
        name="SpeechEngine",
        num_replicas=config.engines,
        # More than it holds: it is the engine that refuses, at once and with a reason.
        max_ongoing_requests=2 * config.most_requests + 16,
        max_queued_requests=config.most_requests,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=min(20.0, config.timeout_s),
        ray_actor_options={"num_cpus": config.threads, "num_gpus": gpus},
        logging_config=quiet,
    )
    reader = serve.deployment(
        SampleReader,
        name="SampleReader",
        max_ongoing_requests=4,
        ray_actor_options={"num_cpus": 0.25},
        logging_config=quiet,
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="SpeechIngress",
        max_ongoing_requests=4 * config.most_requests * config.engines + 64,
        ray_actor_options={"num_cpus": 0.1},
    )
    return ingress.bind(config, engine.bind(config), reader.bind(config))


def resolved(config: ServiceConfig) -> ServiceConfig:
    """With paths that mean the same on every node, whose Ray may have been started in another folder."""
    from pipeline import codec_weights

    paths = {name: getattr(config, name) for name in ("model", "voices", "tokens", "codec", "codec_weights")}
    if config.codec in codec_weights.NAMES:
        del paths["codec"]
    return dataclasses.replace(config, **{name: path and storage.absolute(path) for name, path in paths.items()})


def _on_gpu(device: str) -> bool:
    """`auto` is no GPU where no Ray is connected, as in `serve build`."""
    import ray

    return device == "cuda" or (ray.is_initialized() and devices.of_cluster(device) == "cuda")
