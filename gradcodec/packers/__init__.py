"""Packers turn a bare vector into bytes and back: one family per file.

``packer`` says what one is.
"""
