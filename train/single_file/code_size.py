"""The size of a submission's code; code and model together must stay below the cap."""

from __future__ import annotations

import importlib.util

from train.common.errors import UserError
from train.config import Config
from train.single_file.sources import SCRIPT, read_source


def counted_code_bytes(config: Config) -> int:
    """Bytes of code that count against the cap: the packed script itself, or the one that these sources would become.

    Raises:
        UserError: see `check_code_form`.
    """
    check_code_form(config)
    if SCRIPT is not None:
        return len(read_source(SCRIPT))
    # a packed script does not carry this module
    from train.single_file.pack import pack, script_settings

    return len(pack(config.recipe, script_settings(config), config.code_form))


def check_code_form(config: Config) -> None:
    """Check in advance that the code can be counted.

    Raises:
        UserError: the form needs python-minifier, which is not installed.
    """
    minified = SCRIPT is None and config.code_form != "plain"
    if minified and importlib.util.find_spec("python_minifier") is None:
        raise UserError(
            f"code_form: {config.code_form} needs python-minifier, which is not installed: pip install 'python-minifier>=3', or set "
            "CODE_FORM=plain"
        )
