"""The token that the processes of a Ray cluster know each other by. Never printed, never given to a job. No Ray."""

import os
import secrets
from pathlib import Path

from tfkd_ray.schema import ConfigError


def token_file() -> Path:
    """Where the token is, or would be."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token").expanduser()


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
        raise ConfigError(f"{token_file()}: Ray's token cannot be read: {reason}; set RAY_AUTH_TOKEN") from None


def own_token() -> None:
    """Make the token, unless there is one; nobody else may read it."""
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    path = token_file()
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if not path.exists():
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
        path.chmod(0o600)  # one that Ray made is readable for all
    except OSError as error:
        raise ConfigError(f"{path}: Ray's token cannot be kept there: {error.strerror}; set RAY_AUTH_TOKEN") from None
