"""DeepSeek-V3-family models in JAX: parameters, forward pass, decoding, checkpoints."""
