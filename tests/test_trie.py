"""Prefix trees: nothing of a document is lost, and the one rule `k <= q < end[k]` says who sees whom.

A tree is judged by the words of its tokens, a token's word being the tokens it sees, itself the last. Laid out right,
the words are the beginnings of the documents; how the layout came about does not matter.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, takewhile
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.engine import trie
from tunesmith.engine.trie import Tree, cut, deal, input_length, lay_out, own_tokens
from tunesmith.types import Origin, Rendered

Word = tuple[int, ...]
some = settings(max_examples=50)


def document(ids: Iterable[int], *replies: tuple[int, int], line: int = 1) -> Rendered:
    return Rendered(tuple(ids), replies, Origin("rows.jsonl", line))


@st.composite
def batches(draw: Any, most: int = 8, letters: int = 3) -> list[Rendered]:
    """Documents of which many begin alike: each may repeat, continue, cut short or leave one that came before."""
    made: list[Rendered] = []
    for line in range(draw(st.integers(1, most))):
        before = draw(st.sampled_from(made)).token_ids if made else ()
        kept = draw(st.integers(0, len(before)))
        rest = draw(st.lists(st.integers(0, letters - 1), min_size=max(0, 2 - kept), max_size=6))
        ids = before[:kept] + tuple(rest)
        places = sorted(draw(st.sets(st.integers(1, len(ids)), min_size=2, max_size=6)))
        made.append(document(ids, *zip(places[::2], places[1::2], strict=False), line=line + 1))
    return made


def inputs(document: Rendered) -> Word:
    return document.token_ids[: input_length(document)]


def seen(tree: Tree, query: int) -> list[int]:
    """The keys that a query sees, by the rule."""
    return [key for key in range(query + 1) if query < tree.end[key]]


def words(tree: Tree) -> list[Word]:
    return [tuple(tree.token_ids[key] for key in seen(tree, query)) for query in range(len(tree.token_ids))]


def beginnings(documents: Sequence[Rendered]) -> Counter[Word]:
    """How many documents have each beginning."""
    return Counter(inputs(d)[: n + 1] for d in documents for n in range(input_length(d)))


def lessons(documents: Sequence[Rendered]) -> Counter[tuple[Word, int]]:
    """What is learned: behind which words which token comes, and how often."""
    return Counter((d.token_ids[:i], d.token_ids[i]) for d in documents for a, b in d.replies for i in range(a, b))


def lessons_of(tree: Tree) -> Counter[tuple[Word, int]]:
    said = words(tree)
    return Counter({(said[where], target): count for where, target, count in tree.pairs})


# --- the layout -------------------------------------------------------------------------------------------------------


def test_the_example_in_the_docstring_is_what_comes_out() -> None:
    lines = [re.split(r"   +", line.strip()) for line in str(trie.__doc__).splitlines() if line.startswith("    ")]
    drawn = {name: text.split() for name, text, *_ in lines}
    documents = re.findall(r"\[(.*?)\]", " ".join(lines[0]))
    token_ids = [[ord(letter) for letter in written.split()] for written in documents]
    spans = [[i for i, number in enumerate(ids) if chr(number) in "xyzc"] for ids in token_ids]
    tree = lay_out([document(ids, (span[0], span[-1] + 1)) for ids, span in zip(token_ids, spans, strict=True)])
    assert documents == ["S u a x", "S u b y z", "T v c"]
    assert [chr(number) for number in tree.token_ids] == drawn["token"] == list("SuabyTv")
    assert tree.position == tuple(map(int, drawn["position"])) == (0, 1, 2, 2, 3, 0, 1)
    assert tree.end == tuple(map(int, drawn["end"])) == (5, 5, 3, 5, 5, 7, 7)
    assert [f"{where}→{chr(target)}" for where, target, _ in tree.pairs] == " ".join(lines[-1][1:]).split()
    assert tree.pairs == ((2, ord("x"), 1), (3, ord("y"), 1), (4, ord("z"), 1), (6, ord("c"), 1))


@some
@given(batches())
def test_every_document_can_be_read_back_and_nothing_else(documents: list[Rendered]) -> None:
    said = words(lay_out(documents))
    assert len(set(said)) == len(said)  # every beginning stands once
    assert set(said) == set(beginnings(documents))


@some
@given(batches())
def test_a_token_sees_its_ancestors_and_itself(documents: list[Rendered]) -> None:
    tree = lay_out(documents)
    at = {word: index for index, word in enumerate(words(tree))}
    for word, index in at.items():
        assert seen(tree, index) == [at[word[: n + 1]] for n in range(len(word))]


@some
@given(batches(), st.booleans())
def test_the_position_is_the_number_of_tokens_in_front(documents: list[Rendered], share: bool) -> None:
    tree = lay_out(documents, share_prefix=share)
    assert tree.position == tuple(len(word) - 1 for word in words(tree))


@some
@given(batches(), st.booleans())
def test_what_is_learned_is_what_the_documents_say_once_each(documents: list[Rendered], share: bool) -> None:
    """A shared prompt has several next tokens: with one label per position, all but one would be lost."""
    tree = lay_out(documents, share_prefix=share)
    expected = lessons(documents)
    found: Counter[tuple[Word, int]] = Counter()
    said = words(tree)
    for where, target, count in tree.pairs:
        found[said[where], target] += count
    assert found == expected
    assert tree.n_supervised == expected.total() == sum(d.n_supervised for d in documents)
    assert list(tree.pairs) == sorted(tree.pairs)
    assert len({pair[:2] for pair in tree.pairs}) == len(tree.pairs)


@some
@given(batches(), st.booleans())
def test_segments_tile_the_layout_and_hang_where_another_ends(documents: list[Rendered], share: bool) -> None:
    tree = lay_out(documents, share_prefix=share)
    above = [(seen(tree, index)[:-1] or [None])[-1] for index in range(len(tree.token_ids))]
    n_children = Counter(above)
    assert [segment.start for segment in tree.segments] == [0, *(segment.stop for segment in tree.segments[:-1])]
    assert tree.segments[-1].stop == len(tree.token_ids)
    last = {segment.stop - 1 for segment in tree.segments}
    for segment in tree.segments:
        assert segment.start < segment.stop
        if above[segment.start] is not None:
            assert above[segment.start] in last
            assert n_children[above[segment.start]] > 1  # otherwise it would be a part of that one
        for index in range(segment.start + 1, segment.stop):
            assert above[index] == index - 1 and n_children[index - 1] == 1


@some
@given(batches())
def test_without_sharing_every_document_stands_on_its_own_in_order(documents: list[Rendered]) -> None:
    tree = lay_out(documents, share_prefix=False)
    assert tree.token_ids == tuple(token for d in documents for token in inputs(d))
    assert Counter(words(tree)) == beginnings(documents)
    assert [segment.stop - segment.start for segment in tree.segments] == [input_length(d) for d in documents]
    assert all(tree.position[segment.start] == 0 for segment in tree.segments)
    assert all(count == 1 for _, _, count in tree.pairs)


@some
@given(batches(), st.randoms(use_true_random=False))
def test_the_order_of_the_documents_does_not_matter(documents: list[Rendered], random: Any) -> None:
    shuffled = random.sample(documents, len(documents))
    assert lay_out(shuffled) == lay_out(documents)


def test_a_document_that_is_the_beginning_of_another_adds_nothing() -> None:
    long, short = document([5, 6, 7, 8, 9], (2, 5)), document([5, 6, 7], (2, 3))
    assert lay_out([long, short]).token_ids == lay_out([long]).token_ids == (5, 6, 7, 8)
    assert lay_out([long, short]).pairs == ((1, 7, 2), (2, 8, 1), (3, 9, 1))


def test_what_stands_behind_the_last_learned_token_is_left_out() -> None:
    tree = lay_out([document([1, 2, 3, 4, 5, 6], (1, 2), (3, 4))])
    assert tree.token_ids == (1, 2, 3)
    assert tree.pairs == ((0, 2, 1), (2, 4, 1))


@some
@given(batches(), st.booleans())
def test_asked_for_whole_documents_it_stays_in(documents: list[Rendered], share: bool) -> None:
    tree = lay_out(documents, share_prefix=share, whole=True)
    assert set(words(tree)) == {d.token_ids[: n + 1] for d in documents for n in range(len(d.token_ids))}
    assert tree.n_supervised == sum(d.n_supervised for d in documents)
    if share:
        assert lessons_of(tree) == lessons(documents)


def test_the_checks_see_a_tree_that_is_wrong() -> None:
    """Negative control: an end off by one, a lost target and a lost count are seen."""
    documents = [document([1, 2, 3, 4], (2, 4)), document([1, 2, 5, 6], (2, 4)), document([1, 2, 5, 6], (2, 4))]
    tree = lay_out(documents)
    assert set(words(tree)) == set(beginnings(documents)) and lessons_of(tree) == lessons(documents)
    for index, end in enumerate(tree.end):
        for wrong in {end - 1, end + 1} - {index, len(tree.token_ids) + 1}:
            moved = replace(tree, end=(*tree.end[:index], wrong, *tree.end[index + 1 :]))
            assert set(words(moved)) != set(beginnings(documents))
    assert lessons_of(replace(tree, pairs=tree.pairs[1:])) != lessons(documents)
    assert lessons_of(replace(tree, pairs=tuple((w, t, 1) for w, t, _ in tree.pairs))) != lessons(documents)


# --- groups -----------------------------------------------------------------------------------------------------------


@some
@given(batches(most=12), st.integers(1, 40), st.booleans())
def test_every_document_comes_into_exactly_one_group(documents: list[Rendered], budget: int, share: bool) -> None:
    groups = cut(documents, budget, share_prefix=share)
    assert sorted(map(id, chain(*groups))) == sorted(map(id, documents))
    assert all(groups)


@some
@given(batches(most=12), st.integers(1, 40), st.booleans())
def test_a_group_keeps_the_budget_unless_it_is_one_document(
    documents: list[Rendered], budget: int, share: bool
) -> None:
    for group in cut(documents, budget, share_prefix=share):
        columns = zip(*map(inputs, group), strict=False)  # as many as the shortest has tokens
        common = len([*takewhile(lambda column: len({*column}) == 1, columns)]) if share else 0
        own = len(lay_out(group, share_prefix=share).token_ids) - common
        assert len(group) == 1 or own_tokens(group, share_prefix=share) == own <= budget


@some
@given(batches(most=12), st.booleans())
def test_with_half_of_its_own_tokens_a_group_is_divided(documents: list[Rendered], share: bool) -> None:
    """What is done when memory runs out."""
    own = own_tokens(documents, share_prefix=share)
    assert cut(documents, max(1, own), share_prefix=share) == cut(documents, 10_000, share_prefix=share)
    if len(documents) > 1 and own > 1:
        assert len(cut(documents, own // 2, share_prefix=share)) > 1


@some
@given(batches(most=12), st.integers(1, 40))
def test_sharing_never_takes_more_tokens_than_not_sharing(documents: list[Rendered], budget: int) -> None:
    def n_tokens(*, share: bool) -> int:
        groups = cut(documents, budget, share_prefix=share)
        return sum(len(lay_out(group, share_prefix=share).token_ids) for group in groups)

    assert n_tokens(share=True) <= n_tokens(share=False) == sum(map(input_length, documents))


@pytest.mark.parametrize("budget", [7, 20, 60])
def test_documents_with_one_prompt_take_it_once_per_group(budget: int) -> None:
    prompt = range(40)
    documents = [document([*prompt, 50 + n, n], (40, 42)) for n in range(50)]
    groups = cut(documents, budget)
    assert sum(len(lay_out(group).token_ids) for group in groups) == 40 * len(groups) + 50
    assert len(groups) == -(-50 // budget)  # as few as there can be, however long the prompt


def test_only_what_all_of_a_group_begin_with_is_not_counted() -> None:
    one, other = ([document([start, *range(40), n, n], (42, 43)) for n in range(3)] for start in (50, 51))
    assert [len(group) for group in cut(one + other, 3)] == [3, 3]
    assert [len(group) for group in cut(one + other, 87)] == [3, 3]
    assert [len(group) for group in cut(one + other, 88)] == [6]  # 2 · (41 + 3)


def test_no_group_is_a_small_rest() -> None:
    documents = [document([n, *range(10)], (1, 11)) for n in range(10)]  # ten input tokens each
    assert [len(group) for group in cut(documents, 90)] == [5, 5]
    assert [len(group) for group in cut(documents, 100)] == [10]
    assert [len(group) for group in cut(documents, 9)] == [1] * 10


@some
@given(batches(most=12), st.integers(1, 5), st.booleans())
def test_every_document_is_dealt_to_exactly_one_process(documents: list[Rendered], n: int, share: bool) -> None:
    shares = deal(documents, n, share_prefix=share)
    assert len(shares) == n
    assert sorted(map(id, chain(*shares))) == sorted(map(id, documents))


def test_every_process_is_dealt_about_the_same() -> None:
    documents = [document([n, *range(10)], (1, 11)) for n in range(12)]
    assert [len(share) for share in deal(documents, 3)] == [4, 4, 4]
    assert [len(share) for share in deal(documents[:2], 3)] == [1, 1, 0]


def test_what_documents_begin_with_counts_where_they_are_dealt() -> None:
    """Every process computes it, so one prompt's documents are no gift for whom they fall to."""
    prompt = range(100, 600)
    with_prompt = [document([*prompt, n, *range(10)], (501, 511)) for n in range(40)]  # 500 and 10 each
    without = [document([1000 + n, *range(10)], (1, 11)) for n in range(40)]
    sizes = [len(lay_out(share).token_ids) for share in deal(with_prompt + without, 3)]
    assert min(sizes) > 0 and max(sizes) <= 700  # of 900 and 400; the prompt stands twice
