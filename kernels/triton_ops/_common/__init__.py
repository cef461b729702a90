"""Helpers shared by the Triton kernels: numerics, activations, launch plans, ahead-of-time cases."""
