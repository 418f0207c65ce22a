"""Packages that only some features need, and the extra of dskjax that each comes with."""

import importlib
from types import ModuleType

EXTRAS = {
    **dict.fromkeys(("fastapi", "httpx2", "prometheus_client", "uvicorn"), "serve"),
    "grain": "train",
    "pyarrow": "parquet",
    "tensorboardX": "tensorboard",
}


def hint(package: str) -> str:
    """What to tell who misses one of `EXTRAS`."""
    return f"{package} is not installed; it comes with pip install 'dskjax[{EXTRAS[package]}]'"


def require(module: str, what: str) -> ModuleType:
    """Imports a module of one of `EXTRAS`.

    Args:
        module: dotted name.
        what: file or option that needs it, for the message.

    Raises:
        ValueError: its package is not installed; says how to get it.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:  # it is there, but something it needs is not
            raise
        raise ValueError(f"{what}: {hint(package)}") from error
