"""The commented manifest that `falctl init` writes: made from the model, so that it never lies."""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel

from fal_contract.config import describe
from fal_contract.manifest import AppManifest

# What a new app usually sets; everything else stands there as a comment with its default.
_SET: Final = {"model": '"{name}"', "num_gpus": "1", "min_concurrency": "1"}


def app_template(name: str) -> str:
    """TOML text of a manifest for app `name`, every key documented."""
    top: list[str] = [f"# {name}: what `falctl app apply` deploys. Commented keys show their defaults.", ""]
    tables: dict[str, list[str]] = {}
    for key in describe(AppManifest):
        table, _, leaf = key.path.rpartition(".")
        lines = top if not table else tables.setdefault(table, [])
        if _is_table_itself(key.path):
            continue
        lines.append(f"# {key.help} ({key.type})")
        if key.path == "name":
            lines.append(f'name = "{name}"')
        elif key.path in _SET:
            lines.append(f"{leaf} = {_SET[key.path].format(name=name)}")
        else:
            lines.append(f"# {leaf} = {_toml(key.default)}")
        lines.append("")
    for table, lines in tables.items():
        top += [f"[{table}]", *lines]
    return "\n".join(top).rstrip() + "\n"


def _is_table_itself(path: str) -> bool:
    field = AppManifest.model_fields.get(path)
    annotation = field.annotation if field else None
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _toml(default: str) -> str:
    """A default as TOML: text is quoted already, `{}` and `[]` are legal as they are."""
    return default if default != "none" else '""'
