"""The size of a submission's code, which counts against the cap with the model."""

from __future__ import annotations

import importlib.util

from train.common.errors import UserError
from train.config import Config
from train.single_file.sources import SCRIPT, read_source


def counted_code_bytes(config: Config) -> int:
    """Bytes of code that count against the cap with a run's model.

    A packed script counts itself. A run from sources counts the train_gpt.py that it would be packed into, in the form
    `config.code_form`.

    Raises:
        UserError: see `check_code_form`.
    """
    check_code_form(config)
    if SCRIPT is not None:
        return len(read_source(SCRIPT))
    # not part of a packed script
    from train.single_file.pack import pack, script_settings

    return len(pack(config.recipe, script_settings(config), config.code_form))


def check_code_form(config: Config) -> None:
    """Find out now whether the code can be counted at the end.

    Raises:
        UserError: the form needs python-minifier, which is not installed.
    """
    minified = SCRIPT is None and config.code_form != "plain"
    if minified and importlib.util.find_spec("python_minifier") is None:
        raise UserError(
            f"code_form: {config.code_form} needs python-minifier, which is not installed: pip install 'python-minifier>=3', or set "
            "CODE_FORM=plain"
        )
