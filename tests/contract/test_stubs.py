"""The generated stubs in the repository are those of the protos, and every message and field is documented."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROTOS = ROOT / "proto" / "fal_contract" / "v1"
_DECLARATION = re.compile(r"^\s*(message|enum|rpc|service|oneof|(repeated |optional )?[\w.<>, ]+ \w+ = \d+)")


def test_regenerating_changes_nothing() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "ops" / "genproto.py"), "--check"],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def _undocumented(text: str) -> list[str]:
    """Declarations without a comment above them; fields of one group may share the comment above the first."""
    bare, documented = [], False
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("//"):
            documented = True
        elif _DECLARATION.match(line):
            if not documented:
                bare.append(stripped)
            documented = documented and ("=" in stripped or stripped.startswith("oneof"))  # one comment for a group
        else:
            documented = False
    return bare


def test_every_declaration_is_documented() -> None:
    bare = {path.name: found for path in sorted(PROTOS.glob("*.proto")) if (found := _undocumented(path.read_text()))}
    assert not bare


def test_the_check_sees_an_undocumented_field() -> None:
    assert _undocumented("// A.\nmessage A {\n  // b.\n  string b = 1;\n\n  string c = 2;\n}\n") == ["string c = 2;"]
