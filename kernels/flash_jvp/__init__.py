"""Attention of primals and tangents; needs nothing but torch.

o, to = attention_jvp(q, k, v, tq, tk, tv)   # an explicit Jacobian-vector product
o = attention(q, k, v)                       # plain tensors, or forward-mode dual tensors
"""

from flash_jvp.interface import BACKENDS, attention, attention_jvp

__all__ = ["BACKENDS", "attention", "attention_jvp"]
