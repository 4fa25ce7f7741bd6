"""RMSNorm of hidden states, the norms between the parts of a decoder layer."""
