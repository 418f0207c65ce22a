"""`serve.api.TextService` in a form that a type checker at run time can test objects against."""

from typing import Protocol, runtime_checkable

from serve import api


@runtime_checkable
class TextService(api.TextService, Protocol):
    """The same interface; whatever has its attributes is one."""
