"""Rows between the GPUs of one host: each rank writes into its peers' memory."""

from pallas_kernels.peer_exchange.api import peer_exchange

__all__ = ["peer_exchange"]
