"""RMSNorm of attention heads and rotary embedding, in one pass over queries, keys and values."""
