"""Ops that training patches into models. Needs torch; triton where a kernel exists. One folder per op."""

from rayft_kernels.linear_cross_entropy.op import token_logprobs, weighted_nll_sum

__all__ = ["token_logprobs", "weighted_nll_sum"]
