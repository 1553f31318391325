"""Pure functions on tensors: the recurrences and what surrounds them, one function an op.

Each op has several backends, named in `dispatch`; `explain` says which one a call gets and why.
"""

from mambapy.ops.conv1d import causal_conv1d, causal_conv1d_step, conv_state
from mambapy.ops.dispatch import Verdict, explain
from mambapy.ops.info import backends_info
from mambapy.ops.model_step import refuses_fused_step, step_plan
from mambapy.ops.norm import rms_norm
from mambapy.ops.selective_scan import selective_scan, selective_scan_step

__all__ = [
    "Verdict",
    "backends_info",
    "causal_conv1d",
    "causal_conv1d_step",
    "conv_state",
    "explain",
    "refuses_fused_step",
    "rms_norm",
    "selective_scan",
    "selective_scan_step",
    "step_plan",
]
