"""Array operations that the models share, each a pure function."""
