"""What compresses each kind of wrapped model: DDP, FSDP1, FSDP2, and groups with compression."""
