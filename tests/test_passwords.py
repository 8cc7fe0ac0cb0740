"""Passwords in URLs: an unusual one appears in no file and no output."""

import json
import os
import pickle
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest
from sqlalchemy.engine import make_url

from tfkd_ray.cli.main import main
from tfkd_ray.cli.terminal import check_names
from tfkd_ray.run.connect import _check_answers
from tfkd_ray.run.searcher import OptunaSearcher
from tfkd_ray.run.studies import open_storage, whole_url
from tfkd_ray.settings.errors import ConfigError
from tfkd_ray.settings.passwords import masked, masked_words, without_secrets
from tfkd_ray.space.arms import load_arms
from tfkd_ray.space.space import build_space, load_space
from tfkd_ray.store.storage import storage_at

CANARY = "kanari"
ODD = {
    "plain": CANARY, "blank": f"{CANARY} {CANARY}", "at": f"{CANARY}@{CANARY}", "slash": f"{CANARY}/{CANARY}",
    "colon": f"{CANARY}:{CANARY}", "percent": f"{CANARY}%{CANARY}", "hash": f"{CANARY} #{CANARY}",
    "question": f"{CANARY}?{CANARY}", "plus": f"{CANARY}+{CANARY}", "unicode": f"{CANARY}ü€{CANARY}",
    "encoded": quote(f"@{CANARY}/", safe=""), "quote": f"{CANARY}'\"{CANARY}", "brace": f"{CANARY}}}, {{{CANARY}",
    "at, slash, question": f"{CANARY}@{CANARY}/{CANARY}?{CANARY}@{CANARY}", "and": f"{CANARY}&{CANARY}",
    "scheme": f"{CANARY}://{CANARY}@{CANARY}", "numbers first": f"12 {CANARY}", "a port and a path": f"12/{CANARY}",
}  # fmt: skip
URLS = {
    "user": "postgresql://me:{}@127.0.0.1:1/db", "user and query": "postgresql://me:{}@127.0.0.1:1/db?x=1",
    "query": "postgresql://127.0.0.1:1/db?user=me&password={}", "no port": "postgresql://127.0.0.1/db?PassWord={}",
    "ssl": "postgresql://127.0.0.1/db?sslpassword={}&x=1", "coded key": "postgresql://127.0.0.1/db?pass%77ord={}",
    "odbc": "mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3D{}", "bucket": "s3://key:{}@bucket/prefix",
    "endpoint": "gs://bucket/prefix?access_key=a&secret_key={}", "proxy": "http://me:{}@proxy:3128",
    "address": "ray://me:{}@head:10001", "word": "search.storage=postgresql://me:{}@host/db", "signed":
    "https://bucket/x?X-Amz-Credential={}&X-Amz-Signature={}", "fragment": "https://host/x#access_token={}", "sas":
    "az://c/p?sas={}", "jwt": "https://host/x?jwt={}", "auth": "https://host/x?auth={}", "pw": "postgresql://h/db?pw={}",
    "private key": "s3://bucket?private_key={}", "dsn": "postgresql:///?dsn=host%3Dh%20password%3D{}", "options":
    "postgresql://h/db?options=-c%20password%3D{}", "libpq": "host=h user=me password={}",
    "semicolon for the colon": "postgresql://me;{}@127.0.0.1:5432/db", "parameter": "postgresql://h/db;user=me;pwd={}",
    "full-width colon": "mysql+pymysql://me：{}@h/db", "coded colon": "postgresql://me%3A{}@h/db", "bar": "s3://me|{}@b",
    "code": "https://h/cb?x=1&code={}", "passwd": "mysql://h/db?passwd={}", "pin": "https://h/x?pin={}", "otp":
    "https://h/x?otp={}", "session": "https://h/x?sessionid={}", "ticket": "https://h/x#ticket={}", "coded blank":
    "https://h/x?api%20key={}", "key": "https://h/x?subscription-key={}", "saml": "https://h/x?SAMLResponse={}",
    "creds": "https://h/x?creds={}", "cookie": "https://h/x?cookie={}", "hmac": "https://h/x?hmac={}",
    "verifier": "https://h/x?oauth_verifier={}", "refresh": "https://h/x?refresh={}", "psw": "mysql://h/db?psw={}",
}  # fmt: skip
MISSPELT = {
    "one slash": "postgresql:/me:{}@h/db", "no slash": "postgresql:me:{}@h/db", "no colon": "postgresql//me:{}@h/db",
    "backslashes": "postgresql:\\\\me:{}@h/db", "no scheme": "me:{}@h/db", "slashes alone": "//me:{}@h/db",
    "colon first": "://me:{}@h/db", "semicolon": "postgresql;//me:{}@h/db", "blank": "postgresql ://me:{}@h/db",
    "port": "postgresql://me:{}@h:port/db", "no host": "postgresql://me:{}", "libpq": "host=h password={}",
    "driver": "postgresql+psycopg2:/me:{}@h/db", "token": "{}@h",
}  # fmt: skip


