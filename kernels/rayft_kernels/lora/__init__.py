"""Linear layers and gated MLPs with low-rank adapters (arXiv 2106.09685), one autograd node each."""
