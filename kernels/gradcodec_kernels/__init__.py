"""Triton kernels of gradcodec; only `gradcodec.ops` imports them.

One file for each op, beside its oracle of the same name in `gradcodec.reference`; `tiles`,
`quantise` and `unpack` hold shared code, and `launch` says how kernels are launched. This file must
import nothing, so that finding the package never needs triton.
"""
