"""Codecs alone: error, bits, speed and memory, and what decoders make of damaged bytes."""
