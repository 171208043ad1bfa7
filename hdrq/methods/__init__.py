"""How one unit is fitted, and the functions that quantize a whole model with a method."""
