# SPDX-License-Identifier: MIT
"""ounce's operators for PyTorch: `import ounce` loads them, `torch.ops.ounce` (or `ounce.ops`) holds them.

Schemas, autograd, Meta and Autocast kernels are all registered by the library itself; there is nothing
else to set up for torch.compile. The library is taken from OUNCE_OPS_LIB, else from this package when
it was installed with pip, else from the build folder of this checkout.
"""
import os

import torch

_HERE = os.path.dirname(os.path.abspath(__file__))
_PLACES = (
    os.path.join(_HERE, "lib", "libounce_ops.so"),
    os.path.join(_HERE, "..", "..", "..", "build", "libounce_ops.so"),
)


def library():
    """Path of libounce_ops.so."""
    chosen = os.environ.get("OUNCE_OPS_LIB")
    places = (chosen,) if chosen else _PLACES
    for place in places:
        if os.path.exists(place):
            return os.path.abspath(place)
    raise ImportError(
        "libounce_ops.so is not at " + " nor ".join(places) + "; build it with ./ounce or set OUNCE_OPS_LIB"
    )


def cmake_dir():
    """Folder for CMake's find_package(ounce), where this package was installed with pip."""
    folder = os.path.join(_HERE, "lib", "cmake", "ounce")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder} is not there: install with pip, or use cmake --install")
    return folder


torch.ops.load_library(library())
ops = torch.ops.ounce
