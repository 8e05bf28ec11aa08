"""Soft labels from inference servers: requests, answers, and the labels of whole texts.

In the order of their use: :mod:`~bgkernels.labels.served.client` (HTTP),
:mod:`~bgkernels.labels.served.api` (what is asked and answered), and
:mod:`~bgkernels.labels.served.source` (labels for files).
"""
