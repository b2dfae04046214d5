"""How well a model predicts: losses, perplexities and benchmarks."""

from gptfast.evaluate.loss import loader_loss, perplexity, sliding_score, text_score, token_losses

__all__ = ["loader_loss", "perplexity", "sliding_score", "text_score", "token_losses"]
