"""Cross entropy, log-probability and entropy from hidden states, without materialised logits."""
