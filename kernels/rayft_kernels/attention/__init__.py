"""Attention of packed documents; see op.py."""
