"""Ops that training patches into models. Needs torch; triton where a kernel exists. One folder per op."""

from rayft_kernels.attention.op import document_bounds, packed_attention
from rayft_kernels.glu.op import glu, glu_packed
from rayft_kernels.linear_cross_entropy.op import token_logprobs, weighted_nll_rows, weighted_nll_sum
from rayft_kernels.lora.op import Projection, TokenDropout, lora_linear, lora_linears, lora_mlp
from rayft_kernels.moe_lora.op import ExpertAdapter, moe_lora
from rayft_kernels.nf4.op import NF4, dequantise, nf4_linear, quantise
from rayft_kernels.norm_rope.op import norm_rope, qkv_norm_rope
from rayft_kernels.rms_norm.op import rms_norm

__all__ = [
    "NF4",
    "ExpertAdapter",
    "Projection",
    "TokenDropout",
    "dequantise",
    "document_bounds",
    "glu",
    "glu_packed",
    "lora_linear",
    "lora_linears",
    "lora_mlp",
    "moe_lora",
    "nf4_linear",
    "norm_rope",
    "packed_attention",
    "qkv_norm_rope",
    "quantise",
    "rms_norm",
    "token_logprobs",
    "weighted_nll_rows",
    "weighted_nll_sum",
]
