from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image

from diffengine.datasets import (
    Crop,
    DropCaption,
    Flip,
    ImageDataset,
    PositionSampler,
    Resize,
    Stream,
    ToTensor,
    UnreadableImage,
    VaryTags,
    batches_of,
    collate,
    generator,
    make_loader,
    steps_for_epochs,
)
from diffengine.datasets.split import digest_of
from diffengine.datasets.stream import CAPTION, SAMPLE
from diffengine.errors import UserError


class Photos(ImageDataset):
    """Noise images with their index as the caption; some cannot be read."""

    def __init__(self, count, broken=(), size=(14, 11), captions=1):
        self.count, self.broken, self.shape, self.num_captions = count, set(broken), size, captions

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.broken:
            raise UnreadableImage(f"image {index} cannot be read")
        pixels = np.random.default_rng(index).integers(0, 256, (*self.shape[::-1], 3), dtype=np.uint8)
        texts = [f"{index}.{number}" for number in range(self.num_captions)]
        return {"image": Image.fromarray(pixels), "text": texts if self.num_captions > 1 else str(index)}


class Batched(Photos):
    """Reads a batch as a list: one unreadable image fails the whole batch."""

    def __getitems__(self, indices):
        return [self[index] for index in indices]


class Lazy(Photos):
    def __getitems__(self, indices):
        return (self[index] for index in indices)


class Order:
    """Draws random numbers, as masking does: an array of varying length, its length, and a number."""

    def __call__(self, sample, rng):
        count = int(rng.integers(1, 5))
        return {**sample, "order": rng.permutation(8)[:count], "num_targets": count, "t": rng.random()}


def stream(dataset=None, seed=3, **options):
    image_transforms = [Resize(10), Crop(8), Flip(0.5), ToTensor()]
    return Stream(dataset or Photos(5), image_transforms, [DropCaption(0.3), Order()], seed=seed, **options)


def plain(value):
    """A sample or batch as plain values, for exact comparison."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, torch.Tensor | np.ndarray) else value


def test_generators_differ_for_each_key():
    keys = [(0, 0), (1, 0), (0, 1), (0, 0, 1), (0, 0, 0, 1), (0, 0, 0, 0, 1), (0, 0, 1, 1), (2**64 - 1, 0)]
    firsts = [tuple(generator(*key).integers(0, 2**63, 4)) for key in keys]
    assert len(set(firsts)) == len(keys)
    assert generator(5, 1, 2).random() == generator(5, 1, 2).random()


def test_neighbouring_positions_share_no_random_numbers():
    """If the low counter word held the position, position 1 would repeat position 0's numbers from the fifth on."""
    draws = [set(generator(0, SAMPLE, position).random(1000)) for position in range(4)]
    assert len(set.union(*draws)) == 4000


def test_seed_out_of_range():
    for seed in (-1, 2**64):
        with pytest.raises(UserError, match=r"seed got .*expected a whole number"):
            generator(seed, 0)


def test_each_epoch_is_a_different_permutation():
    numbers = Stream(Photos(7), [], [])
    indices = [int(numbers[position]["text"]) for position in range(21)]
    epochs = [indices[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [numbers.locate(position) for position in range(21)] == [
        (position // 7, index) for position, index in enumerate(indices)
    ]
    other_seed = Stream(Photos(7), [], [], seed=1)
    assert [int(other_seed[position]["text"]) for position in range(7)] != epochs[0]


def test_batches_cross_epochs_and_drop_no_sample():
    loader = make_loader(Stream(Photos(5), [ToTensor()], []), PositionSampler(4, num_steps=5))
    seen = [int(text) for batch in loader for text in batch["text"]]
    assert [len(batch["text"]) for batch in loader] == [4] * 5
    assert sorted(seen) == sorted(list(range(5)) * 4)
    assert sorted(seen[5:10]) == list(range(5))


@pytest.mark.parametrize("dataset_class", [Photos, Batched, Lazy])
def test_sample_depends_only_on_its_position(dataset_class):
    reference = [plain(stream()[position]) for position in range(12)]
    ours = stream(dataset_class(5))
    assert plain(ours.__getitems__([11, 2, 2, 7])) == [reference[position] for position in (11, 2, 2, 7)]
    assert [plain(ours[position]) for position in reversed(range(12))] == reference[::-1]
    assert plain(stream(seed=4)[0]) != reference[0]


def test_workers_do_not_change_the_batches():
    single, parallel = (list(make_loader(stream(), PositionSampler(3, num_steps=7), workers)) for workers in (0, 2))
    assert len(single) == 7
    assert plain(single) == plain(parallel)


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 8), (4, 8), (3, 8), (8, 8), (3, 4)])
def test_ranks_split_a_step(world_size, batch_size):
    steps = list(PositionSampler(batch_size, num_steps=3))
    assert steps == [list(range(start, start + batch_size)) for start in range(0, 3 * batch_size, batch_size)]
    ranks = [
        list(PositionSampler(batch_size, rank=rank, world_size=world_size, num_steps=3)) for rank in range(world_size)
    ]
    assert [list(chain.from_iterable(shards)) for shards in zip(*ranks)] == steps
    assert all(shard for shards in ranks for shard in shards)


