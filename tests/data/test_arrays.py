"""Arrays of one's own: what a file holds is what training sees, and each wrong file is one clear error."""

import jax
import numpy as np
import pytest

from diffjax.contracts import Batch, Condition
from diffjax.data import sources
from diffjax.errors import UserError
from tests.data import configs
from tests.data.seen import Batches

COUNT, SIZE, CLASSES = 12, 4, 5
NUMBERS = np.arange(COUNT)
LABELS = (NUMBERS % CLASSES).astype(np.int64)
TOKENS = ((NUMBERS[:, None] + np.arange(3)) % 50).astype(np.uint16)
VECTORS = NUMBERS[:, None] + np.array([0.25, 0.5])
KINDS = {
    "labels": (LABELS, {"num_classes": CLASSES}, Condition("labels", CLASSES)),
    "tokens": (TOKENS, {"condition": "tokens", "num_classes": 50, "condition_size": 3}, Condition("tokens", 50, (3,))),
    "vectors": (
        VECTORS,
        {"condition": "vectors", "num_classes": 0, "condition_size": 2},
        Condition("vectors", 0, (2,)),
    ),
}


def pictures() -> np.ndarray:
    """The example's number in the left half, so that a mirrored image is known."""
    images = np.zeros((COUNT, SIZE, SIZE, 3), np.uint8)
    images[:, :, : SIZE // 2] = NUMBERS[:, None, None, None] + 1
    return images


def stored(**changes) -> dict[str, np.ndarray]:
    """Images, labels, a map for each image and a number for each image; None leaves an array out."""
    depth = pictures()[..., 0].astype(np.float32) / 2
    arrays = {"images": pictures(), "conditions": LABELS, "image_depth": depth, "score": NUMBERS.astype(np.float32)}
    return {name: array for name, array in (arrays | changes).items() if array is not None}


def section(root, **leaves) -> configs.Section:
    return configs.section(
        "arrays", **({"size": SIZE, "channels": 3, "num_classes": CLASSES, "dir": str(root), "split": "train"} | leaves)
    )


def written(root, **changes):
    np.savez(root / "train.npz", **stored(**changes))
    return root


def numbers(batch: Batch) -> np.ndarray:
    """Which examples a batch holds."""
    return np.rint((batch.x.max(axis=(1, 2, 3)) + 1) * 127.5).astype(int) - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "workers, hosts",
    [(0, 1), (0, 2), *(pytest.param(1, hosts, marks=pytest.mark.slow) for hosts in (1, 2))],
)
def test_batches_hold_conditions_and_auxiliary_arrays_of_their_examples(tmp_path, kind, workers, hosts):
    conditions, leaves, condition = KINDS[kind]
    source = sources.load(**section(written(tmp_path, conditions=conditions), **leaves))
    assert source.condition == condition
    assert len(source.examples) == COUNT
    streams = [
        Batches(source, batch_size=8, seed=3, flip=True, workers=workers, process_index=i, process_count=hosts)
        for i in range(hosts)
    ]
    batches = [[next(stream) for _ in range(3)] for stream in streams]
    for stream in streams:
        stream.close()
    drawn = [batch for stream in batches for batch in stream]
    for batch in drawn:
        which = numbers(batch)
        assert (batch.x.dtype, batch.condition.dtype) == (np.float32, condition.dtype)
        assert batch.condition.shape == (8 // hosts, *condition.shape)
        np.testing.assert_array_equal(batch.condition, conditions[which].astype(condition.dtype))
        assert list(batch.aux) == ["image_depth", "score"]
        np.testing.assert_array_equal(batch.aux["score"], which)
        # the map is mirrored where its image is
        np.testing.assert_array_equal(batch.aux["image_depth"], np.rint((batch.x[..., 0] + 1) * 127.5) / 2)
    mirrored = np.concatenate([batch.aux["image_depth"][:, 0, 0] == 0 for batch in drawn])
    assert 0 < mirrored.sum() < len(mirrored)
    plain = Batches(source, batch_size=8, seed=3, flip=True, threads=0)
    for step in range(3):
        whole = next(plain)
        for host in range(hosts):
            parts, expected = jax.tree.leaves(batches[host][step]), jax.tree.leaves(whole)
            for part, array in zip(parts, expected, strict=True):
                np.testing.assert_array_equal(part, array[host::hosts])
    plain.close()


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.float32, np.int32])
@pytest.mark.parametrize("shape", [(), (2,)])
def test_a_map_of_any_dtype_and_depth_is_mirrored(tmp_path, dtype, shape):
    maps = (
        (np.arange(COUNT * SIZE * SIZE * max(sum(shape), 1)) % 7 % 2).astype(dtype).reshape(COUNT, SIZE, SIZE, *shape)
    )
    source = sources.load(**section(written(tmp_path, image_mask=maps)))
    batches = Batches(source, batch_size=COUNT, seed=0, flip=True)
    batch = next(batches)
    batches.close()
    mirrored = batch.x[:, 0, 0, 0] == -1
    assert 0 < mirrored.sum() < COUNT
    expected = [maps[n][:, ::-1] if flipped else maps[n] for n, flipped in zip(numbers(batch), mirrored)]
    np.testing.assert_array_equal(batch.aux["image_mask"], expected)
    assert batch.aux["image_mask"].dtype == dtype


def test_without_conditions_there_is_none(tmp_path):
    for arrays in ({"conditions": None}, {}):  # those of the file are not read without classes
        source = sources.load(**section(written(tmp_path, **arrays), num_classes=0))
        assert source.condition is None
        assert {int(source.examples[i]["label"]) for i in range(COUNT)} == {0}


