import unicodedata

import pytest

from recipes.text.cleaning import NO_CLEANING, PUBLISHED_CLEANING, Cleaning, normalize_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Plain ASCII, 3.14!", "plain ascii, 3.14!"),
        ("Café NAÏVE Ångström", "cafe naive angstrom"),
        ("e\u0301", "e"),  # decomposed already
        ("don’t “quote” – x", "dont quote x"),
        ("走 ω µ €", " "),
        ("\u212a \u0130", "k i"),  # the Kelvin sign and the dotted capital I fall to ASCII letters
        ("a  b\t\tc   \n\n  d", "a b\t\tc \n\n d"),
        ("\ud800a", "a"),  # half a surrogate pair, as broken JSON may hold
        ("", ""),
    ],
)
def test_normalize_text(text, expected):
    assert normalize_text(text) == expected


def test_every_character_falls_to_the_ascii_part_of_its_lowercase_decomposition():
    for code in range(0x3000):
        character = chr(code)
        decomposed = unicodedata.normalize("NFD", character.lower())
        assert normalize_text(character) == "".join(part.lower() for part in decomposed if ord(part) < 128)


def test_parts_cut_at_line_ends_join_to_the_whole():
    text = "É  x \n  ÿ\u0301 \n\u0301ü  \n\n  end"
    lines = text.splitlines(keepends=True)
    assert "".join(map(normalize_text, lines)) == normalize_text(text)


def test_the_filter_is_strict_and_leaves_out_documents_without_tokens():
    assert PUBLISHED_CLEANING.keeps(24, 100)
    assert not PUBLISHED_CLEANING.keeps(25, 100)
    assert not PUBLISHED_CLEANING.keeps(0, 100)
    assert NO_CLEANING.keeps(100, 100)
    assert NO_CLEANING.keeps(0, 0)


def test_without_normalization_text_is_left_as_it_is():
    assert NO_CLEANING.apply("É  x") == "É  x"
    assert PUBLISHED_CLEANING.apply("É  x") == "e x"


@pytest.mark.parametrize("limit", [0.0, -1.0, float("inf"), float("nan")])
def test_a_senseless_limit_is_refused(limit):
    with pytest.raises(ValueError, match=r"allowed are numbers above 0 \(0\.25"):
        Cleaning(max_tokens_per_character=limit)


def test_ingredients_tell_cleanings_apart():
    cleanings = [
        NO_CLEANING,
        Cleaning(normalize=True),
        Cleaning(False, 0.25),
        Cleaning(False, 0.3),
        PUBLISHED_CLEANING,
    ]
    found = [cleaning.ingredients() for cleaning in cleanings]
    assert all(found.count(one) == 1 for one in found)
