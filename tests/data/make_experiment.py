"""Makes tests/data/0.1.0: a real sweep of digits with its teacher, as this release writes it, without machine's names.

    python tests/data/make_experiment.py tests/data/0.1.0

Once for each release that changes what is on disk; those that are there stay as they are. Ray's own files are left
out, as are the files of the driver, which is gone: neither is needed to read an experiment, or to go on with it.
"""

import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

SPACE = """
student: {name: mlp, hidden: [8]}
teacher: {model: {name: mlp, hidden: [8]}, epochs: 2}
epochs: 3
objective:
  - {name: kd, alpha: {low: 0.1, high: 0.9}, temperature: {low: 1, high: 8, log: true}}
  - {name: tfkd_reg, alpha: {low: 0.1, high: 0.9}}
  - ce
  - lsr
optim: {lr: {low: 0.02, high: 0.3, log: true}}
search: {num_samples: 8, max_concurrent: 1}
"""


def main(storage: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "small.yaml").write_text(SPACE)
        run = "import sys; sys.argv[0] = 'tfkd'; from tfkd_ray.cli import main; sys.exit(main())"
        command = [
            sys.executable,
            "-c",
            run,
            "tune",
            "small.yaml",
            "--name",
            "sweep",
            "--storage",
            "made",
        ]
        subprocess.run(command, cwd=folder, check=True)
        made = Path(folder) / "made"
        for path in [
            *made.rglob("*.lock"),
            *made.rglob("driver.txt"),
            *made.glob("sweep/trials/*"),
        ]:
            if path.is_file():
                path.unlink()
        for path in made.rglob("events.out.tfevents*"):
            path.rename(path.with_name(path.name.replace(socket.gethostname(), "host")))
        here = (folder.encode(), str(Path(__file__).parent.parent.parent).encode())
        named = [
            p
            for p in made.rglob("*")
            if p.is_file() and any(word in p.read_bytes() for word in here)
        ]
        assert not named, named
        shutil.copytree(made, storage, symlinks=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
