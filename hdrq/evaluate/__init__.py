"""What a model is worth: accuracies, mIoU, their harmonic mean, the loss between and around models, its curvature."""

from hdrq.evaluate.averaging import average
from hdrq.evaluate.curvature import TopEigenvalue, Trace, hessian_top_eigenvalue, hessian_trace
from hdrq.evaluate.directions import direction_surface
from hdrq.evaluate.distances import Distance, distances
from hdrq.evaluate.landscape import Barrier, Surface, error_barrier, loss_surface
from hdrq.evaluate.metrics import accumulated_errors, accuracy, accuracy_of, harmonic_mean
from hdrq.evaluate.noise import NoisyBarrier, noisy_error_barrier
from hdrq.evaluate.segmentation import class_counts, class_iou, mean_iou

__all__ = [
    "Barrier",
    "Distance",
    "NoisyBarrier",
    "Surface",
    "TopEigenvalue",
    "Trace",
    "accumulated_errors",
    "accuracy",
    "accuracy_of",
    "average",
    "class_counts",
    "class_iou",
    "direction_surface",
    "distances",
    "error_barrier",
    "harmonic_mean",
    "hessian_top_eigenvalue",
    "hessian_trace",
    "loss_surface",
    "mean_iou",
    "noisy_error_barrier",
]
