"""Is a GPU's number the arithmetic that was chosen, or a bug? From PyTorch, in three lines.

::

    import runner

    with runner.capture(model, "run.safetensors"):
        model(input_ids)
    print(runner.judge("run.safetensors"))

`capture` writes what a model computes, site by site; `judge` says which sites hold the bits that
the engine's kernels must return, and of the first one that does not what is wrong there;
`compare` answers for one product, one norm, or two tensors; `matmul` computes a product as a chip does.
"""

from importlib import metadata as _metadata

from ._capture import capture
from ._compare import Comparison, Operation, compare, operations
from ._errors import CaptureError, RunnerError
from ._judge import Site, Verdict, judge
from ._matmul import matmul

try:
    __version__ = _metadata.version("runner")
except _metadata.PackageNotFoundError:
    # From a checkout, without having been installed.
    __version__ = "unknown"

__all__ = [
    "CaptureError",
    "Comparison",
    "Operation",
    "RunnerError",
    "Site",
    "Verdict",
    "__version__",
    "capture",
    "compare",
    "judge",
    "matmul",
    "operations",
]
