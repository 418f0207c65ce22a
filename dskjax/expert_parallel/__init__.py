"""Experts split over devices: dispatch, combine, and the layer that uses them."""

from dskjax.expert_parallel.dispatch import (
    ExpertSlots,
    Payload,
    Received,
    by_expert,
    combine,
    dispatch,
    weigh,
)
from dskjax.expert_parallel.exchange import Exchange
from dskjax.expert_parallel.layout import Layout, layout

__all__ = [
    "Exchange",
    "ExpertSlots",
    "Layout",
    "Payload",
    "Received",
    "by_expert",
    "combine",
    "dispatch",
    "layout",
    "weigh",
]
