"""Train a model on batches and save checkpoints and metrics."""
