"""Folders of images and data sets prepared by tensorflow_datasets."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from diffjax.data import sources
from diffjax.data.images import list_images
from diffjax.data.transforms import adm_center_crop
from diffjax.errors import UserError
from tests.data import configs
from tests.data.seen import Batches


def picture(number: int, width: int = 40, height: int = 24) -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def folder(root, **leaves):
    return configs.section(
        "folder",
        **({"size": 16, "channels": 3, "num_classes": 2, "dir": str(root), "split": "", "crop": "adm"} | leaves),
    )


@pytest.fixture
def tree(tmp_path):
    """Two classes, one with a nested folder; names whose plain string order would mix the classes."""
    for number, name in enumerate(["dog/b.png", "dog/a.PNG", "dog big/deep/z.png", "dog big/y.png"]):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    return tmp_path


def test_folder_order_labels_and_crop(tree):
    source = sources.load(**folder(tree))
    assert source.examples.files == ["dog/a.PNG", "dog/b.png", "dog big/deep/z.png", "dog big/y.png"]
    images, labels = sources.arrays(source)
    assert list(labels) == [0, 0, 1, 1]
    assert images.shape == (4, 16, 16, 3)
    for image, number in zip(images, (1, 0, 2, 3)):
        np.testing.assert_array_equal(image, adm_center_crop(picture(number), 16))


def test_folder_split_is_a_sub_folder(tree):
    source = sources.load(**folder(tree.parent, split=tree.name))
    assert len(source.examples) == 4


@pytest.mark.parametrize("split", ["..", "a/../..", "/tmp"])
@pytest.mark.parametrize("name", ["folder", "latents", "arrays"])
def test_a_split_lies_in_its_folder(tmp_path, name, split):
    extra = {"crop": "adm"} if name == "folder" else {}
    with pytest.raises(UserError, match=r"data\.split='.*' leads out of data\.dir="):
        sources.load(**configs.section(name, 16, 3, 0, dir=str(tmp_path), split=split, **extra))


def test_folder_without_labels(tree):
    assert set(sources.arrays(sources.load(**folder(tree, num_classes=0)))[1]) == {0}
    flat = sources.load(**folder(tree / "dog", num_classes=0))
    assert flat.examples.files == ["a.PNG", "b.png"]


def test_folder_fingerprint_follows_the_files(tree):
    before = sources.load(**folder(tree)).fingerprint
    assert sources.load(**folder(tree)).fingerprint == before
    (tree / "dog" / "a.PNG").rename(tree / "dog" / "c.png")
    assert sources.load(**folder(tree)).fingerprint != before


def test_exif_rotation_is_applied_unless_files_are_read_as_stored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees to view
    top = Image.new("RGB", (16, 16), "white")
    top.paste((0, 0, 0), (0, 0, 16, 8))
    top.save(tmp_path / "rotated.png", exif=exif)
    image = only(tmp_path, decode="stored")
    assert image[:8].max() == 0
    assert image[8:].min() == 255
    np.testing.assert_array_equal(only(tmp_path), np.rot90(image, -1))


def only(root, **leaves) -> np.ndarray:
    """The only picture of a folder."""
    [example] = sources.load(**folder(root, **({"num_classes": 0, "crop": "none"} | leaves))).examples
    return example["image"]


RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257


@pytest.mark.parametrize("name, offset", [("a.png", 0), ("a.tif", 100), ("a.png", -100)])
def test_sixteen_bits_of_grey_are_scaled(tmp_path, name, offset):
    Image.fromarray((RAMP.astype(int) + offset).clip(0, 65535).astype(np.uint16)).save(tmp_path / name)
    np.testing.assert_array_equal(only(tmp_path), (RAMP // 257)[..., None].repeat(3, -1))
    with pytest.raises(UserError, match=r"a\.\w+ cannot be decoded: 16 bits of grey would all become white; .*'shown'"):
        only(tmp_path, decode="stored")


def test_a_transparent_value_of_sixteen_bits_is_white(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.png", transparency=257)
    assert list(only(tmp_path)[0, :3, 0]) == [0, 255, 2]


@pytest.mark.parametrize("values", [RAMP.astype(np.int32), RAMP.astype(np.float32)])
def test_thirty_two_bits_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif cannot be decoded: 32 bits of grey .* valid: 8 or 16 bits"):
        only(tmp_path)


@pytest.mark.parametrize(
    "values, said",
    [(RAMP.astype(np.int32), "32 bits of grey .* valid: 8 or 16 bits$"), (None, "cannot identify image file '.*'$")],
)
def test_what_headers_tell_is_known_when_the_folder_is_opened(tmp_path, values, said):
    """The limits of the decoder are not what is wrong, and not said."""
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    if values is None:
        (tmp_path / "b.tif").write_bytes(b"no image")
    else:
        Image.fromarray(values).save(tmp_path / "b.tif")
    with pytest.raises(UserError, match=rf"b\.tif cannot be decoded: {said}"):
        sources.load(**folder(tmp_path, num_classes=0))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white_whatever_lies_under_it(tmp_path, mode):
    pictures = []
    for hidden in (0, 255):
        picture = Image.new("RGBA", (16, 16), (hidden, hidden, hidden, 0))
        picture.paste((20, 20, 20, 255), (4, 4, 8, 8))
        picture.convert(mode).save(tmp_path / "a.png")
        pictures.append(only(tmp_path))
    np.testing.assert_array_equal(*pictures)
    assert list(pictures[0][0, 0]) == [255, 255, 255]
    assert abs(int(pictures[0][5, 5, 0]) - 20) < 3  # a palette has not every grey


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    Image.new("RGBA", (16, 16), (0, 100, 255, 51)).save(tmp_path / "a.png")
    assert list(only(tmp_path)[0, 0]) == [204, 224, 255]
    assert list(only(tmp_path, decode="stored")[0, 0]) == [0, 100, 255]


def test_pictures_beyond_the_limits_of_the_decoder_are_named(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png", icc_profile=b"\0" * (2 << 20))
    with pytest.raises(UserError, match=r"a\.png cannot be decoded: .*; what is read: .* 1 MiB of colour profile"):
        only(tmp_path)
    (tmp_path / "a.png").unlink()
    Image.new("1", (20000, 20000)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"b\.png cannot be decoded: .*pixels.*; what is read: at most 178"):
        only(tmp_path)


@pytest.mark.parametrize("suffix", ["bmp", "tif", "gif", "jfif", "webp", "TIFF"])
def test_every_class_counts_whatever_the_format_of_its_files(tmp_path, suffix):
    for name in ("a/0.png", f"b/0.{suffix}", "c/0.png"):
        (tmp_path / name).parent.mkdir()
        picture(0).save(tmp_path / name)
    source = sources.load(**folder(tmp_path, num_classes=3))
    assert source.classes == ("a", "b", "c")
    assert list(sources.arrays(source)[1]) == [0, 1, 2]


def test_a_class_without_images_is_refused(tree):
    (tree / "cat").mkdir()
    (tree / "cat" / "a.heic").write_bytes(b"")
    for classes in (2, 3):
        with pytest.raises(UserError, match=r"class folder 'cat' holds no image that is read \(\.bmp, "):
            sources.load(**folder(tree, num_classes=classes))
    assert len(sources.load(**folder(tree, num_classes=0)).examples) == 4


def test_what_was_found_and_what_was_left_out_is_said(tree):
    (tree / "dog" / ".hidden.png").write_text("not listed")
    (tree / "dog" / "raw").write_text("")
    (tree / "dog" / "again").symlink_to(tree / "dog")
    (tree / "dog" / "again.png").symlink_to(tree / "dog" / "b.png")
    assert sources.load(**folder(tree)).describe() == (
        "4 images of folder, 2 classes: dog, dog big; left out: files that are no images (1 without a suffix, "
        "1 .txt) and 2 links to files listed already"
    )
    assert (
        sources.load(**folder(tree, num_classes=0))
        .describe()
        .endswith(
            "no classes; left out: files that are no images (1 without a suffix, 1 .txt) and 2 links to files listed "
            "already and the names of 2 sub-folders (classes with data.num_classes=2)"
        )
    )
    assert sources.load(**configs.digits()).describe() == (
        "1,500 images of digits, 10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    )


def test_sub_folders_that_could_not_be_classes_are_not_offered(tree, tmp_path):
    unlabelled = lambda: sources.load(**folder(tree, num_classes=0)).describe()  # noqa: E731
    assert "data.num_classes=2" in unlabelled()
    (tree / "empty").mkdir()
    assert "sub-folders" not in unlabelled()
    (tree / "empty").rmdir()
    picture(0).save(tree / "loose.png")
    assert "sub-folders" not in unlabelled()
    assert "sub-folders" not in sources.load(**folder(tree / "dog", num_classes=0)).describe()


def test_links_are_followed_and_each_file_is_listed_once(tmp_path):
    outside = tmp_path / "outside"
    for path in ("set/a/0.png", "set/b/0.png", "outside/1.png", "pool/2.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        picture(0).save(tmp_path / path)
    root = tmp_path / "set"
    (root / "a" / "latest").symlink_to(".")
    (root / "a" / "up").symlink_to(root)
    (root / "b" / "linked").symlink_to(outside)
    (outside / "back").symlink_to(root)
    (root / "b" / "2.png").symlink_to(tmp_path / "pool" / "2.png")
    (root / "b" / "3.png").symlink_to(tmp_path / "pool" / "2.png")
    found = list_images(root)
    assert found.images == ["a/0.png", "b/0.png", "b/2.png", "b/linked/1.png"]
    assert (found.folders, found.repeated) == (["a", "b"], 4)
    (root / "b" / "gone.png").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"gone\.png cannot be decoded: .*No such file"):
        sources.arrays(sources.load(**folder(root, num_classes=0)))


def test_folder_refusals(tree):
    with pytest.raises(UserError, match=r"data\.dir is empty: give the folder of images"):
        sources.load(**folder(""))
    with pytest.raises(UserError, match=r"missing.* is no folder; .* in one sub-folder per class"):
        sources.load(**folder(tree / "missing"))
    with pytest.raises(UserError, match=r"data\.num_classes=3, but folder has num_classes=2: dog, dog big"):
        sources.load(**folder(tree, num_classes=3))
    with pytest.raises(UserError, match=r"2 images and no folders; labels need one sub-folder per class"):
        sources.load(**folder(tree / "dog"))
    picture(9).save(tree / "loose.png")
    with pytest.raises(UserError, match=r"loose\.png lies beside class folders"):
        sources.load(**folder(tree))
    (tree / "empty").mkdir()
    with pytest.raises(UserError, match=r"data\.decode='seen' is unknown; valid: shown, stored"):
        sources.load(**folder(tree, decode="seen"))
    with pytest.raises(UserError, match="has no examples"):
        sources.load(**folder(tree / "empty", num_classes=0))


@pytest.mark.parametrize("workers, threads", [(0, 0), (0, 2), (1, 0)])
def test_a_damaged_image_is_named_also_by_threads_and_workers(tmp_path, workers, threads):
    picture(0).save(tmp_path / "whole.jpeg")
    (tmp_path / "half.jpeg").write_bytes((tmp_path / "whole.jpeg").read_bytes()[:1000])
    source = sources.load(**folder(tmp_path, num_classes=0))
    batches = Batches(source, batch_size=2, seed=0, flip=False, workers=workers, threads=threads)
    with pytest.raises(UserError, match=r"half\.jpeg cannot be decoded: image file is truncated[^;]*$"):
        next(batches)
    batches.close()


COUNT = 7


def tiny(width: int, height: int, file_format: str, root):
    """Prepares a data set of COUNT grey-valued PNG images without tensorflow and returns its builder."""
    import tensorflow_datasets as tfds

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "tiny"
        __module__ = "tiny"  # as if from a script: a package member would be looked up with importlib_resources
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Image(shape=(height, width, 3), encoding_format="png")
            features = {"image": image, "label": tfds.features.ClassLabel(num_classes=3)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number in range(COUNT):
                encoded = io.BytesIO()
                Image.new("RGB", (width, height), (number, number, number)).save(encoded, "PNG")
                encoded.seek(0)
                yield number, {"image": encoded, "label": number % 3}

    builder = Tiny(data_dir=str(root), file_format=file_format)
    builder.download_and_prepare()
    return builder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return tiny(24, 16, "array_record", tmp_path_factory.mktemp("prepared"))


def tfds(dataset, root, **leaves):
    common = {"size": 8, "channels": 3, "num_classes": 3, "dataset": dataset, "dir": str(root), "crop": "adm"}
    return configs.section("tfds", **(common | leaves))


@pytest.mark.parametrize("by_name", [True, False])
def test_tfds_by_name_and_by_directory(prepared, by_name):
    data = tfds("tiny", prepared.data_path.parents[1]) if by_name else tfds("", prepared.data_path)
    images, labels = sources.arrays(sources.load(**data))
    assert images.shape == (COUNT, 8, 8, 3)
    values = images[:, 0, 0, 0]
    assert sorted(values) == list(range(COUNT))  # stored shuffled
    np.testing.assert_array_equal(labels, values % 3)
    assert "tensorflow" not in sys.modules


def test_tfds_sub_split_unlabelled_and_fingerprint(prepared):
    part = sources.load(**tfds("", prepared.data_path, split="train[:3]", num_classes=0))
    assert len(part.examples) == 3
    assert set(sources.arrays(part)[1]) == {0}
    assert part.fingerprint != sources.load(**tfds("", prepared.data_path)).fingerprint


def test_tfds_feeds_workers(prepared):
    source = sources.load(**tfds("", prepared.data_path))
    for workers in (0, 1):
        batches = Batches(source, batch_size=COUNT, seed=0, flip=False, workers=workers)
        values = np.rint((next(batches).x[:, 0, 0, 0] + 1) * 127.5)
        batches.close()
        assert sorted(values) == list(range(COUNT))


def test_tfds_refuses_a_size_that_would_need_a_crop(prepared, tmp_path):
    with pytest.raises(UserError, match=r"data\.crop='resize' is not a crop; valid: adm, none"):
        sources.load(**tfds("", prepared.data_path, crop="resize"))
    with pytest.raises(UserError, match=r"data\.size=8, but tfds has size=16"):
        sources.load(**tfds("", prepared.data_path, crop="none"))
    source = sources.load(**tfds("", prepared.data_path, crop="none", size=16))  # the width differs
    with pytest.raises(UserError, match=r"is 24x16, data\.size=16, and data\.crop='none'"):
        source.examples[0]
    square = tiny(16, 16, "array_record", tmp_path)
    assert sources.arrays(sources.load(**tfds("", square.data_path, crop="none", size=16)))[0].shape == (
        COUNT,
        16,
        16,
        3,
    )


def test_tfds_refusals_print_the_command(prepared, tmp_path):
    call = f"tfds.builder('cifar10', data_dir='{tmp_path}', file_format='array_record').download_and_prepare()"
    with pytest.raises(UserError, match=r"cifar10/\S+ is not prepared in .* pip install -e '.\[prepare\]'") as error:
        sources.load(**tfds("cifar10", tmp_path))
    assert str(error.value).endswith(f'python -c "import tensorflow_datasets as tfds; {call}"')
    with pytest.raises(UserError, match=rf"after placing its files in {tmp_path}/downloads/manual$"):
        sources.load(**tfds("imagenet2012", tmp_path, num_classes=1000))
    with pytest.raises(UserError, match=r"Dataset cifar11 not found\.; prepare it once with"):
        sources.load(**tfds("cifar11", tmp_path))
    with pytest.raises(UserError, match=r"Could not read dataset info .* tfds\.builder\('<name>', data_dir="):
        sources.load(**tfds("", tmp_path))
    with pytest.raises(UserError, match=r"data\.split='test' is not a split of tiny/1\.0\.0; valid: train"):
        sources.load(**tfds("", prepared.data_path, split="test"))
    parquet = tiny(16, 16, "parquet", tmp_path)
    with pytest.raises(UserError, match="is in format parquet, not array_record"):
        sources.load(**tfds("", parquet.data_path))


def test_folder_without_a_crop_takes_only_its_size(tmp_path):
    Image.new("RGB", (16, 16), (1, 2, 3)).save(tmp_path / "a.png")
    source = sources.load(**folder(tmp_path, num_classes=0, crop="none"))
    np.testing.assert_array_equal(source.examples[0]["image"][0, 0], [1, 2, 3])
    Image.new("RGB", (20, 16)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"b.png is 20x16, data.size=16, and data.crop='none'"):
        sources.load(**folder(tmp_path, num_classes=0, crop="none")).examples[1]
    with pytest.raises(UserError, match="data.crop='square' is not a crop"):
        sources.load(**folder(tmp_path, num_classes=0, crop="square"))
