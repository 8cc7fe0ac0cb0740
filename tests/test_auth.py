"""The token file: created once, atomically, and private."""

import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tfkd_ray.run.auth import own_token, token
from tfkd_ray.settings.errors import ConfigError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    before = os.umask(0o022)
    yield tmp_path
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_token_is_made_once_and_for_its_owner_alone(home: Path) -> None:
    file = home / ".ray/auth_token"
    own_token()
    made = file.read_text()
    assert len(made) == 64 and int(made, 16) and token() == made
    assert mode(file) == 0o600 and mode(file.parent) == 0o700
    own_token()
    assert file.read_text() == made and [path.name for path in file.parent.iterdir()] == [
        "auth_token"
    ]


def test_a_token_that_others_could_read_is_kept_and_closed(home: Path) -> None:
    file = home / ".ray/auth_token"
    file.parent.mkdir()
    file.write_text("of-ray")
    file.chmod(0o644)
    own_token()
    assert file.read_text() == "of-ray" and mode(file) == 0o600


def test_an_empty_token_is_made_anew(home: Path) -> None:
    file = home / ".ray/auth_token"
    file.parent.mkdir()
    file.touch()
    own_token()
    assert token() == file.read_text() and len(file.read_text()) == 64 and mode(file) == 0o600


def test_many_at_once_have_one_token(home: Path) -> None:
    seen = []

    def make() -> None:
        own_token()
        seen.append(token())

    threads = [threading.Thread(target=make) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 16 and len(set(seen)) == 1 and seen[0]


@pytest.mark.parametrize(
    "name, value", [("RAY_AUTH_TOKEN", "x"), ("RAY_AUTH_TOKEN_PATH", "/nowhere/token")]
)
def test_a_token_that_is_named_elsewhere_is_not_made(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    own_token()
    assert not (home / ".ray").exists()


def test_a_place_where_no_token_can_be_kept_is_said(home: Path) -> None:
    (home / ".ray").write_text("a file")
    with pytest.raises(
        ConfigError, match=r"auth_token: Ray's token cannot be kept there: .*; set RAY_AUTH_TOKEN"
    ):
        own_token()
