"""Meshes, sharding rules and start-up of several hosts."""
