"""Transforms turn an update (named tensors) into a code (one vector) and back.

``transform`` says what one is, ``identity`` is the one that changes nothing, ``subspace`` and
``autoencoder`` are learned.
"""
