"""Bytes between ranks: collectives, the two-shot mean, lanes, links and the handshake."""
