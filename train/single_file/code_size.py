"""Counts the bytes of a submission's code, which count together with the model's bytes."""

from __future__ import annotations

import importlib.util

from train.common.errors import UserError
from train.config import Config
from train.single_file.sources import SCRIPT, read_source


def counted_code_bytes(config: Config) -> int:
    """Return the bytes of the packed script that is running, or else of the script that `pack` would make.

    Raises:
        UserError: `check_code_form` refuses the settings.
    """
    check_code_form(config)
    if SCRIPT is not None:
        return len(read_source(SCRIPT))
    # imported here, because a packed script does not contain the module `pack`
    from train.single_file.pack import pack, script_settings

    return len(pack(config.recipe, script_settings(config), config.code_form))


def check_code_form(config: Config) -> None:
    """Before a run, check that the bytes of its code can be counted.

    Raises:
        UserError: `code_form` needs python-minifier, which is not installed.
    """
    minified = SCRIPT is None and config.code_form != "plain"
    if minified and importlib.util.find_spec("python_minifier") is None:
        raise UserError(
            f"code_form: {config.code_form} needs python-minifier, which is not installed: pip install 'python-minifier>=3', or set "
            "CODE_FORM=plain"
        )
