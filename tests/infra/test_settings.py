"""People log in to Airflow as the page on clusters shows it, and no secret stands there."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.infra.documents import KUBERNETES, ROOT, SECRET, variables


def test_airflow_s_people_come_in_by_an_auth_manager_that_is_installed() -> None:
    settings = variables(KUBERNETES / "cluster.env")
    module, _, name = settings["AIRFLOW__CORE__AUTH_MANAGER"].rpartition(".")
    assert "Simple" not in name
    code = f"import importlib; print(getattr(importlib.import_module({module!r}), {name!r}).__mro__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "BaseAuthManager" in done.stdout, done.stderr[-2000:]
    assert "login" in re.search(r"scheduler=([\w,-]+)", (ROOT / "Makefile").read_text())[1].split(",")  # type: ignore[index]


def test_somebody_logs_in_by_what_the_page_shows(tmp_path: Path) -> None:
    """With FAB, Authlib and an OIDC provider of this machine that answers as Keycloak does."""
    page = (ROOT / "docs" / "cluster.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?AUTH_TYPE.*?)^```$", page, re.DOTALL | re.MULTILINE)
    (tmp_path / "webserver_config.py").write_text(block)
    assert set(re.findall(r'os\.environ\["(\w+)"\]', block)) == {"OIDC_CLIENT_ID", "OIDC_CLIENT_SECRET", "OIDC_ISSUER"}
    # FAB has a property for each name, so no other one
    read = [name.lower() for name in re.findall(r"^([A-Z_]+) = ", block, re.MULTILINE)]
    script = Path(__file__).parent / "fab_login.py"
    command = [sys.executable, str(script), str(tmp_path / "webserver_config.py"), *read]
    environment = {**os.environ, "AIRFLOW_HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["auth_type"] == 4, "AUTH_OAUTH"
    assert found["auth_user_registration"] and found["auth_roles_sync_at_login"]
    assert found["auth_user_registration_role"] == "Viewer"
    assert found["auth_roles_mapping"] == {"llmemb-admins": ["Admin"], "llmemb-operators": ["Op"]}
    assert {"Viewer", *(role for roles in found["auth_roles_mapping"].values() for role in roles)} <= set(found["roles"])
    assert found["where"] == "/protocol/openid-connect/auth" and "openid" in found["scope"].split()
    asked = [f"/protocol/openid-connect/{name}" for name in ("token", "certs", "userinfo")]
    assert found["asked"] == ["/.well-known/openid-configuration", *asked]
    assert (found["person"]["username"], found["person"]["role_keys"]) == ("anna", ["llmemb-operators", "everybody"])
    assert found["mapped"] == ["Op"], "by the groups that the provider tells"


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
