"""What a model is worth: accuracies, their harmonic mean, and the loss between models."""

from hdrq.evaluate.averaging import average
from hdrq.evaluate.landscape import Barrier, Surface, error_barrier, loss_surface
from hdrq.evaluate.metrics import accumulated_errors, accuracy, accuracy_of, harmonic_mean

__all__ = [
    "Barrier",
    "Surface",
    "accumulated_errors",
    "accuracy",
    "accuracy_of",
    "average",
    "error_barrier",
    "harmonic_mean",
    "loss_surface",
]
