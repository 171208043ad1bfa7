"""Digits: four domains, a small ResNet trained on one and adapted to three, and what quantizes and merges them."""
