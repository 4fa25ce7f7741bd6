"""From a configuration to a model that can be stepped: the order of the offline flow, in one place."""

from __future__ import annotations

import logging
from typing import Any

import torch

from rayft.config.schema import AnyRun, GrpoRun
from rayft.errors import ConfigError
from rayft.models import adapt, fused, heads, load, nf4, patch, select
from rayft.models.spec import doubt, spec_of
from rayft.parallel import activation, attention
from rayft.parallel.mesh import Mesh
from rayft.parallel.parallelize import parallelize
from rayft.types import ModelSpec, Session

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
    config = model_config(cfg)
    spec = spec_of(config)
    selective = cfg.parallel.activation_checkpointing == "selective"
    load.register_attention(activation.keeping_attention(attention.packed_attention) if selective else attention.packed_attention)
    compute = load.compute_dtype(cfg.model, device_type)
    module = load.build(cfg.model, config, load.base_dtype(cfg.model, frozen=cfg.adapter.type != "none", device_type=device_type))

    held = quantise(module, cfg, spec)
    targets = adapt.adapt(module, cfg.adapter, cfg.run.seed)
    module.trained_rows = select.unfreeze(module, cfg.model.unfrozen) if cfg.model.unfrozen else {}
    patch.apply_fixes(module, spec)
    choices = fused.fuse(module, spec, cfg.adapter, device_type, cfg.kernels)
    lean = cfg.kernels.linear_cross_entropy == "lean"
    heads.attach_score(module, attention.layouts(module, cfg.parallel.attention), cfg.run.seed, lean=lean)
    parallelize(module, spec, cfg.parallel, mesh, compute, getattr(torch, cfg.model.reduce_dtype))
    load.materialise(module, cfg.model, cfg.run.seed, session.device, cpu_offload=cfg.parallel.cpu_offload)
    select.hold_rows(module, module.trained_rows)

    if session.rank == 0 and (line := doubt(config)):
        log.warning(line)
    if session.rank == 0 and targets:
        log.info("adapters on %d modules", len(targets))
    if session.rank == 0 and held:
        log.info("model.quantize=nf4: %s", nf4.summary(held))
    if session.rank == 0:
        for line in fused.report(choices):
            log.info("kernels: %s", line)
    module.train()
    return module


def model_config(cfg: AnyRun) -> Any:
    """The model's configuration.

    Raises:
        ConfigError: see `load.read_config`; or engines would be started from weights in 8 bits, which no push can replace.
    """
    config = load.read_config(cfg.model)
    if isinstance(cfg, GrpoRun) and cfg.model.init != "random" and load.quantisation_of(config):
        rule = "is stored in 8 bits, and engines that start from it take no other weights"
        remedy = "Save its weights dense first, as transformers does with FineGrainedFP8Config(dequantize=True)"
        raise ConfigError("model.path", cfg.model.path, rule, remedy)
    return config


def quantise(module: Any, cfg: AnyRun, spec: ModelSpec) -> list[str]:
    """Hold linear layers in 4 bits where model.quantize asks for it; their names."""
    if cfg.model.quantize == "none":
        return []
    names = nf4.choose(module, load.layers_of(module, spec.layers), cfg.adapter.modules_to_save)
    nf4.replace(module, names)
    return names


def planned_lines(cfg: AnyRun, device_type: str) -> list[str]:
    """What is held in 4 bits, what attention and each part of each decoder layer would run on, and what to be wary of, in words; found
    on the meta device.

    Args:
        cfg: the run.
        device_type: of the workers, "cpu" or "cuda".

    Raises:
        ConfigError: the model, adapter or family cannot do what the configuration asks.
    """
    config = model_config(cfg)
    spec = spec_of(config)
    load.register_attention(attention.packed_attention)
    module = load.build(cfg.model, config, torch.float32)
    held = quantise(module, cfg, spec)
    adapt.adapt(module, cfg.adapter, cfg.run.seed)
    patch.apply_fixes(module, spec)
    lines = fused.report(fused.fuse(module, spec, cfg.adapter, device_type, cfg.kernels))
    lines += [f"attention: {line}" for line in attention.summary(module, device_type, cfg.parallel.attention)]
    lines = [f"model.quantize=nf4: {nf4.summary(held)}", *lines] if held else lines
    return [*lines, f"warning: {line}"] if (line := doubt(config)) else lines
