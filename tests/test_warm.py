"""Processes that begin with their imports behind them behave as new ones (tests/warm.py)."""

import os
import signal
import subprocess
from pathlib import Path

SCRIPT = """
import os, signal, sys
print(sys.argv[1:], os.environ["MINE"], os.getcwd(), "torch" in sys.modules, sys.stdin.read())
print("said", file=sys.stderr)
if sys.argv[1] == "killed":
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(3)
"""


def test_a_process_has_its_own_words_streams_environment_directory_and_end(
    warm: list[str], tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    for how, code in (("ends", 3), ("killed", -signal.SIGKILL)):
        run = subprocess.run(
            [*warm, "-m", "script", how], cwd=tmp_path, env={**os.environ, "MINE": how},
            input="typed", capture_output=True, text=True, timeout=110,
        )  # fmt: skip
        assert run.returncode == code
        assert run.stdout == f"['{how}'] {how} {tmp_path} True typed\n" and run.stderr == "said\n"


def test_a_process_ends_with_the_command_that_began_it(warm: list[str], tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(
        "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(100)"
    )
    with subprocess.Popen([*warm, "-m", "script"], cwd=tmp_path, stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        pid = int(run.stdout.readline())
        assert pid != run.pid and Path(f"/proc/{pid}").exists()
        run.kill()
        assert run.stdout.read() == b"", "it has closed the stream"


IDS = """
import random, threading, uuid
import numpy, ray
drawn = [random.random(), numpy.random.rand(), uuid.uuid4(), ray.NodeID.from_random()]
thread = threading.Thread(target=lambda: drawn.append(ray.NodeID.from_random()))
thread.start()
thread.join()
print(*drawn)
"""


def test_no_two_processes_draw_the_same_numbers_or_ids(warm: list[str], tmp_path: Path) -> None:
    """Ray's placement groups would be taken for one another."""
    (tmp_path / "script.py").write_text(IDS)
    command = [*warm, "-m", "script"]
    told = [subprocess.check_output(command, cwd=tmp_path, text=True) for _ in range(3)]
    drawn = [word for line in told for word in line.split()]
    assert len(drawn) == len(set(drawn)) == 15, drawn
