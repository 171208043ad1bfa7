"""Merging quantized models on their integers, in memory and from file to file, and whether it will work."""
