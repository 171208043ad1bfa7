"""Quantizer modules, which layers can have them, bit widths, and putting them on a model."""