def test_images_are_pixels_to_evaluations(tmp_path):
    images, labels = sources.arrays(sources.load(**section(written(tmp_path))))
    np.testing.assert_array_equal(images, pictures())
    np.testing.assert_array_equal(labels, LABELS)


def test_the_split_names_the_file_and_the_fingerprint_follows_its_bytes(tmp_path):
    before = sources.load(**section(written(tmp_path))).fingerprint
    assert sources.load(**section(tmp_path)).fingerprint == before
    (tmp_path / "test.npz").write_bytes((tmp_path / "train.npz").read_bytes())
    assert sources.load(**section(tmp_path, split="test")).fingerprint == before | {"split": "test"}
    assert sources.load(**section(written(tmp_path, score=-NUMBERS))).fingerprint != before


TOKEN_LEAVES, VECTOR_LEAVES = KINDS["tokens"][1], KINDS["vectors"][1]


@pytest.mark.parametrize(
    "changes, leaves, match",
    [
        ({"images": None}, {}, r"images: none; valid: uint8 \[n, h, h, c\]"),
        ({"images": pictures().astype(np.float32)}, {}, r"images: float32 \[12, 4, 4, 3\]; valid: uint8"),
        ({"images": pictures()[..., 0]}, {}, r"images: uint8 \[12, 4, 4\]; valid: uint8 \[n, h, h, c\]"),
        ({"images": pictures()[:, :3]}, {}, r"images: uint8 \[12, 3, 4, 3\]; valid"),
        ({"score": NUMBERS[:5]}, {}, "score: not as many as the 12 images"),
        ({"conditions": LABELS[:5]}, {}, "conditions: not as many as the 12 images"),
        ({"score": np.float32(1)}, {}, "score: not as many as the 12 images"),
        ({"image_weight": NUMBERS}, {}, r"image_weight: \[12\]; valid: \[n, h, w\] or"),
        ({"score": NUMBERS * np.nan}, {}, "score: not all values are finite"),
        ({"names": np.array(["a"] * COUNT)}, {}, "names: <U1; valid: numbers, true and false"),
        ({"conditions": None}, {}, r"conditions: none; the config says labels \[12\]"),
        ({"conditions": LABELS + 0.5}, {}, r"conditions: float64 \[12\]; the config says labels \[12\]"),
        ({"conditions": TOKENS}, {}, r"conditions: uint16 \[12, 3\]; the config says labels \[12\]"),
        ({"conditions": LABELS + 1}, {}, "conditions from 1 to 5; valid: 0 to 4"),
        ({"conditions": LABELS - 1}, {}, "conditions from -1 to 3; valid: 0 to 4"),
        ({"conditions": LABELS}, TOKEN_LEAVES, r"conditions: int64 \[12\]; the config says tokens \[12, 3\]"),
        ({"conditions": TOKENS[:, :2]}, TOKEN_LEAVES, r"uint16 \[12, 2\]; the config says tokens \[12, 3\]"),
        ({"conditions": TOKENS + 50}, TOKEN_LEAVES, "conditions from 50 to 63; valid: 0 to 49"),
        ({"conditions": TOKENS[:, :2]}, VECTOR_LEAVES, r"uint16 \[12, 2\]; the config says vectors \[12, 2\]"),
        ({"conditions": VECTORS[:, :1]}, VECTOR_LEAVES, r"float64 \[12, 1\]; the config says vectors \[12, 2\]"),
        ({"conditions": VECTORS + np.nan}, VECTOR_LEAVES, "conditions are not all finite"),
        ({"conditions": VECTORS + 1e300}, VECTOR_LEAVES, "conditions are not all finite numbers of float32"),
        ({"conditions": TOKENS}, TOKEN_LEAVES | {"condition_size": 0}, "condition_size = 0: valid: tokens with"),
        ({}, {"size": 8}, "data.size=8, but arrays has size=4"),
        ({}, {"channels": 1}, "data.channels=1, but arrays has channels=3"),
        ({}, {"split": "test"}, r"test\.npz: no such file; data.name = 'arrays' reads images"),
    ],
)
def test_refusals(tmp_path, changes, leaves, match):
    written(tmp_path, **changes)
    with pytest.raises(UserError, match=match) as raised:
        sources.load(**section(tmp_path, **leaves))
    assert "\n" not in str(raised.value)


def test_no_images_at_all(tmp_path):
    written(tmp_path, **{name: array[:0] for name, array in stored().items()})
    with pytest.raises(UserError, match="has no examples"):
        sources.load(**section(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "pickle", "npy"])
def test_a_damaged_file(tmp_path, damage):
    path = written(tmp_path) / "train.npz"
    if damage == "pickle":
        np.savez(path, **stored(names=np.array([{}] * COUNT, object)))
    elif damage == "npy":
        with path.open("wb") as file:
            np.save(file, pictures())
    else:
        path.write_bytes({"cut": path.read_bytes()[:-200], "text": b"a b c", "empty": b""}[damage])
    with pytest.raises(UserError, match=r"train\.npz: not an npz file of arrays \(.+\)$") as raised:
        sources.load(**section(tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["tokens", "vectors"])
def test_other_sources_hold_labels_alone(kind):
    with pytest.raises(UserError, match=f"data.condition='{kind}', but digits holds labels; valid: labels"):
        sources.load(**configs.digits(condition=kind, condition_size=3))
