"""Transforms turn an update (named tensors) into a code (one vector) and back.

``transform`` is the base class, ``identity`` changes nothing, ``subspace`` and ``autoencoder`` are
learned.
"""
