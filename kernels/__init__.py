"""Every op in Triton, for CUDA and ROCm tensors; under ``TRITON_INTERPRET=1``, for CPU tensors.

The same signatures and the same bits as :mod:`hdrq.backends.reference`. ``_lang`` holds the jitted maths, ``_launch``
how a tensor is cut into tiles; a family's module holds its kernels, which only move data through that maths. Nothing
here reads a device value on the host: a scale that is not positive and finite becomes NaN, and so does what depends
on it.
"""

import triton

OLDEST = (3, 6)  # with triton.knobs, and the functions of triton.language that the kernels call

if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
    raise ImportError(
        f"triton must be {'.'.join(map(str, OLDEST))} or newer for the kernels, got {triton.__version__}, "
        "which an older torch brings along; install a torch that brings a newer one"
    )
