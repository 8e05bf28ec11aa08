"""The commands of ``bgkernels``, one a module; :mod:`bgkernels.training.cli` registers them."""
