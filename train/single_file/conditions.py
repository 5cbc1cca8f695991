"""Evaluates the conditions under which a packed script needs a module."""

from __future__ import annotations

from golf_kernels.dispatch import BackendError, may_run
from train.common.errors import UserError
from train.config import Config


def holds(condition: str, config: Config) -> bool:
    """Whether the settings meet a condition: a Python expression of `config` and `golf_kernels.dispatch.may_run`.

    Raises:
        UserError: the setting `golf_backend` is invalid.
    """
    try:
        return bool(eval(condition, {"config": config, "may_run": may_run}))
    except BackendError as error:
        raise UserError(str(error)) from error
