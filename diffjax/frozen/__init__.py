"""Networks that are only used with given weights: autoencoders and feature extractors."""
