"""Whose code it is that calls a function of torch which a mode watches."""

from __future__ import annotations

import inspect


def asking_module(*past: str) -> str:
    """Name of the module whose code made the call; empty if nobody did.

    Args:
        past: modules of torch that pass such calls on.
    """
    frame = inspect.currentframe()
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name not in (__name__, *past) and frame.f_code.co_name != "__torch_function__":
            return name
        frame = frame.f_back
    return ""
