"""Merging quantized models on their integers, in memory and from file to file, and saying whether that will work."""
