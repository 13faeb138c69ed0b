"""Inference: fold norms, fuse activations, and run every convolution where it is measured to be fastest."""

from .optimize import OptimizedModule, optimize_for_inference

__all__ = ["OptimizedModule", "optimize_for_inference"]
