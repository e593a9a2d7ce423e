import pytest

from diffengine.datasets import ImageDataset, Shapes, UnreadableImage, survey, survey_captions
from diffengine.errors import UserError


class Sizes(ImageDataset):
    def __init__(self, sizes):
        self.sizes = sizes
        self.asked = []

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        raise AssertionError("no image is read")

    def size(self, index):
        self.asked.append(index)
        if self.sizes[index] is None:
            raise UnreadableImage("broken")
        return self.sizes[index]


def test_area_cut_off_and_share_of_enlarged_images():
    # cut off: 0, 1/2, 3/4, 0; short sides 100, 50, 25, 10
    line = survey(Sizes([(100, 100), (100, 50), (25, 100), (10, 10)]), Shapes(50))
    assert line == "4 images; the 50 px square cuts off 31.2% of the area and 50.0% are enlarged"


def test_many_images_are_sampled_evenly():
    sizes = Sizes([(10, 10)] * 1001)
    assert survey(sizes, Shapes(8), limit=11).startswith(
        "1001 images, 11 of them sampled; the 8 px square cuts off 0.0%"
    )
    assert sizes.asked == list(range(0, 1001, 100))


def test_unreadable_images_are_counted():
    assert survey(Sizes([None, (4, 2)]), Shapes(1)).endswith(
        "cuts off 50.0% of the area and 0.0% are enlarged; 1 cannot be read"
    )
    assert survey(Sizes([None]), Shapes(1)) == "1 images; 1 cannot be read"
    with pytest.raises(UserError, match="limit 0"):
        survey(Sizes([None]), Shapes(1), limit=0)


def count_words(captions):
    """The number of words of each caption, and a limit of four."""
    return [len(caption.split()) for caption in captions], 4


def test_truncated_captions_are_counted():
    captions = ["a b", "a b c d", "a b c d e", "a b c d e f g"]
    expected = "4 captions: 2 are longer than 4 tokens and are cut there; the longest has 7"
    expected += " and loses its last 3 words: 'e f g'"
    assert survey_captions(iter(captions), count_words) == expected
    assert survey_captions(captions[:3], count_words).endswith("the longest has 5 and loses its last 1 word: 'e'")
    assert survey_captions(captions[:2], count_words) is None
    assert survey_captions([], count_words) is None
    assert survey_captions(captions, lambda captions: ([0] * len(captions), 0)) is None


def test_a_long_caption_is_reported_in_one_short_line():
    line = survey_captions(["a\nb\n" + " c\n" * 500], count_words)
    assert line.endswith(f"the longest has 502 and loses its last 498 words: '{'c ' * 30} … {' c' * 10}'")


def test_many_captions_are_sampled_evenly():
    asked = []

    def lengths(captions):
        asked.extend(captions)
        return [5] * len(captions), 4

    expected = "1001 captions, 11 of them sampled: 11 are longer than 4 tokens"
    assert survey_captions(map(str, range(1001)), lengths, limit=11).startswith(expected)
    assert asked == [str(index) for index in range(0, 1001, 100)]
