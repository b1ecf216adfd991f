"""jaxdiff: diffusion models in functional JAX and Flax, one command a job."""

__version__ = "0.1.0"
