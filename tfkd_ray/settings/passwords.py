"""Passwords in URLs: find them, and mask them in a URL or a sentence.

A password is the part that SQLAlchemy's parser reads as one. It extends to the last @, because users
forget to percent-encode odd passwords. Another sign than a colon may separate it from the user. In a
query, the value of every key whose name suggests a secret is a password.
"""

import re
from collections.abc import Iterable
from urllib.parse import quote, quote_plus, unquote, unquote_plus

HIDDEN = "***"
FIRST_AT = (
    "its password ends at the first @; write an @ in it as %40, and / ? # % as %2F %3F %23 %25"
)
_START = re.compile(r"[A-Za-z][\w+.-]*://")
_SCHEMES = (
    "postgresql|postgres|mysql|mariadb|oracle|mssql|cockroachdb|redis|sqlite|s3|gs|ray|https?"
)
# The scheme's end alone: matching all of it takes quadratic time in a long word. A scheme may be
# written wrongly: without its slashes or its colon, or with backslashes.
_SCHEME = re.compile(
    r"://|(?<![^\s'\"=])//(?!/)"
    rf"|\b(?:{_SCHEMES})(?:\+\w{{1,30}})?(?:;?//(?!/)|:/(?!/)|:\\{{1,4}}|:(?![\\/\s]))"
)
_USER = re.compile(r"[^:/]*:")
_SLIP = re.compile(r"[^:/?#@]*?(?:[;|\s\uff1a\uff1b\ufe55\ufe13]|%3[ab])", re.I)  # for the colon
_PORT = re.compile(r"\d*(?![^/?#\s'\"\]}),;.])")
_HTTP_USER = re.compile(r"(?<=http://|ttps://)[^\s/?#:]+(?=@)")  # a lone user is a token there
_KEY = re.compile(r"[?&;#]([^?&;#=\s]+)=")
_NEXT_KEY = re.compile(r"[&;][^?&;=\s]+=")
_PAIR = re.compile(r"(?<![\w?&;#.-])\w{0,40}(?:password|passwd|pwd)\s*=\s*(?=\S)", re.I)  # libpq
_PAIR_IN_TEXT = re.compile(
    rf"({_PAIR.pattern})('(?:[^'\\]|\\.)*'|\"[^\"]*\"|[^\s;'\"]+)", re.I | re.S
)
_SECRET = re.compile(
    r"pass(?!file)|pwd|psw|secret|token|cred|signature|odbc_connect|authorization|authentication"
    r"|bearer|jwt|saml|assertion|verifier|session|cookie|ticket|hmac|kennwort|contrase|licen[cs]e"
    r"|(api|access|account|private)[_-]?key|(?<!ssl)(?<!ssl[_-])key$|code$"
    r"|(^|[_.\s-])(sig|sas|pw|auth|dsn|pin|otp|pat|sid|nonce|refresh)$",
    re.I,
)


def spans(url: str) -> list[tuple[int, int]]:
    """Return (begin, end) of each password in a URL, in order.

    A word may hold the URL: `search.storage=URL`.
    """
    found = []
    starts = [m.end() for m in _SCHEME.finditer(url)]
    last = url.rfind("@")
    for begin in starts:
        slip = _SLIP.match(url, begin)
        if slip is not None and last > slip.end():
            found.append((slip.end(), last))
        user = _USER.match(url, begin)
        if user is None or url.startswith(f"{HIDDEN}@", user.end()):
            continue
        if last >= user.end():
            found.append((user.end(), last))
        elif not url.startswith("[", begin) and _PORT.match(url, user.end()) is None:
            found.append((user.end(), len(url)))
    hidden = 0
    for key in _KEY.finditer(url, starts[0]) if starts else ():
        if key.start() >= hidden:
            after = _NEXT_KEY.search(url, key.end())
            end = after.start() if after else len(url)
            if _SECRET.search(unquote(key[1])) or _PAIR.search(unquote(url[key.end() : end])):
                hidden = end
                found.append((key.end(), hidden))
    found += [(pair.end(), len(url)) for pair in _PAIR.finditer(url)][:1]
    found += [user.span() for user in _HTTP_USER.finditer(url)]
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(found):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def after_password(url: str) -> str:
    """Return host and database as SQLAlchemy reads them from a URL with a password.

    An @ in them was meant as a part of the password.
    """
    start = _START.match(url)
    user = _USER.match(url, start.end()) if start else None
    if user is None or url.startswith(f"{HIDDEN}@", user.end()):
        return ""
    return url[user.end() :].partition("@")[2].partition("?")[0]


def masked(url: str) -> str:
    """Return a URL, or a word that holds one, with *** for every password."""
    for begin, end in reversed(spans(url)):
        if end > begin:
            url = url[:begin] + HIDDEN + url[end:]
    return url


def masked_words(text: str) -> str:
    """Return a sentence with *** for the passwords of the URLs in it."""
    text = _PAIR_IN_TEXT.sub(rf"\1{HIDDEN}", text)
    return re.sub(r"[^\s'\"]+", lambda found: _masked_word(found[0]), text)


def _masked_word(word: str) -> str:
    """Return a word, masked if it is a URL that names a user or has a query or parameters.

    A port that a comma follows is no password.
    """
    start = _SCHEME.search(word)
    is_url = start is not None and any(c in "@?#;" for c in word[start.end() :])
    return masked(word) if is_url or _PAIR.search(word) else word


def shown(text: str) -> str:
    """Return what should be a URL or an address, masked; if it is none, all before its last @."""
    hidden = masked(text)
    if hidden != text or HIDDEN in text or "@" not in text or _START.match(text):
        return hidden
    return HIDDEN + text[text.rindex("@") :]


def shown_override(text: str) -> str:
    """Return a `key.path=value` of the command line, its value shown as what might be a URL."""
    key, equals, value = text.partition("=")
    return f"{key}{equals}{shown(value)}" if equals else shown(text)


def without_secrets(text: str, urls: Iterable[str]) -> str:
    """Return a message of another program (a database, a driver) without the passwords of these
    URLs.

    All spellings of a password are removed.
    """
    for secret in sorted({form for url in urls for form in _spellings(url)}, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return masked_words(text)


def _spellings(url: str) -> set[str]:
    """Return the possible spellings of a URL's passwords.

    A password with an @ in it may be split by a parser; its parts are included.
    """
    found = {url[begin:end] for begin, end in spans(url)}
    parts = {
        part
        for secret in found
        if "@" in secret
        for part in re.split(r"[@/?&#:]", secret)
        if len(part) > 2
    }
    found |= parts
    plain = found | {unquote(s) for s in found} | {unquote_plus(s) for s in found}
    coded = {write(s) for s in plain for write in (quote, quote_plus, lambda s: quote(s, safe=""))}
    shown = {repr(s)[1:-1] for s in plain}
    return {s for s in plain | coded | shown if s not in ("", HIDDEN)}
