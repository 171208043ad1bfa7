"""Folders of transformers with quantized weights, by compressed-tensors, GPTQ and AWQ: read, merged, written."""

from hdrq.export.folders.compressed import to_compressed_tensors
from hdrq.export.folders.reading import Folder, is_folder, read_folder
from hdrq.export.folders.writing import FolderWriter, write_folder

__all__ = ["Folder", "FolderWriter", "is_folder", "read_folder", "to_compressed_tensors", "write_folder"]
