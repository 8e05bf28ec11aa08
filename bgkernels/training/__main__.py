"""``python -m bgkernels.training demo``."""

from bgkernels.training.cli import app

if __name__ == "__main__":
    app()
