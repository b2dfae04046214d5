from gptfast import ops
from gptfast.ops.library import use_backend

__all__ = ["ops", "use_backend"]
