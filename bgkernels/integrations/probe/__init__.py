"""What a model does, found by running it on a few tokens.

That is: what feeds its head, what becomes of the logits, and which loss it computes of them.
Nothing here depends on the names that a class gives to its parts. From the bottom up: the modules
``tokens``, ``curve`` and ``tap``; above :mod:`bgkernels.integrations.heads`, which uses them, the
modules ``loss`` and ``watch``.
"""
