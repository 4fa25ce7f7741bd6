"""From a configuration to a model that can be stepped: the order of the offline flow, in one place."""

from __future__ import annotations

import logging
from typing import Any

import torch

from rayft.config.schema import AnyRun
from rayft.models import adapt, fused, heads, load, patch, select
from rayft.models.spec import spec_of
from rayft.parallel import activation, attention
from rayft.parallel.mesh import Mesh
from rayft.parallel.parallelize import parallelize
from rayft.types import Session

log = logging.getLogger("rayft")


def build_model(cfg: AnyRun, session: Session, mesh: Mesh) -> Any:
    """Build on meta, adapt, patch, parallelize, materialise.

    Args:
        cfg: the run.
        session: gives the device.
        mesh: from `parallel.mesh.build_mesh`.

    Returns:
        A transformers model with `score(batch, need)`, sharded, on the session's device, in training mode; its `trained_rows`
        are those of the parameters that model.unfrozen trains in part.

    Raises:
        ConfigError: the model, adapter or family cannot do what the configuration asks.
        DataError: the model's files lack a weight.
    """
    device_type = session.device.split(":")[0]
    config = load.read_config(cfg.model)
    spec = spec_of(config)
    selective = cfg.parallel.activation_checkpointing == "selective"
    load.register_attention(activation.keeping_attention(attention.packed_attention) if selective else attention.packed_attention)
    compute = load.compute_dtype(cfg.model, device_type)
    module = load.build(cfg.model, config, load.base_dtype(cfg.model, frozen=cfg.adapter.type != "none", device_type=device_type))

    targets = adapt.adapt(module, cfg.adapter, cfg.run.seed)
    module.trained_rows = select.unfreeze(module, cfg.model.unfrozen) if cfg.model.unfrozen else {}
    patch.apply_fixes(module, spec)
    choices = fused.fuse(module, spec, cfg.adapter, device_type, cfg.kernels)
    heads.attach_score(module, attention.layouts(module, cfg.parallel.attention), cfg.run.seed)
    parallelize(module, spec, cfg.parallel, mesh, compute, getattr(torch, cfg.model.reduce_dtype))
    load.materialise(module, cfg.model, cfg.run.seed, session.device, cpu_offload=cfg.parallel.cpu_offload)
    select.hold_rows(module, module.trained_rows)

    if session.rank == 0 and targets:
        log.info("adapters on %d modules", len(targets))
    if session.rank == 0:
        for line in fused.report(choices):
            log.info("kernels: %s", line)
    module.train()
    return module


def kernel_choices(cfg: AnyRun, device_type: str) -> list[fused.Choice]:
    """What each part of each decoder layer would run on, found on the meta device.

    Args:
        cfg: the run.
        device_type: of the workers, "cpu" or "cuda".

    Raises:
        ConfigError: the model, adapter or family cannot do what the configuration asks.
    """
    config = load.read_config(cfg.model)
    spec = spec_of(config)
    load.register_attention(attention.packed_attention)
    module = load.build(cfg.model, config, torch.float32)
    adapt.adapt(module, cfg.adapter, cfg.run.seed)
    patch.apply_fixes(module, spec)
    return fused.fuse(module, spec, cfg.adapter, device_type, cfg.kernels)
