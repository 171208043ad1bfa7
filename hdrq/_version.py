"""The version of the package, alone: nothing is imported here, so anything may import it."""

__version__ = "0.2.0"
