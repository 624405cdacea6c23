"""Triton kernels of gradcodec, for `gradcodec.ops` alone to import.

Still empty: the kernels land with the fast-codec work, each beside its oracle in
`gradcodec.reference`. This file imports nothing, ever, so that finding the package never needs
triton.
"""
