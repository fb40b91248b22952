"""What a text may not keep: passwords in addresses, and values of parameters that are called password, token, secret or key.

Recipes, errors and results go into manifests, logs, MLflow, lineage and the page; each of them goes through here first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
USER_INFO = re.compile(
    r"""(?<![A-Za-z0-9+.-])(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*+)://(?:
    (?P<pair>[^/\s:@'"<>]*+:(?P<port>\d{1,5}+(?=/))?(?:[^\s'"<>]|['"](?=[\w/!$%+.-])){0,300})   # user:password
    |(?P<user>[^/\s'"<>@]*+(?:@[^/\s'"<>@]*+)*)
    )@(?=[^\s@])""",
    re.VERBOSE,
)
"""`user:password@` or `token@` of an address; a password may hold a / and an @ that nobody escaped."""
DATABASES = re.compile(r"(?:.*[+.])?(?:postgres|postgresql|mysql|mariadb|redis|rediss|mongodb|amqp|amqps|psycopg2?)(?:\+.*)?")
"""Schemes whose paths hold no @: there `a:12/b@c` is no port with a path but a password."""
AZURE = ("abfs", "abfss", "wasb", "wasbs")
"""Schemes where a container stands in the user's place."""
BARE = re.compile(
    r"""(?P<head>(?<![\w:/.-])//)[^\s/:@'"<>]{0,100}:[^\s/@'"<>]{1,300}@(?=[^\s@])                # //user:password@host
    |(?P<oracle>jdbc:oracle:\w{1,9}:)[^\s/@'"<>]{0,100}/(?:"[^"\s]{0,300}"|[^\s'"<>]{0,300})@    # jdbc:oracle:thin:a/b@
    """,
    re.VERBOSE | re.IGNORECASE,
)
"""Users in addresses without a scheme's `://`."""
SQL = re.compile(
    r"""(\bIDENTIFIED\s{1,9}(?:WITH\s{1,9}[\w'"]{1,60}\s{1,9})?BY\s{1,9}|\bPASSWORD\s{1,9}(?=\\*+['"]))
    (?:'(?:''|\\.|[^'\\])*+'?|"(?:""|\\.|[^"\\])*+"?|\\{1,9}["'][^"'\\]*+)
    |((?-i:\bIDENTIFIED\s{1,9}BY\s{1,9}))[^\s,;'"\\]++""",
    re.VERBOSE | re.IGNORECASE,
)
"""`IDENTIFIED BY 'x'`, `PASSWORD 'x'`; without quotes in capitals alone, for prose says it too."""
SPARK = re.compile(
    r"(?<![\w.-])(?P<name>spark\.[\w.-]++)(?P<blank>[ \t]{1,99})(?:\S++(?=[ \t\r]*+$)|(?=[a-z.,:;]{0,300}[^\sa-z.,:;])\S++)",
    re.MULTILINE,
)
"""A line of Spark's own file of settings; amid a text only what looks like no word of prose."""
PEM = re.compile(r"(BEGIN [A-Z ]*PRIVATE KEY-----).*?(?=-----END|\Z)", re.DOTALL)
"""What a private key consists of."""
NAME = re.compile(
    r"""(?:(?<![\w.-])(?!(?<=%)[0-9a-f]{2})|(?<=%[0-9a-f]{2}))(?P<name>[\w.-]++)
    (?:\\*+["'])?(?:\s*+[=:]\s*+|%3[AD])(?P<how>(?:bearer|basic)\s++)?""",
    re.IGNORECASE | re.VERBOSE,
)
"""`name=`, `name: `, `"name": ` of a connection string, a query, a header, a setting or JSON, also in JSON; and `name%3D`."""
STOPS = r"""[\s,;&]|\\{0,9}["'}\])>]{1,9}(?:[\s,;&.:]|\Z)"""
QUOTED = r""""(?:\\.|[^"\\])*+"|'(?:\\.|[^'\\])*+'"""
VALUE = re.compile(
    rf"""(?P<open>["'])(?P<text>(?:\\.|(?P=open){{2}}|(?!(?P=open))[^\\])*+)(?P<shut>(?P=open)?)     # "it\"s", 'it''s'
    |(?P<escaped>\\+["'])(?P<inner>(?:(?!(?<!\\)(?P=escaped)).)*+)(?P<end>(?P=escaped)?)           # \"a text of JSON in JSON\"
    |\[(?:{QUOTED}|[^\]])*+\]?|\{{(?:{QUOTED}|[^}}])*+\}}?                                          # a list, a mapping
    |(?:(?!{STOPS}).)++                                                                            # a word
    """,
    re.VERBOSE | re.DOTALL,
)
HARMLESS = re.compile(r"(?:true|false|null|none|\*\*\*)?", re.IGNORECASE)
TITLE = re.compile(r"(?:Secret|Token|Signature|Credential)s?: [A-Z][a-z']*(?=[\s,.;!?]|\Z)")
"""A title in prose (`The Secret: Dare to Dream`) and no setting."""
KEYS = re.compile(
    r""".*(?:passwords?|passwd|passphrase)
    |(?:.*_)?(?:pwd|secret|(?:auth|api|access|refresh|sas|id)?token|credentials?|sig|signature|authorization
    |(?:api|access|secret|account|private|signing|encryption)_?key)
    |(?:.*_)?fs_azure_(?:account_key|account_oauth2_client_secret|sas(?!_token_provider))_.*""",
    re.VERBOSE,
)
"""Names of values that are secret as a whole, as `plainly` writes them."""
VARIABLES = re.compile(r"[A-Z0-9]+(?:_[A-Z0-9]+)*_(?:AUTH|PASS)|PGPASS")
"""Such names among environment variables: `REDISCLI_AUTH`, `SMTP_PASS`."""


def redacted(text: str) -> str:
    """A text without the secrets that it shows by their form."""
    text = without_users(PEM.sub(rf"\1{HIDDEN}", text) if "PRIVATE KEY-----" in text else text)
    text = SPARK.sub(without_setting, SQL.sub(rf"\1\2{HIDDEN}", text))
    kept, at = [], 0
    for found in NAME.finditer(text):
        if found.start() < at or not (secret(found["name"]) or of_query(found)) or TITLE.match(text, found.start("name")):
            continue
        if (value := VALUE.match(text, found.end())) and (shown := without_value(value)) != value[0]:
            kept += [text[at : found.end()], shown]
            at = value.end()
    return "".join([*kept, text[at:]])


def of_query(found: re.Match[str]) -> bool:
    """Whether this is `?key=` or `&key=` of an address, where a `key` alone is a secret."""
    return found["name"].lower() == "key" and found.string[max(found.start() - 1, 0) : found.start()] in ("?", "&")


def without_setting(found: re.Match[str]) -> str:
    """A setting of Spark without its value, if that is a secret."""
    return f"{found['name']}{found['blank']}{HIDDEN}" if secret(found["name"]) else found[0]


def without_value(found: re.Match[str]) -> str:
    """A value hidden in its quotes, or as it was where it tells nothing."""
    quotes = (found["open"] or found["escaped"] or "", found["shut"] or found["end"] or "")
    text = next((part for part in (found["text"], found["inner"]) if part is not None), found[0])
    return found[0] if HARMLESS.fullmatch(text) else HIDDEN.join(quotes)


def without_users(text: str) -> str:
    """A text whose addresses have neither users nor passwords; a container of Azure stays, and so does an @ of a path."""
    text = USER_INFO.sub(without_user, text) if "://" in text else text
    return BARE.sub(lambda found: f"{found['head'] or found['oracle']}{HIDDEN}@", text)


def without_user(found: re.Match[str]) -> str:
    """An address up to its host, without its user."""
    scheme = found["scheme"].lower()
    if found["port"] and not DATABASES.fullmatch(scheme):
        return found[0]
    if scheme in AZURE and found["user"]:
        return found[0]
    return f"{found['scheme']}://{HIDDEN}@"


def secret(name: str) -> bool:
    """Whether what has this name is a secret: `dbPassword`, `spark.hadoop.fs.s3a.secret.key`, `REDISCLI_AUTH`."""
    return bool(KEYS.fullmatch(plainly(name)) or VARIABLES.fullmatch(name))


def plainly(name: str) -> str:
    """A name in small letters, its words joined by `_`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[.-]", "_", name.strip("\"' ")).lower()


def without_secrets(value: Any) -> Any:
    """A JSON value whose texts are redacted, keys too, and whose values under a secret's name are hidden whole."""
    if isinstance(value, Mapping):
        return {
            redacted(key) if isinstance(key, str) else key: HIDDEN if hides(str(key), part) else without_secrets(part)
            for key, part in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(part) for part in value]
    return redacted(value) if isinstance(value, str) else value


def hides(name: str, value: Any) -> bool:
    """Whether a value is a secret by its name alone; a number is none, unless it is called a password."""
    if not value or isinstance(value, bool) or not secret(name):
        return False
    return not isinstance(value, int | float) or "pass" in name.lower() or "pwd" in name.lower()


def shows_secret(name: str, text: str) -> bool:
    """Whether `name=text` would have to be redacted."""
    return redacted(text) != text or (secret(name) and not HARMLESS.fullmatch(text.strip("\"' ")))
