"""Attention under a layer's visibility: one choice (`plan`), and a file for each way to compute it.

    plan = plan_attention(spec, head_size=64, backend="auto", device_type="cpu", dtype=torch.float32, gradients=True)
    attend = plan.prepare(packing)      # masks and the like, once for all layers of this kind
    out = attend(q, k, v, sinks)        # in each layer

`reference` is the dense oracle that every other form is tested against. `blocks` computes short windows as batched
matrix products, `tiles` long ones on a CPU without masks. `cudnn`, `flex` and `varlen` call kernels of other libraries.
`composed` serves a layer through another layer's form. Rows that see no key (padding) give zeros. `backends` says what
each can do, and where.
"""

from model.attention.backends import BACKENDS as BACKENDS
from model.attention.backends import Device as Device
from model.attention.backends import check_backend as check_backend
from model.attention.plan import AttentionPlan as AttentionPlan
from model.attention.plan import plan_attention as plan_attention
from model.attention.reference import Attend as Attend
from model.attention.reference import product_dtype as product_dtype
