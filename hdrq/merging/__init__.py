"""Merging quantized models on their integers, in memory and from file to file, and whether it will work."""

from hdrq.merging.files import merge_files, readiness
from hdrq.merging.models import merge

__all__ = ["merge", "merge_files", "readiness"]
