"""Triton kernels of gradcodec, for `gradcodec.ops` alone to import.

One file for each op, beside its oracle of the same name in `gradcodec.reference`; `tiles`,
`quantise` and `unpack` hold what they share, `launch` how they are launched. This file imports
nothing, ever, so that finding the package never needs triton.
"""
