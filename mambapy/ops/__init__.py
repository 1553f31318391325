"""Pure functions on tensors: the recurrences and what surrounds them, one function an op.

Each op has several backends, named in `dispatch`; `explain` says which one a call gets and why.
"""

from mambapy.ops.conv1d import causal_conv1d, causal_conv1d_step, conv_and_gate, conv_state
from mambapy.ops.custom_op import recurrences
from mambapy.ops.dispatch import Verdict, explain
from mambapy.ops.gated_norm import gated_rms_norm
from mambapy.ops.gpu.tuning import tune
from mambapy.ops.info import backends_info
from mambapy.ops.linear_cross_entropy import linear_cross_entropy
from mambapy.ops.mamba3_scan import mamba3_scan, mamba3_step
from mambapy.ops.model_step import plan_looks_up, refuses_fused_step, step_plan
from mambapy.ops.norm import add_rms_norm, rms_norm
from mambapy.ops.reference_ssd import Mamba3Parts
from mambapy.ops.selective_scan import selective_scan, selective_scan_step
from mambapy.ops.ssd import ssd, ssd_from_start, ssd_step

__all__ = [
    "Mamba3Parts",
    "Verdict",
    "add_rms_norm",
    "backends_info",
    "causal_conv1d",
    "causal_conv1d_step",
    "conv_and_gate",
    "conv_state",
    "explain",
    "gated_rms_norm",
    "linear_cross_entropy",
    "mamba3_scan",
    "mamba3_step",
    "plan_looks_up",
    "recurrences",
    "refuses_fused_step",
    "rms_norm",
    "selective_scan",
    "selective_scan_step",
    "ssd",
    "ssd_from_start",
    "ssd_step",
    "step_plan",
    "tune",
]