@pytest.mark.parametrize("url", URLS.values(), ids=URLS)
def test_no_part_of_an_odd_password_is_shown(url: str) -> None:
    shown = []
    for password in ODD.values():
        whole = url.replace("{}", password)
        once = masked(whole)
        within = masked(f"search={{storage: '{whole}', num_samples: 3}}")
        if CANARY in once + within or masked(once) != once or "***" not in once:
            shown.append(whole)
    assert shown == []


@pytest.mark.parametrize("password", ODD.values(), ids=ODD)
def test_what_sqlalchemy_takes_for_the_password_is_masked(password: str) -> None:
    for url in (
        "postgresql://me:{}@host:5432/db",
        "postgresql://a@b:{}@host/db?x=y@z",
        "mysql://:{}@host",
    ):
        theirs = make_url(url.replace("{}", password).replace(CANARY, "kanari", 1)).password
        assert theirs and str(theirs) not in masked(url.replace("{}", password))


@pytest.mark.parametrize(
    "url",
    ["postgresql://me@host:5432/db", "sqlite:////home/me:x@y/a.db", "http://127.0.0.1:8265/x", "http://[::1]:8265",
     "postgresql://me:@host/db", "gs://bucket/a@b", "postgresql://h/db?sslmode=require&ssl_key=/c&client_encoding=utf8",
     "postgresql://me%40tenant@h/db", "gs://bucket/a;b@c", "http://h:8265;", "oracle://h/db?encoding=x&service_name=y", "postgresql://host/db?passfile=/a/b&sslkey=/c", "a:b@c"],
)  # fmt: skip
def test_a_url_without_a_password_stays_as_it_is(url: str) -> None:
    assert masked(url) == url == masked_words(url)


