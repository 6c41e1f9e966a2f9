"""Scores of generated images, and the protocol that makes two scores comparable."""
