"""Fused attention: `attention` and `shared_prefix` are the ops, implementations are the modules beside this one."""

from crescendo.pallas_kernels.attention.op import attention as attention
from crescendo.pallas_kernels.attention.prefix import shared_prefix as shared_prefix
