"""Rebuild the embedded image sets from the public packages they were derived from, and compare the arrays.

    pip download scikit-learn==1.9.1 --no-deps --only-binary :all:
    npm pack emoji-datasource-google@16.0.0
    python -m diffjax.data.embedded.rebuild --digits=<scikit-learn wheel> --emoji=<npm tarball> [--out=DIR]

Nothing is downloaded here. The SHA-256 compared is that of the arrays (see diffjax.data.embedded): files that are
equal in content may differ in their zip bytes. Exit code 0: every set that was asked for matches.

digits8: scikit-learn's digits.csv.gz in file order, 8x8 values 0..16 -> round(v * 255 / 16).
emoji32: entries of emoji.json in file order without category "Component" (skin tones are variations, not entries);
the 64x64 picture on white, halved by exact 2x2 means; label = rank of the category's name.
"""

import argparse
import gzip
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from diffjax.data import embedded

COMMANDS = __doc__.split("\n\n")[1]


def digits(wheel: Path) -> dict[str, np.ndarray]:
    """images uint8 [1797, 8, 8, 1], labels and names from a scikit-learn wheel."""
    with zipfile.ZipFile(wheel) as archive:
        text = gzip.decompress(archive.read("sklearn/datasets/data/digits.csv.gz")).decode()
    table = np.loadtxt(io.StringIO(text), delimiter=",")
    values, labels = table[:, :-1], table[:, -1]
    images = np.rint(values * 255 / 16).astype(np.uint8).reshape(-1, 8, 8, 1)
    return {"images": images, "labels": labels.astype(np.uint8), "names": np.array([str(digit) for digit in range(10)])}


def emoji(tarball: Path) -> dict[str, np.ndarray]:
    """images uint8 [1906, 32, 32, 3], labels and names from the npm tarball of emoji-datasource-google."""
    with tarfile.open(tarball) as archive:
        contents = {member.name: archive.extractfile(member).read() for member in archive if _wanted(member)}  # type: ignore[union-attr]
    entries = [entry for entry in json.loads(contents["package/emoji.json"]) if entry["category"] != "Component"]
    names = sorted({entry["category"] for entry in entries})
    images = [_on_white(contents[f"package/img/google/64/{entry['image']}"]) for entry in entries]
    labels = [names.index(entry["category"]) for entry in entries]
    return {"images": np.stack(images), "labels": np.array(labels, np.uint8), "names": np.array(names)}


def _wanted(member: tarfile.TarInfo) -> bool:
    return member.name == "package/emoji.json" or member.name.startswith("package/img/google/64/")


def _on_white(png: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB").resize((32, 32), Image.Resampling.BOX))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=Path, help="scikit-learn wheel")
    parser.add_argument("--emoji", type=Path, help="npm tarball of emoji-datasource-google")
    parser.add_argument("--out", type=Path, help="folder to write the rebuilt files to")
    args = parser.parse_args()
    asked = [
        (file, make, path)
        for file, make, path in (("digits8.npz", digits, args.digits), ("emoji32.npz", emoji, args.emoji))
        if path is not None
    ]
    missing = [path for _, _, path in asked if not path.is_file()]
    if missing or not asked:
        parser.exit(2, f"no such file: {', '.join(map(str, missing)) or 'none given'}. Fetch them with\n{COMMANDS}\n")
    matches = []
    for file, make, path in asked:
        arrays = make(path)
        found = embedded.sha256(arrays)
        matches.append(found == embedded.SHA256[file])
        print(
            f"{file}: sha256 of the arrays {found}, {'matches' if matches[-1] else 'expected ' + embedded.SHA256[file]}"
        )
        if args.out is not None:
            np.savez_compressed(args.out / file, **arrays)  # type: ignore[arg-type]
    return 0 if all(matches) else 1


if __name__ == "__main__":
    raise SystemExit(main())
