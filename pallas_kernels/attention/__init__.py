"""Fused attention: `attention` is the op, its implementations are the modules beside this one."""

from crescendo.pallas_kernels.attention.contract import Config as Config
from crescendo.pallas_kernels.attention.contract import Operands as Operands
from crescendo.pallas_kernels.attention.op import attention as attention
from crescendo.pallas_kernels.attention.op import kernels as kernels
