"""The exact ids and masks of six real tokenizers, as golden.json of each folder in ../shared/models says.

A row trained with one token more, less or elsewhere than the model's own format is a wrong model that nobody sees.
"""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest

from conftest import FAMILIES, SHARED, needs_shared
from tunesmith import hub
from tunesmith.data.render import Renderer
from tunesmith.models import open_renderer
from tunesmith.recipe import TemplateSettings
from tunesmith.types import Conversation, Message, Origin

pytestmark = needs_shared
N_CASES = 30


@functools.cache
def golden(family: str) -> dict[str, Any]:
    return json.loads((SHARED / "models" / family / "golden.json").read_text(encoding="utf-8"))


@functools.cache
def renderer(family: str, template: str = "auto") -> Renderer:
    """As a command finds it for that folder."""
    found = hub.locate(str(SHARED / "models" / family), weights=False)
    return open_renderer(found, TemplateSettings(name=template))


CASES = (
    [(family, number) for family in FAMILIES for number in range(len(golden(family)["cases"]))]
    if SHARED.is_dir()
    else []
)


def rendered(renderer: Renderer, case: dict[str, Any]) -> dict[str, Any]:
    """What golden.json says of a case, as tunesmith renders it."""
    messages = tuple(Message(**message) for message in case["messages"])
    (document,) = renderer.render(Conversation(messages, Origin("golden.json", 1)))
    return {
        "messages": case["messages"],
        "token_ids": list(document.token_ids),
        "supervised": [int(flag) for flag in document.supervised],
        "prompt_ids_of_last_reply": list(document.prompt_ids),
    }


@pytest.mark.parametrize(("family", "number"), CASES)
def test_ids_mask_and_prompt_are_the_golden_ones(family: str, number: int) -> None:
    case = golden(family)["cases"][number]
    assert rendered(renderer(family), case) == case


@pytest.mark.parametrize(("family", "number"), CASES)
def test_chat_is_given_the_golden_prompt(family: str, number: int) -> None:
    case = golden(family)["cases"][number]
    messages = [Message(**message) for message in case["messages"][:-1]]
    assert list(renderer(family).prompt_ids(messages)) == case["prompt_ids_of_last_reply"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stop_ids_are_the_golden_ones_and_the_templates_own_comes_first(family: str) -> None:
    found, wanted = renderer(family).template.stop_ids, golden(family)["stop_ids"]
    assert sorted(found) == sorted(wanted)
    case = golden(family)["cases"][0]
    last_supervised = max(i for i, flag in enumerate(case["supervised"]) if flag)
    assert found[0] == case["token_ids"][last_supervised]


def test_atom_is_found_by_its_config_and_by_the_templates_name() -> None:
    by_itself, by_name = renderer("atom-7b-standin"), renderer("atom-7b-standin", "atom")
    assert by_itself.template.source == "alias atom-7b"
    assert by_name.template.source == "shipped atom"
    for case in golden("atom-7b-standin")["cases"]:
        assert rendered(by_name, case) == rendered(by_itself, case) == case


def test_another_revisions_template_matches_no_case() -> None:
    """Negative control: the comparison can fail. The same vocabulary with the template of three months later."""
    later = renderer("phi-3-mini")
    assert all(rendered(later, case) != case for case in golden("phi-3-mini-april")["cases"])


def test_every_golden_case_matches() -> None:
    checked = [
        (family, rendered(renderer(family), case) == case) for family in FAMILIES for case in golden(family)["cases"]
    ]
    matched = sum(same for _, same in checked)
    print(f"golden cases matched: {matched} of {len(checked)}")
    assert matched == len(checked) == N_CASES
