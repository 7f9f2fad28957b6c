"""One kind of error for a wrong setting."""

from functools import wraps
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError


Config = TypeVar("Config", bound=type)


def value_errors(cls: Config) -> Config:
    """Class decorator: what `@strict` finds wrong with a config's settings is a ValueError that says just that.

    `@strict` wraps the error of a setting into one of its own, which is no ValueError and names its validator first.
    """
    strict_init = cls.__init__  # type: ignore[misc]

    @wraps(strict_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            strict_init(self, *args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__ or error)) from error

    cls.__init__ = init  # type: ignore[misc]
    return cls
