"""Codebooks, token losses and token decoding."""