def test_ranks_and_micro_batches_hold_the_same_samples():
    (whole,) = make_loader(stream(), PositionSampler(8, start_step=2, num_steps=3))
    halves = [
        next(iter(make_loader(stream(), PositionSampler(8, rank=rank, world_size=2, start_step=2)))) for rank in (0, 1)
    ]
    expected = [{key: value[rows] for key, value in whole.items()} for rows in (slice(4), slice(4, 8))]
    assert plain(halves) == plain(expected)
    rows = plain([stream()[position] for position in range(16, 24)])
    assert [plain(whole)["image"][row] for row in range(8)] == [row["image"] for row in rows]
    assert plain(whole)["order"] == [row["order"] for row in rows]


def test_resumed_sampler_continues_at_the_same_step():
    uninterrupted = list(make_loader(stream(), PositionSampler(3, num_steps=9)))
    resumed = list(make_loader(stream(), PositionSampler(3, start_step=4, num_steps=9)))
    assert plain(resumed) == plain(uninterrupted[4:])
    assert len(PositionSampler(3, start_step=4, num_steps=9)) == 5
    assert list(PositionSampler(3, start_step=9, num_steps=9)) == []


def test_endless_sampler_has_no_length():
    steps = iter(PositionSampler(2, start_step=10**12))
    assert [next(steps), next(steps)] == [[2 * 10**12, 2 * 10**12 + 1], [2 * 10**12 + 2, 2 * 10**12 + 3]]
    with pytest.raises(TypeError, match="no length"):
        len(PositionSampler(2))


def test_batch_smaller_than_the_number_of_processes():
    with pytest.raises(UserError, match=r"batch size 2 is split over 3 processes; expected .*set it to 3 or more"):
        PositionSampler(2, world_size=3)


def test_variations_repeat_the_image_but_not_other_random_numbers():
    ours = stream(Photos(6, size=(90, 20)), seed=1, image_variations=2)
    variations, rest = {}, {}
    for position in range(6 * 8):
        epoch, index = ours.locate(position)
        sample = ours[position]
        variations.setdefault((index, epoch % 2), set()).add(sample["image"].numpy().tobytes())
        rest.setdefault(index, set()).add((sample["t"], sample["num_targets"]))
        cached = ours.read_variations([2 * index + epoch % 2])[0]
        assert torch.equal(cached["image"], sample["image"])
        assert torch.equal(cached["micro_conds"], sample["micro_conds"])
    assert all(len(images) == 1 for images in variations.values())
    assert len(set().union(*variations.values())) == 12
    assert all(len(numbers) == 8 for numbers in rest.values())
    unlimited = stream(Photos(6, size=(90, 20)))
    assert len({unlimited[position]["image"].numpy().tobytes() for position in range(48)}) > 40


def test_caption_dropout_does_not_change_other_random_numbers():
    never, always = (Stream(Photos(5), [], [DropCaption(p), Order()], seed=1) for p in (0, 1))
    for position in range(20):
        assert plain(never[position]["order"]) == plain(always[position]["order"])
        assert (never[position]["text"] == "", always[position]["text"] == "") == (False, True)


def test_choice_of_one_of_several_captions_changes_no_other_random_numbers():
    several = Stream(Photos(1, captions=3), [], [Order()])
    single = Stream(Photos(1), [], [Order()])
    texts = [several[position]["text"] for position in range(600)]
    assert set(texts) == {"0.0", "0.1", "0.2"}
    assert all(150 < texts.count(text) < 250 for text in set(texts))
    assert all(several[position]["t"] == single[position]["t"] for position in range(20))


