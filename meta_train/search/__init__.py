"""Search for optimizers as programs (arXiv 2302.06675)."""
