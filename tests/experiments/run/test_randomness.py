import numpy as np

from recipes.run.randomness import Purpose, random_words

# What the generator gave when this was written: runs of old and new versions must see the same batches.
PINNED = [6452026991055952428, 1094967136881436591, 8166169322687471603]


def test_words_are_the_same_for_all_time():
    assert random_words(3, 1, Purpose.MASKING, 7, 3).tolist() == PINNED


def test_a_longer_draw_begins_with_the_shorter():
    assert np.array_equal(random_words(1, 2, Purpose.MASKING, 3, 100)[:5], random_words(1, 2, Purpose.MASKING, 3, 5))


def test_each_argument_changes_every_word():
    reference = random_words(1, 1, Purpose.MASKING, 1, 64)
    others = [
        random_words(2, 1, Purpose.MASKING, 1, 64),
        random_words(1, 2, Purpose.MASKING, 1, 64),
        random_words(1, 1, Purpose.BATCH_ORDER, 1, 64),
        random_words(1, 1, Purpose.MASKING, 2, 64),
    ]
    for other in others:
        assert np.intersect1d(reference, other).size == 0


def test_bits_are_uniform():
    words = random_words(0, 0, Purpose.MASKING, 0, 20_000)
    ones = np.unpackbits(words.view(np.uint8)).mean()
    assert abs(ones - 0.5) < 4 * 0.5 / np.sqrt(64 * 20_000)
