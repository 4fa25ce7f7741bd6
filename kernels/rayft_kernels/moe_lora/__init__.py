"""Mixture-of-experts MLPs with per-expert low-rank adapters, as one autograd node."""
