"""Triton's interpreter without the half of its time that it spends on one thing again and again."""

from typing import Any


def patch_once_a_launch() -> None:
    """Let a launch replace the functions of triton.language once.

    The interpreter does so anew at each call of one jitted function by another, with no effect:
    what a launch has replaced stays replaced until it ends.
    """
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: dict[int, Any] = {}  # by module of jitted functions, in the launch that runs

    def patch_lang(fn: Any) -> Any:
        module = id(fn.__globals__)
        if module not in patched:
            patched[module] = patch(fn)
        return patched[module]

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, call
