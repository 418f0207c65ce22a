"""Choice of experts per token: the gates of the V2 and V3 families."""

from pallas_kernels.router.api import route

__all__ = ["route"]
