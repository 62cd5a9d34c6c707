"""One server for all files here, with two runs of one base."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from conftest import save_tiny_model
from served import CONTEXT, KNOWS, serving, trained
from tunesmith import chat
from tunesmith.chat import Chat
from tunesmith.serving.server import Serving


@pytest.fixture(scope="package")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs that have learned different answers to the same questions, and their base."""
    folder = tmp_path_factory.mktemp("served")
    base = save_tiny_model(folder / "base", max_position_embeddings=CONTEXT)
    return {"base": base, **{name: trained(base, folder / name) for name in KNOWS}}


@pytest.fixture(scope="package")
def chats(runs: dict[str, Path]) -> dict[str, Chat]:
    """What `tunesmith chat` answers with."""
    return {name: chat.load(path) for name, path in runs.items()}


@pytest.fixture(scope="package")
def server(runs: dict[str, Path]) -> Iterator[Serving]:
    with serving([runs["bo"], runs["mia"]]) as server:
        yield server


@pytest.fixture
def client(server: Serving) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
