"""Sweeps as Ray jobs: the files to send, the files to leave out, and the cluster's answers.

A job gets a copy of the working directory without data, results, keys and other secrets, and this
package. Everyone who reaches the dashboard can read the job's command, so it must contain no
secret. Neither Ray nor torch is imported.
"""

import fnmatch
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tfkd_ray.run.auth import token
from tfkd_ray.settings.errors import ConfigError, Unreachable
from tfkd_ray.settings.own_code import JOB_FOLDER, PACKAGE
from tfkd_ray.settings.yaml import Tree, text_of

LEFT_OUT = (
    # secrets
    ".env", ".env.*", "*.pem", "*.key", "*.p12", "id_rsa*", "id_ecdsa*", "id_ed25519*", "auth_token", "*credentials*",
    ".netrc", ".npmrc", ".pypirc", ".aws", ".azure", ".config", ".docker", ".gnupg", ".kube", ".ray", ".ssh",
    "*service*account*.json",
    # data and results: they are on the cluster's storage
    "data", "dataset", "datasets", "tfkd_results", "*.tar", "*.tar.*", "*.tgz", "*.zip", "*.gz", "*-ubyte", "*.npy",
    "*.npz", "*.h5", "*.parquet", "*.safetensors", "*.pt", "*.pth", "*.ckpt", "*.onnx", "events.out.tfevents*",
    # rebuilt on the cluster
    ".git", ".venv", "venv", "node_modules", "__pycache__", "*.pyc", "*.egg-info", ".*_cache", "build", "dist",
)  # fmt: skip
"""Patterns of files and folders that a job does not get; `.rayignore` adds more, one a line."""

WORKING = "working_directory"
"""Name of the working directory's copy, if it is not the job's folder itself."""

LIMIT_MB = 100
"""Maximum size of a working directory; it is code, and passes through the head's memory."""

JOBS_TIMEOUT_S = 10
"""Maximum time for a head to answer."""


def stage(folder: Path, into: Path, extra: Path | None = None) -> str | None:
    """Copy a job's files from `folder`; return the name that `extra` has in the copy.

    The copy includes this package, so that the cluster runs the version that submitted the job.
    """
    patterns = [*LEFT_OUT, *_ignored(folder)]
    files = list(_kept_in_job(folder, patterns))
    size = sum(path.lstat().st_size for path in files)
    if size > LIMIT_MB * 10**6:
        largest = sorted(files, key=lambda path: -path.lstat().st_size)[:3]
        shown = ", ".join(
            f"{p.relative_to(folder)} ({p.lstat().st_size / 10**6:.0f} MB)" for p in largest
        )
        raise ConfigError(
            f"a job gets a copy of the working directory, and {size / 10**6:.0f} MB exceed the limit of {LIMIT_MB} MB: "
            f"{shown}; list what is not code in .rayignore, or start in the folder of your search space",
            folder,
        )
    for path in files:
        there = into / path.relative_to(folder)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, there)
    package = Path(__file__).parent.parent
    leave = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, into / package.name, dirs_exist_ok=True, ignore=leave)
    if extra is None:
        return None
    if extra.absolute().is_relative_to(folder) and extra.absolute() in files:
        return str(extra.absolute().relative_to(folder))
    shutil.copyfile(extra, into / extra.name)
    return extra.name


def stage_apart(folder: Path, into: Path, extra: Path | None = None) -> str | None:
    """Copy as `stage` does, with the working directory below `into` and this package beside it.

    Ray puts `into` first on the module path of a job: files in the working directory are not
    imported by accident.
    """
    (into / WORKING).mkdir()
    sent = stage(folder, into / WORKING, extra)
    (into / WORKING / PACKAGE.name).rename(into / PACKAGE.name)
    return sent


def _ignored(folder: Path) -> list[str]:
    file = folder / ".rayignore"
    lines = text_of(file).splitlines() if os.path.lexists(file) else []
    return [line.strip().strip("/") for line in lines if line.strip() and not line.startswith("#")]


def _kept_in_job(folder: Path, patterns: Sequence[str]) -> Iterator[Path]:
    """Yield the files below a folder that no pattern matches, without links."""
    for where, folders, names in os.walk(folder):
        here = Path(where)

        def out(name: str, here: Path = here) -> bool:
            inside = str((here / name).relative_to(folder))
            return (here / name).is_symlink() or any(
                fnmatch.fnmatch(name, p) or fnmatch.fnmatch(inside, p) for p in patterns
            )

        folders[:] = sorted(name for name in folders if not out(name))
        files = (here / name for name in sorted(names) if not out(name))
        yield from (path for path in files if path.is_file() and not _is_secret(path))


