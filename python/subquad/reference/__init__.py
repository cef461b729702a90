"""Plain PyTorch oracles: differentiable, float64-capable, free of triton and of native code. One module per stem."""
