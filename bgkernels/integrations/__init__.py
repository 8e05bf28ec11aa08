"""The loss inside the trainers that people use; each module needs the package it is named after.

- :mod:`~bgkernels.integrations.causal_lm`: any loop over a ``transformers`` causal language model.
- :mod:`~bgkernels.integrations.transformers`, :mod:`~bgkernels.integrations.trl`,
  :mod:`~bgkernels.integrations.lightning`: trainers.
- :mod:`~bgkernels.integrations.torchtune`, :mod:`~bgkernels.integrations.liger`,
  :mod:`~bgkernels.integrations.functional`: losses with the call shapes of other libraries.
"""
