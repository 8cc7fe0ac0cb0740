"""The token of a Ray cluster. It is never printed and never given to a job. No Ray is imported."""

import os
import secrets
import tempfile
from pathlib import Path

from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.files import expanded, opened


def token_file() -> Path:
    """Return the path of the token file, whether or not the file exists."""
    return expanded(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token")


def token() -> str | None:
    """Return the token that Ray would use (RAY_AUTH_TOKEN, or a file), or None."""
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given
    return token_in(token_file())


MOST_TOKEN_BYTES = 2**16
"""Most bytes of a token's file; ours has 64."""


def token_in(path: Path) -> str | None:
    """Return the token in a file; None if the file is missing or empty."""
    try:
        with opened(path) as file:
            content = file.read(MOST_TOKEN_BYTES + 1)
        if len(content) > MOST_TOKEN_BYTES:
            raise ConfigError(f"{path}: more than {MOST_TOKEN_BYTES} bytes are no token of Ray's")
        return content.decode().strip() or None
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not text"
        raise ConfigError(
            f"{path}: Ray's token cannot be read: {reason}; set RAY_AUTH_TOKEN"
        ) from None


def own_token() -> None:
    """Create the token if missing, readable by its owner only; raise ConfigError on failure."""
    if "RAY_AUTH_TOKEN" in os.environ or "RAY_AUTH_TOKEN_PATH" in os.environ:
        return
    path = token_file()
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if not path.exists() or not path.stat().st_size:  # empty: its writer was interrupted
            _make(path)
        path.chmod(0o600)  # Ray creates the file readable by everyone
    except OSError as error:
        raise ConfigError(
            f"{path}: Ray's token cannot be kept there: {error.strerror}; set RAY_AUTH_TOKEN"
        ) from None


def _make(path: Path) -> None:
    """Write a token atomically; if two processes do it at once, both get the first one's token."""
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
