"""Attention that carries tangents: exact forward-mode differentiation through softmax attention, in linear memory.

o, to = attention_jvp(q, k, v, tq, tk, tv)   # an explicit Jacobian-vector product
o = attention(q, k, v)                       # ordinary tensors, or dual tensors of torch.func.jvp and forward_ad
choose(q, k, v)                              # the kernels that these two take; taken() says which have run
"""

from flash_jvp.interface import attention, attention_jvp
from flash_jvp.operators import BACKENDS, choose, taken

__all__ = ["BACKENDS", "attention", "attention_jvp", "choose", "taken"]
