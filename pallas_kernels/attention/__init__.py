"""Fused attention: `attention` is the op, its implementations are the modules beside this one."""

from crescendo.pallas_kernels.attention.op import attention as attention
