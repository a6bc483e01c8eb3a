"""What a chapter's page has beyond its notebook: times, terms, numbers of figures."""

from types import SimpleNamespace

import pytest
from docutils import nodes
from docutils.utils import new_document

import chapter_pages

TERMS = {"spot": "term-spot", "HVG": "term-HVG", "overlap-HVG": "term-overlap-HVG"}


def paragraph(text: str, *before: nodes.Node) -> nodes.document:
    made = new_document("page")
    made += nodes.paragraph("", "", *before, nodes.Text(text))
    return made


def linked(made: nodes.document) -> list[tuple[str, str]]:
    chapter_pages.link_terms(made, TERMS, "../book/glossary.html")
    return [(n.astext(), n["refuri"].partition("#")[2]) for n in made.findall(nodes.reference)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A spot, and another spot.", [("spot", "term-spot")]),
        ("Spots differ.", [("Spots", "term-spot")]),
        ("An overlap-HVG is an HVG.", [("overlap-HVG", "term-overlap-HVG"), ("HVG", "term-HVG")]),
        ("spotless, hotspot, spot-on, hvg", []),
    ],
)
def test_the_first_mention_of_a_term_is_linked(text, found):
    made = paragraph(text)
    assert linked(made) == found
    assert made.astext() == text


def test_what_is_code_or_a_link_stays_as_it_is():
    link = nodes.reference("", "", nodes.Text("a spot"), refuri="x")
    made = paragraph(" here", nodes.literal("", "spot"), link)
    assert linked(made) == [("a spot", "")]


def test_the_list_of_references_is_not_touched():
    made = new_document("page")
    made += nodes.section("", nodes.paragraph("", "The spot, 2020."), ids=["references"])
    assert linked(made) == []


def test_reading_time_counts_prose_and_no_code():
    made = paragraph("word " * 590)
    made += nodes.literal_block("", "code " * 5000)
    assert chapter_pages.reading_minutes(made) == 3
    assert chapter_pages.reading_minutes(paragraph("short")) == 1


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0 s"), (18.1, "18 s"), (426.1, "7 min")])
def test_times_are_said_as_people_say_them(seconds, said):
    assert chapter_pages.spoken(seconds) == said


def test_figures_are_counted_within_a_chapter():
    numbers = {
        "book/dataset": {"figure": {"a": (1,), "b": (2,)}},
        "notebooks/03_panels": {"figure": {"c": (3,), "d": (4,)}},
    }
    chapter_pages.number_figures(SimpleNamespace(toc_fignumbers=numbers))
    assert numbers["book/dataset"] == {"figure": {"a": (1,), "b": (2,)}}
    assert numbers["notebooks/03_panels"] == {"figure": {"c": (3, 1), "d": (3, 2)}}


def test_what_the_theme_does_twice_or_too_early_is_taken_out():
    font = '<link rel="preload" as="font" type="font/woff2" crossorigin href="a.woff2" />\n'
    script = '<script>const THEBE_JS_URL = "x"; const y = 1</script>\n'
    other = "<script>const z = 2</script>"
    wanted = script + other
    assert chapter_pages.without_errors(font + script + other + script) == wanted
    assert chapter_pages.without_errors(other) == other