@pytest.mark.parametrize("dataset_class", [Photos, Batched, Lazy])
def test_unreadable_images_are_errors_or_replaced_and_counted(dataset_class):
    broken = {1, 2, 5}
    with pytest.raises(UnreadableImage, match=r"image [125] cannot be read"):
        Stream(dataset_class(6, broken), [], []).__getitems__(range(6))
    ours = Stream(dataset_class(6, broken), [], [], skip_unreadable=True)
    replacement = {0: (0, 0), 1: (3, 2), 2: (3, 1), 3: (3, 0), 4: (4, 0), 5: (0, 1)}
    for samples in (ours.__getitems__(range(12)), [ours[position] for position in range(12)]):
        for position, sample in enumerate(samples):
            _, index = ours.locate(position)
            assert (int(sample["text"]), sample["skipped"]) == replacement[index]


class Measured(ImageDataset):
    """Knows the sizes of its images. Those with an index in `long` are not square."""

    def __init__(self, count, long=(), broken=()):
        self.sizes = [(14, 11) if index in long else (20, 20) for index in range(count)]
        self.broken = broken

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        raise AssertionError("no image is read")

    def size(self, index):
        if index in self.broken:
            raise UnreadableImage(f"image {index} cannot be read")
        return self.sizes[index]


@pytest.mark.parametrize(
    ("dataset", "image_transforms", "variations"),
    [
        (Measured(3), [Resize(8), Crop(8), ToTensor()], 1),  # squares: there is only one crop
        (Measured(3, long=[2]), [Resize(8), Crop(8), ToTensor()], 4),
        (Measured(3, long=[2]), [Resize(8), Crop(8, random=False), Flip(0.0), ToTensor()], 1),
        (Measured(3), [Resize(9), Crop(8), ToTensor()], 4),
        (Measured(3), [Resize(8), Crop(8), Flip(0.5), ToTensor()], 4),
        (Measured(3, broken=[1]), [Resize(8), Crop(8), ToTensor()], 1),
        (Measured(3), [Resize(8), Crop(8), Order()], 4),  # a transform without `effect`
        (Photos(3, size=(20, 20)), [Resize(8), Crop(8), ToTensor()], 4),  # unknown sizes
        (Photos(3), [Resize(8), ToTensor()], 1),
    ],
)
def test_one_variation_if_nothing_random_changes_the_image(dataset, image_transforms, variations):
    assert Stream(dataset, image_transforms, [], image_variations=4).variations == variations
    assert Stream(dataset, image_transforms, []).variations == (1 if variations == 1 else None)


@pytest.mark.parametrize("size", [(20, 20), (14, 11), (11, 14), (3, 200), (1000, 1), (8, 8), (5, 7)])
def test_transforms_predict_the_size(size):
    sample = {"image": Image.new("RGB", size)}
    for transform in (Resize(8), Flip(1.0), Crop(8)):
        size, _ = transform.effect(size)
        sample = transform(sample, np.random.default_rng(0))
        assert sample["image"].size == size


def test_replacement_image_has_the_variations_of_its_own_index():
    ours = stream(Photos(3, broken=[0]), image_variations=1, skip_unreadable=True)
    for position in range(6):
        _, index = ours.locate(position)
        assert torch.equal(ours[position]["image"], ours.read_variations([index or 1])[0]["image"])


def test_error_if_no_image_can_be_read():
    with pytest.raises(UserError, match=r"none of the 3 images can be read; the last: image . cannot be read"):
        Stream(Photos(3, broken=range(3)), [], [], skip_unreadable=True)[0]


def test_wrong_options_of_a_stream():
    with pytest.raises(UserError, match="data set is empty"):
        Stream(Photos(0), [], [])
    with pytest.raises(UserError, match="image_variations got 0"):
        Stream(Photos(1), [], [], image_variations=0)
    with pytest.raises(UserError, match="num_workers got -1"):
        make_loader(stream(), PositionSampler(1), -1)


@pytest.mark.parametrize("workers", [0, 1])
def test_error_in_a_worker_keeps_its_message(workers):
    ours = Stream(Photos(4, broken=[2]), [ToTensor()], [])
    loader = batches_of(make_loader(ours, PositionSampler(1, num_steps=4), workers))
    good = [ours.locate(position)[1] for position in range(4)].index(2)
    assert [int(next(loader)["text"][0]) for _ in range(good)] == [ours.locate(position)[1] for position in range(good)]
    with pytest.raises(UnreadableImage) as caught:
        next(loader)
    assert str(caught.value) == "image 2 cannot be read"


class CountThreads:
    def __call__(self, sample, rng):
        return {**sample, "threads": torch.get_num_threads()}


def test_workers_use_one_thread_and_keep_the_global_rng():
    before = torch.get_rng_state()
    (batch,) = make_loader(Stream(Photos(2), [], [CountThreads()]), PositionSampler(2, num_steps=1), 1)
    assert batch["threads"] == [1, 1]
    assert torch.equal(torch.get_rng_state(), before)


