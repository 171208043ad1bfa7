"""A model made ready: BatchNorm folded, attention opened, units found, and what would stay in float refused."""
