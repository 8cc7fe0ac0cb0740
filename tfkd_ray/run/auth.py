"""The token that the processes of a Ray cluster know each other by. Never printed, never given to a job. No Ray."""

import os
import secrets
import tempfile
from pathlib import Path

from tfkd_ray.settings.errors import ConfigError


def token_file() -> Path:
    """Where the token is, or would be."""
    return Path(
        os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token"
    ).expanduser()


def token() -> str | None:
    """The token, as Ray finds it: RAY_AUTH_TOKEN, or a file. None: there is none."""
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given
    try:
        return token_file().read_text().strip() or None
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not text"
        raise ConfigError(
            f"{token_file()}: Ray's token cannot be read: {reason}; set RAY_AUTH_TOKEN"
        ) from None


def own_token() -> None:
    """Make the token, unless there is one; nobody else may read it. A ConfigError where it cannot be kept."""
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    path = token_file()
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if not path.exists() or not path.stat().st_size:  # empty: whoever made it was stopped
            _make(path)
        path.chmod(0o600)  # one that Ray made is readable for all
    except OSError as error:
        raise ConfigError(
            f"{path}: Ray's token cannot be kept there: {error.strerror}; set RAY_AUTH_TOKEN"
        ) from None


def _make(path: Path) -> None:
    """Write a token, whole from the moment that it is there; of two at once, both have the first one's."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".auth_token-")  # mode 600
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32))
    try:
        if path.exists() and not path.stat().st_size:
            path.unlink()
        os.link(name, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)
