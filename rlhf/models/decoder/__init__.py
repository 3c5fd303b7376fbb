"""Decoders as plain data: the parts of a causal language model of any family, and copies of its weights."""
