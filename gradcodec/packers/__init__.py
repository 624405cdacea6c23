"""Packers turn a bare vector into bytes and back: one family per file.

``packer`` is the base class.
"""
