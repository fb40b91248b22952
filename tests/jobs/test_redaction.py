"""Secrets by their form: they reach no manifest, log, result or page, whoever wrote them and whenever."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from openlineage.client.serde import Serde

from jobs import logs
from jobs.lake import manifests, nights
from jobs.lake.partitions import write_json
from jobs.recipe import load_recipe
from jobs.redaction import redacted, without_secrets
from jobs.report import openlineage
from jobs.run import InputError, Run, as_json

ROOT = Path(__file__).parents[2]
SECRET = "hunter2"
TEXTS = [
    f"postgresql+psycopg://mlflow:{SECRET}@db/mlflow is down",
    f"http://{SECRET}@host:5000/x",
    f"http://user:p@{SECRET}@host/x",
    f"jdbc:postgresql://db/shop?user=a&password={SECRET}&ssl=true",
    f"redis:6379,username=publisher,password={SECRET},ssl=true",
    f'{{"connection_string": "redis:6379,password={SECRET}"}}',
    f'{{"password": "{SECRET}", "user": "a"}}',
    f"MLFLOW_TRACKING_PASSWORD={SECRET} python -m jobs",
    f"Authorization: Bearer {SECRET}",
    f"https://bucket.example/part-0?sig={SECRET}&se=2026",
    f"AWS_SECRET_ACCESS_KEY='{SECRET}'",
    f"spark.hadoop.fs.s3a.secret.key={SECRET}",
    f"fs.s3a.session.token: {SECRET}",
    f"spark.hadoop.fs.azure.account.key.shop.dfs.core.windows.net={SECRET}",
    f"s3a://AKIA:sec/{SECRET}@bucket/films",
    f"postgresql://feast:p/{SECRET}@host",
    f"postgresql://feast:12/{SECRET}@host:5432/shop",
    f"postgresql+psycopg://feast:p'{SECRET}@host",
    f"redis://:p/{SECRET}@host:6379/0",
    f"PGPASSWORD={SECRET} psql",
    f"REDISCLI_AUTH={SECRET} redis-cli",
    f"SMTP_PASS={SECRET}",
    f"dbPassword={SECRET}",
    f"clientSecret: {SECRET}",
    f"-Djavax.net.ssl.keyStorePassword={SECRET} -Xmx1g",
    f"X-Api-Key: {SECRET}",
    f"password='a {SECRET}' user=b",
    f"password='a''{SECRET}'",
    f"password = '''a {SECRET}'''",
    f'"password": "hun\\"{SECRET}", "user": "b"',
    f"password=a){SECRET}",
    f'"{{\\"password\\": \\"a \\\\\\"{SECRET}\\", \\"user\\": \\"b\\"}}"',
    f'{{"pwd": "{SECRET}"}}',
    f'{{"password": ["a]b", "{SECRET}"], "user": "b"}}',
    f"{{'passwords': {{'a': '}}', 'b': '{SECRET}'}}}}",
    f"jdbc:oracle:thin:scott/{SECRET}@//db:1521/shop",
    f'jdbc:oracle:oci:scott/"a/{SECRET}"@db',
    f"odbc_connect=DRIVER%3Dodbc%3Bpassword%3D{SECRET}%3BServer%3Ddb",
    f"odbc_connect=UID%3Da%3BPWD%3d{SECRET}",
    f"https://maps.example/v1?key={SECRET}&q=a",
    f"https://maps.example/v1?q=a&key={SECRET}",
    f"host //user:{SECRET}@host/db",
    f"ALTER USER a IDENTIFIED BY '{SECRET}'",
    f"create user a identified with 'sha2' by \"a ''{SECRET}\" x",
    f"GRANT ALL TO a IDENTIFIED BY {SECRET}, b",
    f"ALTER ROLE a WITH PASSWORD 'a''{SECRET}' VALID",
    f'"ALTER USER a IDENTIFIED BY \\"{SECRET}\\""',
    f"spark.hadoop.fs.s3a.secret.key   {SECRET}",
    f"a spark.authenticate.secret {SECRET} b",
    f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----",
    f'{{"private_key": "-----BEGIN RSA PRIVATE KEY-----\\n{SECRET}\\n-----END RSA PRIVATE KEY-----", "user": "b"}}',
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_secret_is_hidden_and_the_rest_stays(text: str) -> None:
    told = redacted(text)
    assert SECRET not in told and "***" in told
    assert redacted(told) == told


def test_a_secret_of_letters_alone_is_one_at_the_end_of_a_line_of_spark_s_settings() -> None:
    lines = "spark.authenticate.secret\tpw \nspark.authenticate.secret is wanted\nspark.hadoop.fs.s3a.secret.key pw"
    assert redacted(lines) == lines.replace("pw", "***")


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens = 512",
        "token 5 of 7",
        "a@b.c wrote",
        "s3://bucket/a@b",
        "tokenizer: llama",
        "tokens=3",
        "key = 4",
        "2026-01-01",
        "http://host:8080/a@b",
        "hdfs://name:8020/a@b",
        "spark://a:7077,b:7077",
        "abfss://films@shop.dfs.core.windows.net/a",
        '{"uri":"http://host:5000","mail":"a@b"}',
        '["s3://a:b","c@d"]',
        "The Secret: Dare to Dream",
        "Token: A Novel, 2nd edition",
        "secretary=Ann",
        "secretary: Ann",
        "token_budget=100",
        "use_token=true",
        "password: null",
        '{"password":"","user":"a"}',
        "compass: 5",
        "first_pass=3",
        "primary_key=id",
        "fs.s3a.aws.credentials.provider=org.x.Y",
        "jdbc:oracle:thin:@//db:1521/shop",
        "100%key=3, ?a=1&keys=2",
        "// a: b@c, //host:80/a@b",
        "s3a://b//a:b@c",
        "an item is identified by its id, a password is wanted",
        "spark.hadoop.fs.s3a.secret.key is missing in it",
        "spark.executor.memory 4g",
        "q%3Da%3Bb",
        "fs.azure.sas.token.provider.type=org.x.Y",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


def test_values_under_a_secret_s_name_are_hidden_whole() -> None:
    spark = {"spark.hadoop.fs.s3a.secret.key": SECRET, "spark.authenticate.secret": SECRET, "spark.executor.cores": "4"}
    hidden = without_secrets({"extract": {"spark": spark}, "tokens": 5, "items": ["token"]})
    assert hidden["extract"]["spark"] == {name: "4" if name.endswith("cores") else "***" for name in spark}
    assert (hidden["tokens"], hidden["items"]) == (5, ["token"])


@pytest.mark.parametrize("value", ["a b", ["a", "b"], {"a": "b"}, 12345])
@pytest.mark.parametrize("name", ["pwd", "password", "dbPassword", "PGPASSWORD"])
def test_whatever_a_password_s_value_is_it_is_hidden_whole(name: str, value: object) -> None:
    assert without_secrets({name: value}) == {name: "***"}


def test_other_values_stay_and_a_path_that_is_a_key_is_redacted() -> None:
    kept = {"token": 5, "private_key": "", "password": None, "use_token": True, "token_budget": "a", "secretary": "Ann"}
    assert without_secrets(kept) == kept
    assert without_secrets({"private_key": "x", "REDISCLI_AUTH": "x"}) == {"private_key": "***", "REDISCLI_AUTH": "***"}
    assert without_secrets({"inputs": {f"s3a://AKIA:s/{SECRET}@shop/films": "1"}}) == {"inputs": {"s3a://***@shop/films": "1"}}


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "text", ["http://x:y", "\\", "a.b-", "//a:", "%3D", "%aa", "spark.a ", "jdbc:oracle:a:", "IDENTIFIED BY ", "PASSWORD '"]
)
def test_a_long_text_costs_time_by_its_length(text: str) -> None:
    """Where each place begins a search through all the rest, this takes longer than a test may."""
    long = text * (300_000 // len(text))
    assert redacted("password=" + long).startswith("password=***")
    assert redacted('password: "' + long)
    assert len(redacted(long)) >= len(text)


def test_a_config_is_kept_without_the_password_of_its_address() -> None:
    run = Run(ds="2026-01-01", lake=Path("lake"), tracking_uri=f"http://mlflow:{SECRET}@host:5000")
    assert as_json(run)["tracking_uri"] == "http://***@host:5000"


@pytest.mark.parametrize("kind", ["text", "json"])
def test_no_log_line_has_a_secret(kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LLMEMB_LOG", kind)
    logs.start("publish", "2026-01-01")
    for text in TEXTS:
        logging.getLogger("jobs.publish").info("%s", text)
        try:
            raise OSError(text)
        except OSError:
            logging.getLogger("a.library").exception("failed")
    told = capsys.readouterr().err
    assert told.count("failed") == len(TEXTS) and SECRET not in told


@pytest.mark.parametrize("error", ["ValueError", "RuntimeError", "ConnectionError"])
def test_a_job_that_fails_with_a_secret_in_its_error_leaves_it_nowhere(tmp_path: Path, error: str) -> None:
    """Standard error with its traceback, standard output, and all files of the lake."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[run]\nlake = "{tmp_path / "lake"}"\ntracking_uri = "http://user:{SECRET}@127.0.0.1:1"\n')
    code = (
        "import sys, jobs.pin, jobs.__main__ as cli\n"
        f"def run(config):\n    raise {error}(f'no answer from {{config.run.tracking_uri}}')\n"
        "jobs.pin.run = run\nsys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "pin", "--recipe", str(recipe), "--ds", "2026-01-01"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode in (1, 2, 4) and "no answer from http://***@127.0.0.1:1" in done.stderr
    files = [path for path in (tmp_path / "lake").rglob("*") if path.is_file()]
    assert len(files) >= 1 and SECRET not in done.stdout + done.stderr + "".join(path.read_text() for path in files)


def test_a_manifest_of_an_older_version_tells_lineage_and_page_no_secret(tmp_path: Path) -> None:
    told = {"job": "publish", "ds": "2026-01-01", "status": "failed", "error": TEXTS[0], "config": {"uri": TEXTS[1]}}
    path = manifests.path_of(tmp_path, "2026-01-01", "publish")
    write_json(path, told | {"started_at": "2026-01-02T00:00:00+00:00", "seconds": 1})
    night = nights.read_night(tmp_path, "2026-01-01")
    events = [Serde.to_json(event) for event in openlineage.events(night, "shop")]
    assert SECRET in path.read_text()
    assert SECRET not in repr(night) + "".join(events) and "://***@db/mlflow is down" in events[1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.tracking_uri", f"http://user:{SECRET}@host"),
        ("run.tracking_uri", f"postgresql://feast:p/{SECRET}@host"),
        ("x.y", f"redis:6379,password={SECRET}"),
        ("x.y", f'["redis:6379,password={SECRET}"]'),
        ("x.y", f'{{pwd = "{SECRET}"}}'),
        ("extract.spark.spark.hadoop.fs.s3a.secret.key", SECRET),
        ('extract.spark."spark.hadoop.fs.s3a.secret.key"', f'"{SECRET}"'),
        ("x.password", "$NAME"),
        ("x.password", '["a"]'),
    ],
)
def test_a_password_in_an_argument_list_is_refused_without_repeating_it(tmp_path: Path, key: str, value: str) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[run]\nlake = "lake"\n')
    with pytest.raises(InputError, match=rf"--set {re.escape(key)}: .*seen by every user of this machine") as refused:
        load_recipe(recipe, [f"{key}={value}"])
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("override", ["run.lake=s3://bucket/a@b", "embed.max_tokens=512", "forget.item=secretary", "run.seed=1"])
def test_what_is_no_secret_may_be_an_argument(tmp_path: Path, override: str) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[run]\nlake = "lake"\n')
    load_recipe(recipe, [override])
