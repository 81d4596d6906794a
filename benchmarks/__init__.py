"""Interleaved benchmarks of shardstep against plain torch, DDP and FSDP2 (``python -m benchmarks``)."""
