"""People log in to Airflow as the page on clusters shows it, and no secret stands there."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.infra.documents import INFRA, KUBERNETES, ROOT, SECRET, variables


def test_airflow_s_people_come_in_by_an_auth_manager_that_is_installed() -> None:
    settings = variables(KUBERNETES / "cluster.env")
    module, _, name = settings["AIRFLOW__CORE__AUTH_MANAGER"].rpartition(".")
    assert "Simple" not in name
    code = f"import importlib; print(getattr(importlib.import_module({module!r}), {name!r}).__mro__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "BaseAuthManager" in done.stdout, done.stderr[-2000:]
    assert "login" in re.search(r"scheduler=([\w,-]+)", (ROOT / "Makefile").read_text())[1].split(",")  # type: ignore[index]


LOGIN = """
import json, sys
from types import SimpleNamespace
from urllib.parse import urljoin

from flask import Flask
from airflow.providers.fab.auth_manager.security_manager.override import FabAirflowSecurityManagerOverride as Fab

asked = []


class Remote:  # what Authlib registers: an address that is none of its own lies below api_base_url
    def __init__(self, *, client_id, client_secret, server_metadata_url, client_kwargs, api_base_url=""):
        self.base = api_base_url

    def get(self, url):
        asked.append(urljoin(self.base, url))
        person = {"preferred_username": "anna", "groups": ["llmemb-operators"]}
        return SimpleNamespace(raise_for_status=lambda: None, json=lambda: person)


class People(Fab):
    def __init__(self):  # without a database
        self.oauth_remotes = {one["name"]: Remote(**one["remote_app"]) for one in self.oauth_providers}


app = Flask("airflow")
assert app.config.from_pyfile(sys.argv[1])
with app.app_context():
    people = People()
    found = {name: getattr(people, name) for name in sys.argv[2:]}
    (provider,) = people.oauth_providers
    found["token"] = people.get_oauth_token_key_name(provider["name"])
    found["person"] = people.get_oauth_user_info(provider["name"], {})
found |= {"provider": provider, "asked": asked, "roles": [one["role"] for one in Fab.ROLE_CONFIGS]}
print(json.dumps(found))
"""
"""FAB reads its file as it does in Airflow, without Authlib (it is not installed here) and without a provider."""


def test_the_login_that_the_page_shows_is_one_that_fab_takes(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "cluster.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?AUTH_TYPE.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "webserver_config.py").write_text(block)
    names = set(re.findall(r'os\.environ\["(\w+)"\]', block))
    assert names == {"OIDC_CLIENT_ID", "OIDC_CLIENT_SECRET", "OIDC_ISSUER"}
    values = {name: f"https://stub.example/{name}" for name in names}
    read = [
        name.lower() for name in re.findall(r"^([A-Z_]+) = ", block, re.MULTILINE)
    ]  # FAB has a property for each, so no other name
    command = [sys.executable, "-c", LOGIN, str(tmp_path / "webserver_config.py"), *read]
    environment = {**os.environ, "AIRFLOW_HOME": str(tmp_path), **values}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["auth_type"] == 4, "AUTH_OAUTH"
    assert found["auth_user_registration"] and found["auth_roles_sync_at_login"]
    assert found["auth_user_registration_role"] == "Viewer"
    assert found["auth_roles_mapping"] == {"llmemb-admins": ["Admin"], "llmemb-operators": ["Op"]}
    assert {"Viewer", *(role for roles in found["auth_roles_mapping"].values() for role in roles)} <= set(found["roles"])
    remote = found["provider"]["remote_app"]
    assert (found["provider"]["name"], found["token"]) == ("keycloak", "access_token")
    assert (remote["client_id"], remote["client_secret"]) == (values["OIDC_CLIENT_ID"], values["OIDC_CLIENT_SECRET"])
    assert remote["server_metadata_url"] == values["OIDC_ISSUER"] + "/.well-known/openid-configuration"
    assert "openid" in remote["client_kwargs"]["scope"].split()
    assert found["asked"] == [values["OIDC_ISSUER"] + "/protocol/openid-connect/userinfo"]
    assert (found["person"]["username"], found["person"]["role_keys"]) == ("anna", ["llmemb-operators"])
    lacks = not re.search(r"^authlib==", (INFRA / "requirements" / "scheduler.txt").read_text(), re.MULTILINE)
    assert lacks == ("needs Authlib in the image" in page)


def test_no_secret_stands_in_the_login_that_the_page_shows() -> None:
    (block,) = re.findall(
        r"^```python\n(.*?AUTH_TYPE.*?)^```$", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL | re.MULTILINE
    )
    pairs: list[tuple[str, ast.expr]] = []
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Dict):
            pairs += [(ast.literal_eval(key), value) for key, value in zip(node.keys, node.values, strict=True) if key]
        elif isinstance(node, ast.Assign):
            pairs += [(ast.unparse(target), node.value) for target in node.targets]
    secret = {name: ast.unparse(value) for name, value in pairs if SECRET.search(name.upper()) and name != "token_key"}
    assert secret.keys() == {"client_secret"}
    assert all(re.fullmatch(r"os\.environ\['\w+'\]", value) for value in secret.values()), secret
    assert "://" not in block, "no provider's address"
