"""Expert placement: which GPU holds which experts, some of them several times. NumPy on the host.

Loads of experts differ by an order of magnitude, and a layer takes as long as its fullest GPU. So
hot experts get replicas in spare slots, and experts are placed to make the fullest GPU light:

    loads = ExpertLoads(58, 256)
    loads.update("decode", counts)                    # each step, while serving
    layout = Layout(num_replicas=288, num_gpus=32)
    placement = plan(loads.mean("decode"), layout)    # or rebalance_experts, DeepSeek's own
    later = replan(placement, loads.mean("decode"), layout)
    later.moves                                       # (layer, slot, expert in it, expert to come)
"""

from dskjax.eplb.balance import gpu_loads, imbalance, lower_bound, plain_loads
from dskjax.eplb.greedy import rebalance_experts
from dskjax.eplb.layout import Layout
from dskjax.eplb.loads import ExpertLoads
from dskjax.eplb.placement import Placement
from dskjax.eplb.plan import Policy, plan
from dskjax.eplb.replan import Replan, replan

__all__ = [
    "ExpertLoads",
    "Layout",
    "Placement",
    "Policy",
    "Replan",
    "gpu_loads",
    "imbalance",
    "lower_bound",
    "plain_loads",
    "plan",
    "rebalance_experts",
    "replan",
]
