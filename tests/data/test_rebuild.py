"""The embedded sets are rebuilt from archives of the packages' layout; here from small ones made up on the spot."""

import gzip
import io
import json
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from diffjax.data import embedded
from diffjax.data.embedded import rebuild


@pytest.fixture
def wheel(tmp_path):
    """Two digits in the layout of scikit-learn."""
    rows = [[*range(17), *[0] * 47, 3], [*[16] * 64, 5]]
    text = "\n".join(",".join(f"{value:.1f}" for value in row) for row in rows)
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("sklearn/datasets/data/digits.csv.gz", gzip.compress(text.encode()))
    return tmp_path / "a.whl"


@pytest.fixture
def tarball(tmp_path):
    """Three pictures in the layout of the npm package: opaque red, transparent, and a part of others."""
    pictures = {
        "red": ("Symbols", (255, 0, 0, 255)),
        "clear": ("Flags", (9, 9, 9, 0)),
        "hair": ("Component", (0, 0, 0, 255)),
    }
    entries = [{"image": f"{name}.png", "category": category} for name, (category, _) in pictures.items()]
    files = {"package/emoji.json": json.dumps(entries).encode(), "package/README.md": b"not wanted"}
    for name, (_, colour) in pictures.items():
        encoded = io.BytesIO()
        Image.new("RGBA", (64, 64), colour).save(encoded, "PNG")
        files[f"package/img/google/64/{name}.png"] = encoded.getvalue()
    with tarfile.open(tmp_path / "b.tgz", "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return tmp_path / "b.tgz"


def test_digits(wheel):
    arrays = rebuild.digits(wheel)
    assert arrays["images"].shape == (2, 8, 8, 1)
    assert arrays["images"][0].ravel()[:17].tolist() == [round(value * 255 / 16) for value in range(17)]
    assert arrays["images"][1].min() == 255
    assert arrays["labels"].tolist() == [3, 5]


def test_emoji(tarball):
    arrays = rebuild.emoji(tarball)
    assert arrays["names"].tolist() == ["Flags", "Symbols"]
    assert arrays["labels"].tolist() == [1, 0]
    np.testing.assert_array_equal(arrays["images"], [np.full((32, 32, 3), (255, 0, 0)), np.full((32, 32, 3), 255)])


def test_the_command_says_whether_it_matches(wheel, tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "diffjax.data.embedded.rebuild", *arguments], capture_output=True, text=True
        )

    other = run(f"--digits={wheel}", f"--out={tmp_path}")
    assert other.returncode == 1
    assert f"expected {embedded.SHA256['digits8.npz']}" in other.stdout
    with np.load(tmp_path / "digits8.npz") as written:
        assert embedded.sha256(dict(written)) in other.stdout
    missing = run(f"--emoji={tmp_path / 'missing.tgz'}")
    assert missing.returncode == 2
    assert "npm pack emoji-datasource-google" in missing.stderr
    assert run().returncode == 2
