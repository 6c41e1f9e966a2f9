"""Recipes: one file each, plain values only."""
