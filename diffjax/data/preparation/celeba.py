"""CelebA, aligned and cropped: img_align_celeba (.zip or folder) and list_eval_partition.txt."""

from pathlib import Path

from diffjax.data.preparation.containers import open_container, reading
from diffjax.data.preparation.originals import Originals, describe, find, of_container
from diffjax.errors import UserError

IMAGES = ("img_align_celeba.zip", "Img/img_align_celeba.zip", "img_align_celeba", "Img/img_align_celeba")
PARTITION = ("list_eval_partition.txt", "Eval/list_eval_partition.txt")
SPLITS = {"train": "0", "validation": "1", "test": "2"}  # split -> its number in the partition


def read(path: Path, split: str) -> Originals:
    """The images of a split of the published partition, in the order of their names. There are no classes."""
    named = path.is_file() or path.name in IMAGES  # the images themselves, beside which the partition may lie
    partition = find(path, PARTITION, "the partition into splits", beside=named)
    container = open_container(path if named else find(path, IMAGES, "the images"))
    places = {name.rpartition("/")[2]: name for name in container.sizes}
    with reading(partition):
        rows = [line.split() for line in partition.read_text().splitlines() if line.strip()]
    if wrong := [row for row in rows if len(row) != 2 or row[1] not in SPLITS.values()]:
        raise UserError(f"{partition}: {' '.join(wrong[0])[:60]!r}; valid: lines of a file name and 0, 1 or 2")
    files = sorted(name for name, number in rows if number == SPLITS[split])
    if missing := [name for name in files if name not in places]:
        raise UserError(f"{path}: {missing[0]} of {partition.name} is missing, and {len(missing) - 1:,} more")
    originals = of_container(container, [places[name] for name in files])
    originals.files.extend(describe([partition]))
    return originals
