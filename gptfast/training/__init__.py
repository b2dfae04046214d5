"""Batches to a trained model."""
