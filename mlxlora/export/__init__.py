"""Models on disk: fused with an adapter, or quantized."""
