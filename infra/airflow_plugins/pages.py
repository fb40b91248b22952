"""Links to MLflow's and Feast's pages in Airflow's menu: LLMEMB_PAGES is `NAME=ADDRESS;NAME=ADDRESS`."""

from __future__ import annotations

import os

from airflow.plugins_manager import AirflowPlugin

PAGES = [pair.partition("=")[::2] for pair in os.environ.get("LLMEMB_PAGES", "").split(";") if pair]


class Pages(AirflowPlugin):
    """What stands beside Airflow."""

    name = "llmemb_pages"
    external_views = [  # noqa: RUF012 (Airflow's own form)
        {"name": name, "href": address, "destination": "nav", "url_route": f"llmemb-{name.lower()}"} for name, address in PAGES
    ]
