"""LightCLIP-JAX: pretraining of small CLIP models."""
