"""The loss beside its peers and its limits; ``python -m benchmarks.run --help``."""
