"""NVFLARE's simulator with our filters, and with its own quantisers: bytes and losses."""
