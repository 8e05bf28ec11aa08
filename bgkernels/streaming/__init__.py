"""Tiles in, gradients out, within a memory budget; no loss is known here."""
