"""Gated activations of MLPs: act(gate) * up, with the activation recomputed in the backward."""
