"""Fast generation: a model packed once, all layers and the draw in one call a token."""

from gptfast.engine.engine import Engine
from gptfast.generation.decoder import Stats
from gptfast.weights.packed import is_packed

__all__ = ["Engine", "Stats", "is_packed"]