@pytest.mark.slow
@pytest.mark.parametrize("url", MISSPELT.values(), ids=MISSPELT)
def test_a_url_that_is_misspelt_is_told_without_its_password(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = url.replace("{}", CANARY)
    monkeypatch.setenv("TFKD_STORAGE", url)
    acts = {
        "space": lambda: build_space({"objective": "ce", "search": {"storage": url}}),
        "settings": lambda: build_space({"objective": "ce", "search": {"storage": {"url": url}}}),
        "override": lambda: load_space("digits_tfkd", [f"search.storage={url}"]),
        "override of nothing": lambda: load_space("digits_tfkd", [f"search.storag={url}"]),
        "arms": lambda: load_arms("digits_arms", [f"data.root={{url: {url!r}}}"]),
        "quick check": lambda: check_names(
            Namespace(verb="tune", file="digits_tfkd", overrides=[f"search.storag={url}"])
        ),
        "database": lambda: open_storage(url),
        "environment": lambda: whole_url("postgresql://me:***@host/other"),
        "address": lambda: _check_answers(url),
    }
    said = {}
    for name, act in acts.items():
        try:
            said[name] = repr(act())
        except ConfigError as error:
            said[name] = str(error)
    assert [name for name, text in said.items() if CANARY in text] == []


@pytest.mark.parametrize("token", [CANARY, f"{CANARY}@{CANARY}", f"{CANARY}%2F{CANARY}"])
def test_a_lone_user_of_http_is_a_token(token: str) -> None:
    for url in (f"http://{token}@head:8265", f"https://{token}@host/a/b?x=1"):
        assert CANARY not in masked(url) + masked_words(f"see {url}, please")
    assert masked("https://host/@me") == "https://host/@me"


def test_a_word_after_the_colon_that_is_no_port_is_hidden() -> None:
    """A shell or YAML may cut a password in two."""
    assert masked("postgresql://me:kanari") == "postgresql://me:***"


def test_a_sentence_keeps_its_words() -> None:
    said = "no answer from http://127.0.0.1:8265, as me@host; try postgresql://me:kanari@host/db, please"
    assert masked_words(said) == said.replace("kanari", "***")
    keys = (
        "connection host=h password = 'kan ari' refused; PWD=kanari;Server=h set sslmode = require"
    )
    told = "connection host=h password = *** refused; PWD=*** set sslmode = require"
    assert masked_words(keys) == told == masked_words(told)


@pytest.mark.parametrize("password", ODD.values(), ids=ODD)
def test_what_a_database_says_holds_no_password_in_any_spelling(password: str) -> None:
    url = f"postgresql://me:{password}@host/db"
    for spelt in (
        password,
        quote(password),
        quote(password, safe=""),
        quote_plus(password),
        repr(password),
    ):
        assert CANARY not in without_secrets(f"cannot log in with {spelt}: no", [url])
    assert (
        CANARY not in without_secrets(f"no host {password.rpartition('@')[2]!r}", [url])
        or "@" not in password
    )


def test_a_password_with_an_at_is_refused_before_it_is_half_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = "postgresql://me:kanari@kanari@host/db"
    with pytest.raises(ConfigError, match="write an @ in it as %40") as error:
        build_space({"objective": "ce", "search": {"storage": url}})
    assert CANARY not in str(error.value)
    monkeypatch.setenv("TFKD_STORAGE", url)
    with pytest.raises(ConfigError, match="write an @ in it as %40"):
        whole_url(masked(url))


@pytest.mark.parametrize("password", ODD.values(), ids=ODD)
def test_no_error_message_and_no_pickle_holds_it(password: str, tmp_path: Path) -> None:
    said = []
    url = f"postgresql+pg8000://me:{password}@127.0.0.1:1/db"
    for given in ([url], {"url": url}, url):
        for tree in (
            {"search": {"storage": given}},
            {"search": url},
            {"epochs": url},
            {"data": url},
            {"student": [url]},
        ):
            try:
                space = build_space({"objective": "ce", **tree})
                said.append(repr(space) + json.dumps(space.tree))
                searcher = OptunaSearcher(space, tmp_path / "journal")
                said.append(pickle.dumps(searcher).decode("latin-1"))
                searcher.remaining()
            except ConfigError as error:
                said.append(str(error))
    for run in (
        lambda: load_space("digits_tfkd", [url]), lambda: load_space("digits_tfkd", [f"serch.storage={url}"]),
        lambda: storage_at(f"s3://me:{password}@bucket"), lambda: open_storage(url),
        lambda: load_space("digits_tfkd", [f"search={{storage: [{json.dumps(url)}]}}"]),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as wrong:
            run()
        said.append(str(wrong.value))
    assert [text for text in said if CANARY in text] == [] and len(said) > 15


@pytest.mark.parametrize(
    "words",
    [
        ["{}"],
        ["tune", "digits_tfkd", "--study-store={}"],
        ["status", "--{}"],
        ["tune", "--seeds", "{}"],
    ],
)
def test_a_wrong_command_line_is_told_without_it(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for password in ODD.values():
        given = [word.replace("{}", f"postgresql://me:{password}@host/db") for word in words]
        try:
            assert main(given) == 2
        except SystemExit as error:
            assert error.code == 2
    told = capsys.readouterr()
    assert "error" in told.err and CANARY not in told.out + told.err


def test_the_command_line_of_a_driver_holds_no_password_and_still_means_the_same(
    tmp_path: Path,
) -> None:
    """The restarted process gets all words, and hides them from everyone, its children included."""
    words = ["a b"]
    for name in ("blank", "hash", "quote", "brace", "unicode", "encoded"):
        words += ["--study-storage", f"postgresql://me:{ODD[name]}@host/db"]
    code = (
        "import json, os, subprocess, sys; from pathlib import Path; from tfkd_ray.cli.main import _given_words; words = _given_words(); "
        "print(json.dumps([words, Path('/proc/self/cmdline').read_text(), sys.argv, "
        "subprocess.run(['env'], capture_output=True, text=True).stdout]))"
    )
    env = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=env, check=True
    )
    given, shown, argv, env_below = json.loads(done.stdout)
    assert (
        given == words
        and CANARY not in shown + env_below + " ".join(argv)
        and shown.count("***") == 6
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    [
        "a",
        "://",
        "a://",
        "a://b:",
        "a://b:c",
        "?pass=",
        "&a",
        "a://u?pass=",
        "a://u?&pass=&",
        "@",
        "a://@",
    ],
)
def test_a_long_text_is_looked_through_once(part: str) -> None:
    """Time is linear in the text: a search from each letter took a minute, or would."""
    for text in (part * (200_000 // len(part)), "a://u?" + part * (200_000 // len(part))):
        start = time.process_time()
        masked(text)
        masked_words(text)
        assert time.process_time() - start < 2
