"""Compute kernels of the pooled head; `headscale.pooling` is the public face."""
