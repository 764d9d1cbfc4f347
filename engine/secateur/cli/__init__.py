"""The command line: each verb a thin layer over the library's functions."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Runs a verb. Exit codes: 0 done; 2 unusable arguments or input, in one line; 1 anything else."""
    # Advisory output of the libraries below would bury the one line that says what is wrong.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    import click

    from secateur.cli.verbs import app
    from secateur.errors import InputError

    try:
        app(standalone_mode=False)
    except InputError as error:
        _fail(str(error), 2)
    except click.UsageError as error:
        _fail(error.format_message(), 2)
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted", 130)
    except OSError as error:
        _fail(f"{error.filename or 'out'}: {error.strerror or error}", 1)


def _fail(message: str, code: int) -> None:
    print("secateur: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)