def _is_secret(path: Path) -> bool:
    """Return True if a file is a private key or the cluster's token, whatever its name."""
    try:
        with path.open("rb") as file:
            begin = file.read(256)
    except OSError:
        return True
    return b"PRIVATE KEY-----" in begin or begin.strip() == (token() or "-").encode()


def as_entrypoint(words: Sequence[str], folder: Path) -> list[str]:
    """Return a command for `ray job submit`; a script protects words from its shell."""
    if shlex.join(words) == " ".join(words):
        return list(words)
    (folder / "tfkd_job.sh").write_text(f"exec {shlex.join(words)}\n", encoding="utf-8")
    return ["bash", "tfkd_job.sh"]


def submit_command(
    address: str, job: str, folder: Path, entrypoint: Sequence[str], working: str | None = None
) -> list[str]:
    """Return the command that submits a staged folder; `working` as of `stage_apart`."""
    versions = (
        {}
        if os.environ.get(SUBMITTED_FROM) == "any"
        else {SUBMITTED_FROM: json.dumps(versions_here())}
    )
    env = {"env_vars": {**versions, **({JOB_FOLDER: working} if working else {})}}
    return ["ray", "job", "submit", "--address", address, "--submission-id", job, "--working-dir", str(folder),
            "--runtime-env-json", json.dumps(env), "--no-wait", "--", *entrypoint]  # fmt: skip


# --- the cluster's answers ------------------------------------------------------------------------


def ask(address: str, path: str, timeout: float = JOBS_TIMEOUT_S) -> Any:
    """Return a dashboard's answer as JSON; raise Unreachable, or ConfigError for a wrong token."""
    key = token()
    request = urllib.request.Request(address.rstrip("/") + path)
    if key:
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            request, timeout=timeout
        ) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise ConfigError(_token_problem(address, key)) from None
        raise Unreachable(
            f"{address} responds, but not as a Ray head: {error.code} {error.reason}"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise Unreachable(
            f"no Ray head answers at {address} within {timeout:g} s ({reason}); check that it is up and that the "
            "tunnel is open"
        ) from None


def _token_problem(address: str, key: str | None) -> str:
    where = "copy the head's ~/.ray/auth_token here (mode 600), or set RAY_AUTH_TOKEN_PATH"
    if key is None:
        return f"{address} requires a token, and there is none here; {where}"
    return f"{address} rejects the token that is here: it is another cluster's; {where}"


def check_ray_version(address: str) -> None:
    """Raise if the cluster does not answer or its Ray version differs from this machine's."""
    there, here = (
        str(ask(address, "/api/version").get("ray_version")),
        importlib.metadata.version("ray"),
    )
    if there != here:
        raise ConfigError(
            f"Ray {there} runs on the cluster at {address}, and {here} is installed here; make them equal: "
            f"pip install 'ray[default,train,tune]=={there}', or pin ray=={here} in the cluster file"
        )


def jobs_at(address: str) -> list[Tree]:
    """Return submitted jobs, the newest first."""
    found = [job for job in ask(address, "/api/jobs/") if job.get("submission_id")]
    return sorted(found, key=lambda job: -(job.get("start_time") or 0))


# --- equal versions -------------------------------------------------------------------------------

SUBMITTED_FROM = "TFKD_SUBMITTED_FROM"
"""Environment variable with the versions of the machine that submitted a job."""


def versions_here() -> dict[str, str]:
    """Return the versions that must be equal on both sides for results to be equal."""
    found = {
        name: importlib.metadata.version(name).partition("+")[0]
        for name in ("ray", "torch", "optuna")
    }
    return {"python": ".".join(platform.python_version_tuple()[:2]), **found}


def check_submitted_from() -> None:
    """In a job, raise if the submitting machine's versions differ from the cluster's."""
    if os.environ.get(SUBMITTED_FROM, "any") == "any":
        return
    there, here = json.loads(os.environ[SUBMITTED_FROM]), versions_here()
    if there != here:
        differ = ", ".join(f"{name} {there.get(name)} there and {here[name]} here" for name in here
                           if there.get(name) != here[name])  # fmt: skip
        raise ConfigError(
            f"this job was submitted from a machine with other versions than the cluster ({differ}), so its results "
            f"would differ from those of a run there; make the versions equal, or submit with {SUBMITTED_FROM}=any set"
        )
