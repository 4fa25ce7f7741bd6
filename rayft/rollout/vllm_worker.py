"""What runs inside vLLM's worker processes: rayft's weight transfer engine, registered with vLLM when this module is imported.

vLLM imports it in every worker because `EXTENSION` is the engine's `worker_extension_cls`. Imports vLLM: nothing else may import
this module.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from rayft.rollout.compat import repack_experts, repack_tied_head
from rayft.rollout.receive import Receiver


@dataclass
class Start(WeightTransferInitInfo):  # type: ignore[misc]
    """A start message of the sender."""

    push: dict[str, Any]


@dataclass
class Chunk(WeightTransferUpdateInfo):  # type: ignore[misc]
    """A chunk message of the sender."""

    push: dict[str, Any]


class ReceivedWeights(WeightTransferEngine):  # type: ignore[misc]
    """Loads what the sender pushes through vLLM's layerwise reload, so that captured graphs and packed layouts stay valid."""

    init_info_cls = Start
    update_info_cls = Chunk

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        device = torch.device(self.device)
        self._receiver = Receiver(
            lambda tensors: self.model.load_weights(tensors),
            Path(self.model_config.model),
            self.model_config.dtype,
            device,
            self.parallel_config.rank,
        )

    def init_transfer_engine(self, init_info: Start) -> None:
        """Open the transport of a push."""
        self._receiver.start(init_info.push)

    def start_weight_update(self) -> None:
        """Ready the layers for new weights."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Chunk) -> None:
        """Take one chunk."""
        self._receiver.chunk(update_info.push)

    def finish_weight_update(self) -> None:
        """Load what is left and put every layer into its final layout."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        self._receiver.finish()
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            repack_experts(self.model)
            if self.model_config.hf_text_config.tie_word_embeddings:
                repack_tied_head(self.model)

    def answer(self) -> dict[str, Any]:
        """See `Receiver.answer`. What a tensor parallel worker loaded is a part of what it got, and is not compared."""
        whole = self.parallel_config.tensor_parallel_size == 1
        parameters = dict(self.model.named_parameters()) if whole else {}
        return self._receiver.answer(parameters, getattr(self.model, "packed_modules_mapping", {}))

    def shutdown(self) -> None:
        """Leave the sender's group."""
        self._receiver.close()

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> None:
        """Required by vLLM before 0.28; the trainer sends by `weight_sync.protocol.Sender`."""
        raise TypeError("rayft sends weights by weight_sync.protocol.Sender")


class Extension:
    """Methods that vLLM adds to its workers, for `collective_rpc`."""

    weight_transfer_engine: ReceivedWeights

    def rayft_answer(self) -> dict[str, Any]:
        """See `Receiver.answer`."""
        return self.weight_transfer_engine.answer()


WeightTransferEngineFactory.register_engine("rayft", ReceivedWeights)
# At every push it warns that rotary tables and tied heads, which no push brings, failed to load. `Receiver.answer` checks what matters.
logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
