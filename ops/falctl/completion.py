"""`falctl completion SHELL`: the script that a shell sources."""

from __future__ import annotations

import sys
from typing import Annotated, Final

import typer

from fal_contract.errors import invalid

_SHELLS: Final = ("bash", "zsh", "fish")


def completion(shell: Annotated[str, typer.Argument(help="bash, zsh or fish.")] = "bash") -> None:
    """Print a completion script: `source <(falctl completion bash)`."""
    if shell not in _SHELLS:
        raise invalid("SHELL", shell, "has no completion", remedy=f"Use one of {', '.join(_SHELLS)}.")
    from typer._completion_shared import get_completion_script

    sys.stdout.write(get_completion_script(prog_name="falctl", complete_var="_FALCTL_COMPLETE", shell=shell) + "\n")