def test_collate_stacks_tensors_and_lists_the_rest():
    arrays = [np.arange(2), np.arange(3)]
    samples = [{"image": torch.full((3, 2, 2), row), "text": "ab"[row], "order": arrays[row]} for row in (0, 1)]
    batch = collate(samples)
    assert batch["image"].shape == (2, 3, 2, 2)
    assert batch["image"][1].unique().tolist() == [1]
    assert plain({key: batch[key] for key in ("text", "order", "num_targets")}) == {
        "text": ["a", "b"],
        "order": [[0, 1], [0, 1, 2]],
        "num_targets": [1, 1],
    }
    assert collate([{"num_targets": 3}, {"num_targets": 4}])["num_targets"] == [3, 4]
    mixed = collate([samples[0], {**samples[1], "image": torch.zeros(3, 1, 1)}])
    assert [image.shape for image in mixed["image"]] == [(3, 2, 2), (3, 1, 1)]


def test_batch_has_weights_if_a_sample_has_one():
    assert "weight" not in collate([{"text": "a"}, {"text": "b"}])
    assert collate([{"text": "a"}, {"text": "b", "weight": 2}])["weight"] == [1.0, 2.0]
    assert collate([{"weight": 0.5}, {}])["weight"] == [0.5, 1.0]
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"got weight {float(weight)}; expected a finite number above 0"):
            collate([{"weight": weight}])


@pytest.mark.parametrize(("num_samples", "batch_size"), [(5, 4), (8, 4), (3, 8)])
def test_epoch_ends_with_the_step_that_completes_it(num_samples, batch_size):
    for epochs in range(1, 6):
        steps = steps_for_epochs(epochs, num_samples, batch_size)
        assert steps * batch_size >= epochs * num_samples > (steps - 1) * batch_size


class Tagged(Photos):
    """Images with two lists of eight tags each to choose a caption from; the last two images have one caption."""

    def __getitem__(self, index):
        names = "ab" if index < self.count - 2 else "z"
        texts = [", ".join(f"{name}{min(index, self.count - 2)}{tag}" for tag in range(8)) for name in names]
        return {**super().__getitem__(index), "text": texts}


TAGS = {"dataset": Tagged(5), "vary_caption": VaryTags(drop=0.3)}


def varied(text, *counter):
    """What `VaryTags(drop=0.3)` makes of eight tags by the random numbers of a counter."""
    first, *rest = text.split(", ")
    ranks, shares = generator(3, CAPTION, *counter).random((2, 7))
    order = sorted(range(7), key=lambda tag: ranks[tag])
    return ", ".join([first, *(rest[tag] for tag in order if shares[tag] >= 0.3)])


@pytest.mark.parametrize("variations", [None, 3])
def test_tags_vary_by_position_or_in_turn(variations):
    """And nothing else changes: neither which caption is chosen, nor what the other transforms draw."""
    plain_stream, tagged = stream(Tagged(5)), stream(**TAGS, caption_variations=variations)
    seen = {}
    for position in range(60):
        before, after = plain(plain_stream[position]), plain(tagged[position])
        text = before.pop("text")
        counter = (position,) if variations is None else (digest_of(text.encode()), position // 5 % 3)
        assert after.pop("text") == (varied(text, *counter) if text else "")
        seen.setdefault(text, set()).add(varied(text, *counter) if text else "")
        assert before == after
    assert len(seen) == 1 + 2 * 3 + 1
    for text in seen.keys() - {""}:
        of_text = [varied(text, digest_of(text.encode()), number) for number in range(variations or 0)]
        assert tagged.variations_of(text) == of_text
        assert variations is None or seen[text] <= set(of_text)
    assert variations is not None or sum(map(len, seen.values())) > 1 + 3 * 7
    assert plain_stream.variations_of("a, b, c") == []


@pytest.mark.parametrize("variations", [None, 3])
def test_varied_captions_do_not_depend_on_workers_and_ranks(variations):
    def texts(workers=0, **options):
        ours = stream(**TAGS, caption_variations=variations)
        return [batch["text"] for batch in make_loader(ours, PositionSampler(4, num_steps=6, **options), workers)]

    whole = texts()
    assert texts(1) == texts(2) == whole
    assert [one + two for one, two in zip(*(texts(rank=rank, world_size=2) for rank in (0, 1)))] == whole


def test_fixed_samples_have_captions_as_they_are():
    data, tagged = Tagged(5), stream(**TAGS)
    assert [tagged.fixed_sample(index)["text"] for index in range(5)] == [data[index]["text"] for index in range(5)]
