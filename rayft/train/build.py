"""From a configuration to a model that can be stepped: the order of the offline flow, in one place."""

from __future__ import annotations

import logging
from typing import Any

import torch

from rayft.config.schema import SftRun
from rayft.models import adapt, heads, load, patch
from rayft.models.spec import spec_of
from rayft.parallel import attention
from rayft.parallel.mesh import Mesh
from rayft.parallel.parallelize import parallelize
from rayft.types import Session

log = logging.getLogger("rayft")


def build_model(cfg: SftRun, session: Session, mesh: Mesh) -> Any:
    """Build on meta, adapt, patch, parallelize, materialise.

    Args:
        cfg: the run.
        session: gives the device.
        mesh: from `parallel.mesh.build_mesh`.

    Returns:
        A transformers model with `score(batch, need)`, sharded, on the session's device, in training mode.

    Raises:
        ConfigError: the model, adapter or family cannot do what the configuration asks.
        DataError: the model's files lack a weight.
    """
    device_type = session.device.split(":")[0]
    config = load.read_config(cfg.model)
    spec = spec_of(config)
    load.register_attention(attention.packed_attention)
    compute = load.compute_dtype(cfg.model, device_type)
    module = load.build(cfg.model, config, load.base_dtype(cfg.model, frozen=cfg.adapter.type != "none", device_type=device_type))

    targets = adapt.adapt(module, cfg.adapter, cfg.run.seed)
    patch.apply_fixes(module, spec)
    heads.attach_score(module, lambda batch: attention.Layout(batch, cfg.parallel.attention), cfg.run.seed)
    parallelize(module, spec, cfg.parallel, mesh, compute, getattr(torch, cfg.model.reduce_dtype))
    load.materialise(module, cfg.model, cfg.run.seed, session.device)

    if session.rank == 0 and targets:
        log.info("adapters on %d modules", len(targets))
    module.train()
    return module
