"""Somebody logs in: FAB reads its file (argument 1) as in Airflow, and Authlib talks to an OIDC provider of this machine.

    python tests/infra/fab_login.py webserver_config.py auth_type auth_roles_mapping

Prints one JSON line: FAB's properties that the further arguments name, and what was found out about who logged in. No database.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from airflow.providers.fab.auth_manager.security_manager.override import FabAirflowSecurityManagerOverride as Fab
from flask import Flask
from joserfc import jwt
from joserfc.jwk import RSAKey

ISSUER = "/realms/shop"
CLIENT, SECRET, CODE, TOKEN = "airflow", "the client's secret", "one code", "a token"
PERSON = {"preferred_username": "anna", "email": "anna@shop.example", "groups": ["llmemb-operators", "everybody"]}
KEY = RSAKey.generate_key(2048, {"kid": "1"})


class Provider(BaseHTTPRequestHandler):
    """Keycloak's addresses of a realm. Only the right client gets a token, only the token names a person."""

    asked: list[str] = []  # noqa: RUF012
    nonce = ""

    def do_GET(self) -> None:
        where = f"http://{self.headers['Host']}{ISSUER}"
        openid = f"{where}/protocol/openid-connect"
        answers: dict[str, Any] = {
            f"{ISSUER}/.well-known/openid-configuration": {
                "issuer": where,
                "authorization_endpoint": f"{openid}/auth",
                "token_endpoint": f"{openid}/token",
                "jwks_uri": f"{openid}/certs",
                "id_token_signing_alg_values_supported": ["RS256"],
            },
            f"{ISSUER}/protocol/openid-connect/certs": {"keys": [KEY.as_dict(private=False)]},
        }
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            answers[f"{ISSUER}/protocol/openid-connect/userinfo"] = PERSON
        self.answer(answers.get(self.path))

    def do_POST(self) -> None:
        sent = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        basic = base64.b64encode(f"{CLIENT}:{SECRET}".encode()).decode()
        right = self.headers.get("Authorization") == f"Basic {basic}" and sent["code"] == [CODE]
        now = int(time.time())
        told = {"iss": f"http://{self.headers['Host']}{ISSUER}", "sub": "1", "aud": CLIENT, "iat": now, "exp": now + 60}
        signed = jwt.encode({"alg": "RS256", "kid": "1"}, {**told, "nonce": self.nonce}, KEY)
        self.answer({"access_token": TOKEN, "token_type": "Bearer", "expires_in": 300, "id_token": signed} if right else None)

    def answer(self, body: Any) -> None:
        self.asked.append(self.path.removeprefix(ISSUER))
        self.send_response(200 if body else 401)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body or {}).encode())

    def log_message(self, *_: Any) -> None:
        pass


class People(Fab):  # type: ignore[misc]
    """FAB without a database: a role is its name."""

    def __init__(self) -> None:
        pass

    def find_role(self, name: str) -> Any:
        return name


def main() -> None:
    """Logs in once."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Provider)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    issuer = f"http://127.0.0.1:{server.server_port}{ISSUER}"
    os.environ |= {"OIDC_CLIENT_ID": CLIENT, "OIDC_CLIENT_SECRET": SECRET, "OIDC_ISSUER": issuer}
    app = Flask("airflow")
    app.secret_key = "of a cookie"
    assert app.config.from_pyfile(sys.argv[1])
    with app.app_context():
        people = People()
        people._init_auth()
        found = {name: getattr(people, name) for name in sys.argv[2:]}
        (provider,) = people.oauth_providers
        remote = people.oauth_remotes[provider["name"]]
    with app.test_request_context():
        from flask import session

        there = remote.authorize_redirect("https://airflow.example/auth/oauth-authorized/keycloak").location
        asks, kept = parse_qs(urlsplit(there).query), dict(session)
        Provider.nonce = asks["nonce"][0]
    with app.test_request_context(query_string={"code": CODE, "state": asks["state"][0]}):
        session.update(kept)
        told = remote.authorize_access_token()
        people.set_oauth_session(provider["name"], told)
        person = people.oauth_user_info(provider["name"], told)
        found["mapped"] = sorted(people.get_roles_from_keys(person["role_keys"]))
    where = there.removeprefix(issuer).partition("?")[0]
    found |= {"person": person, "where": where, "scope": asks["scope"][0], "asked": Provider.asked}
    print(json.dumps(found | {"roles": [one["role"] for one in Fab.ROLE_CONFIGS]}))


if __name__ == "__main__":
    main()
