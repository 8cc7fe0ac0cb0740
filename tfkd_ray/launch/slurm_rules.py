"""Rules for Slurm batch scripts."""

import re
from collections.abc import Iterator

from tfkd_ray.launch.clusterfile import LOOPBACK, ClusterFile, option, versions_in
from tfkd_ray.learn.config import DRIVER


def sbatch_lines(file: ClusterFile, name: str) -> int | None:
    found = re.search(rf"^#SBATCH\s+--{name}[=\s]\s*(?:[a-z0-9_-]+:)?(\d+)", file.text, re.M)
    return int(found[1]) if found else None


# --- Slurm ----------------------------------------------------------------------------------------


def slurm_problems(file: ClusterFile) -> Iterator[str]:
    text = "\n".join(line for line in file.text.splitlines() if not line.startswith("# "))
    start = re.search(r"\bray (symmetric-run|start)\b", text)
    if start is None:
        yield "ray symmetric-run: not there; the script must start Ray on all nodes, as clusters/slurm.sh does"
        return
    if not re.search(r"RAY_AUTH_MODE=[\"']?token\b", text[: start.start()]):
        yield "RAY_AUTH_MODE: no token; put before Ray starts: export RAY_AUTH_MODE=token"
    if re.search(r"RAY_AUTH_TOKEN=", text):
        yield "RAY_AUTH_TOKEN: a token does not belong in a file; put it in ~/.ray/auth_token"
    found = versions_in(text.splitlines())
    for what in ("ray", "torch"):
        if len(found[what]) != 1:
            got = " and ".join(sorted(found[what])) or "none"
            yield (
                f"{what}: name one exact version, and let the script check it, as clusters/slurm.sh does; got {got}"
            )
    host = option(text, "dashboard-host")
    if host is not None and host not in LOOPBACK:
        yield f"--dashboard-host: {host} lets others run code on the node; use 127.0.0.1"
    if not re.search(rf"--resources[=\s].*{DRIVER}\\?\"\s*:\s*[1-9]", text):
        yield f"--resources: the head lacks '{DRIVER}', which trials of several workers need; add: --resources='{{\"{DRIVER}\": 1000}}'"  # noqa: E501
    if start[1] == "symmetric-run":
        yield from _symmetric_problems(text)
    if not re.search(r"^#SBATCH\s+(--nodes|-N)", text, re.M):
        yield "#SBATCH --nodes: required, and not given"
    if not re.search(r"^#SBATCH\s+(--time|-t)", text, re.M):
        yield "#SBATCH --time: required, and not given; a sweep that hangs would hold its nodes for as long as Slurm allows"  # noqa: E501


def _symmetric_problems(text: str) -> Iterator[str]:
    """Yield a sentence for each option that `ray symmetric-run` needs and that the text lacks."""
    if not re.search(r"^#SBATCH\s+--exclusive", text, re.M):
        yield "#SBATCH --exclusive: required, and not given; when it ends, `ray symmetric-run` ends all of your Ray on its nodes"  # noqa: E501
    if not re.search(r"\bsrun\b[^&|;]*--cpus-per-task", text):
        yield "srun --cpus-per-task: required, and not given; since Slurm 22.05 srun does not take it from sbatch, and Ray would run on one core"  # noqa: E501
    if "--min-nodes" not in text:
        yield "--min-nodes: required, and not given; the sweep would begin before all nodes have joined"
