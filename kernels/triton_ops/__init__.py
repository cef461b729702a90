"""Triton kernels and their launchers, one module per op stem; the package itself imports nothing.

A launcher is a module-level function with the name and argument order of its op's schema. It takes CUDA tensors, or
CPU tensors when `TRITON_INTERPRET=1` was set before Triton was imported. Modules import nothing of subquad but
`_common` and one another, and that relatively, so this folder can be shipped alone.
"""
