"""The API's description, and the page's own headers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import httpx

from conftest import save_tiny_model
from served import metrics, serving
from tunesmith.serving.server import Serving


def test_the_api_is_as_it_is_described(tmp_path: Path) -> None:
    """schemathesis sends what the description allows and what it does not. Whether a conversation ends with a user's
    turn, or fits the model, no schema can say; so 400 is a right answer to what is otherwise well formed."""
    base = save_tiny_model(tmp_path / "base", max_position_embeddings=96)
    settings = tmp_path / "schemathesis.toml"
    settings.write_text('[checks.positive_data_acceptance]\nexpected-statuses = ["2xx", "400"]\n')
    command = [sys.executable, "-P", "-m", "schemathesis.cli", "--config-file", str(settings), "run"]
    with serving([base]) as server:
        ended = subprocess.run(
            [*command, f"{server.url}/openapi.json", "--max-examples", "2", "--seed", "1", "--no-color"],
            capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path,
        )  # fmt: skip
        found = metrics(server)
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-2000:]
    (generated,) = re.findall(r"(\d+) generated", ended.stdout)
    assert int(generated) > 200  # observed 783
    for path in ("/v1/chat/completions", "/v1/completions", "/tunesmith/prompt"):
        assert found[f'tunesmith_answers_total{{path="{path}",status="200"}}'] > 3  # replies were really written


def test_no_page_and_no_script_is_taken_from_elsewhere(server: Serving) -> None:
    page = httpx.get(server.url)
    assert page.headers["content-type"].startswith("text/html")
    assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", page.text)
    assert httpx.get(f"{server.url}/docs").status_code == 404
