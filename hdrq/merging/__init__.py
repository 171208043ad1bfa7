"""Merging quantized models on their integers, and adding changes to them, in memory and from file to file."""

from hdrq.merging.adding import add, add_file
from hdrq.merging.changes import Change
from hdrq.merging.files import merge_files, readiness
from hdrq.merging.models import merge

__all__ = ["Change", "add", "add_file", "merge", "merge_files", "readiness"]
