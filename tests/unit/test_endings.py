"""Why a container ended: the sentence for each way."""

from __future__ import annotations

import pytest

from fal_runtime.endings import Memory, Told, reason, victim_in


@pytest.mark.parametrize(
    ("code", "more", "said"),
    [
        (0, {}, "exited with code 0"),
        (3, {}, "exited with code 3"),
        (137, {}, "killed by SIGKILL (signal 9), not by us"),
        (139, {}, "killed by SIGSEGV (signal 11), not by us"),
        (255, {}, "exited with code 255"),
        (200, {}, "exited with code 200"),
        (None, {}, "exit code lost"),
        (0, {"told": Told(("SIGTERM",), 5)}, "stopped by us (SIGTERM): exited with code 0"),
        (137, {"told": Told(("SIGTERM", "SIGKILL"), 5)}, "stopped: SIGTERM was ignored for 5 s, then SIGKILL"),
        (137, {"told": Told(("SIGKILL",))}, "killed by us (SIGKILL)"),
        (
            137,
            {"memory": Memory(1, 256 << 20), "told": Told(("SIGKILL",))},
            "out of memory at its limit of 256.0 MiB: the kernel killed its main process",
        ),
        (137, {"memory": Memory(1, 0, "python3 (pid 77)")}, "out of memory: the kernel killed python3 (pid 77)"),
        (
            1,
            {"memory": Memory(3)},
            "out of memory: the kernel killed one of its processes (3 in all); it exited with code 1",
        ),
        (
            127,
            {
                "last_lines": [
                    "x",
                    "prog: error while loading shared libraries: libcuda.so.1: cannot open shared object",
                ]
            },
            "exited with code 127: shared library libcuda.so.1 is missing in the image",
        ),
        (
            127,
            {"last_lines": ["/bin/sh: 1: nvidia-smi: not found"]},
            "exited with code 127: nvidia-smi was not found in the image",
        ),
        (
            126,
            {"last_lines": ["exec /app/server: exec format error", ""]},
            "exited with code 126: its program is not for this machine's processor",
        ),
        (127, {"last_lines": ["whatever"]}, "exited with code 127"),
        (1, {"last_lines": ["sh: 1: x: not found"]}, "exited with code 1"),
    ],
)
def test_the_sentence(code: int | None, more: dict[str, object], said: str) -> None:
    assert reason(code, **more) == said  # type: ignore[arg-type]


def test_the_victim_is_the_last_one_of_this_control_group() -> None:
    kill = "6,1,2,-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset={},mems_allowed=0,oom_memcg={},"
    kill += "task_memcg={},task={},pid={},uid=0\n"
    text = kill.format("a", "/falctl/x", "/falctl/x", "python3", 7) + kill.format(
        "b", "/falctl/xy", "/falctl/xy", "other", 8
    )
    assert victim_in(text, "/falctl/x") == "python3 (pid 7)"
    assert victim_in(text + kill.format("c", "/falctl/x", "/falctl/x", "sh", 9), "/falctl/x") == "sh (pid 9)"
    assert victim_in("nothing", "/falctl/x") == ""
