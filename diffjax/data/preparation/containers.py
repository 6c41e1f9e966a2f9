"""Where image files lie: a folder, a zip or a tar. All are read in place, image by image, by several threads.

Names in archives are keys and nothing else: no path of this machine is made of them. What an entry says of its size is
a limit on what is read of it, and an entry that claims more than an image can have is refused.
"""

import contextlib
import lzma
import os
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Protocol

from diffjax.data.images import is_image, list_images
from diffjax.errors import UserError

LARGEST = 2**28  # bytes of the file of an image
BLOCK = 512  # of a tar
OF_ARCHIVES = (zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError)
DAMAGE = (OSError, EOFError, ValueError, RuntimeError, *OF_ARCHIVES)


class Container(Protocol):
    @property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of each image by its name, with "/" between folders; sorted part by part."""

    @property
    def archives(self) -> list[Path]:
        """The archives that it is made of."""

    def read(self, name: str) -> bytes:
        """The bytes of an image, or of another file; UserError where it is damaged."""

    def __contains__(self, name: str) -> bool:
        """Whether there is a file of this name, an image or not."""

    def close(self) -> None:
        """Close what is open."""


def open_container(path: Path) -> Container:
    """A folder, a .zip or a .tar. UserError for anything else."""
    if path.is_dir():
        return Folder(path)
    kinds: dict[str, Callable[[Path], Container]] = {".zip": Zip, ".tar": Tar}
    if not path.exists():
        raise UserError(f"no such file or folder: {path}")
    if path.suffix.lower() not in kinds:
        raise UserError(f"{path} is neither a folder nor a .zip or .tar of images")
    return kinds[path.suffix.lower()](path)


class Folder:
    """The image files below a folder, at any depth."""

    def __init__(self, root: Path):
        self.root = root
        self.archives: list[Path] = []
        with reading(root):
            self.sizes = {name: (root / name).stat().st_size for name in list_images(root).images}
        check_sizes(root, self.sizes.items())

    def read(self, name: str) -> bytes:
        with reading(self.root, name):
            return (self.root / name).read_bytes()

    def __contains__(self, name: str) -> bool:
        return (self.root / name).is_file()

    def close(self) -> None:
        pass


class Zip:
    """A zip of stored or deflated entries: of other compressions Python limits no output."""

    def __init__(self, path: Path):
        self.archives = [path]
        with reading(path):
            self._zip = zipfile.ZipFile(path)
        files = [info for info in self._zip.infolist() if not info.is_dir()]
        if others := [info for info in files if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]:
            name, kind = others[0].filename, others[0].compress_type
            raise UserError(f"{path}: {name} is of compression {kind}; valid: stored or deflated")
        found = [(info.filename, info.file_size) for info in files]
        check_sizes(path, found)
        self._all = dict(found)
        self.sizes = in_order(found)

    def read(self, name: str) -> bytes:
        size = self._all[name]
        if size > LARGEST:
            raise UserError(f"{self.archives[0]}: {name} claims {size:,} bytes; valid: at most {LARGEST:,}")
        with reading(self.archives[0], name), self._zip.open(name) as file:
            data = file.read(size + 1)  # without a number, all is inflated before it is cut to its size
            if len(data) != size:
                raise EOFError(f"{size} bytes claimed, and {len(data)} there")
            return data

    def __contains__(self, name: str) -> bool:
        return name in self._all

    def close(self) -> None:
        self._zip.close()


class Tar:
    """An uncompressed tar; a tar in it is a folder of that name. Files are read by their places, which headers give."""

    def __init__(self, path: Path):
        self.archives = [path]
        with reading(path):
            self._file = path.open("rb")
            found = list(_members(path, self._file))
        check_sizes(path, [(name, size) for name, _, size in found])
        self._places = {name: (offset, size) for name, offset, size in found}
        self.sizes = in_order((name, size) for name, _, size in found)

    def read(self, name: str) -> bytes:
        offset, size = self._places[name]
        with reading(self.archives[0], name):
            data = os.pread(self._file.fileno(), size, offset)
            if len(data) != size:
                raise EOFError(f"{size} bytes, and the file ends after {len(data)}")
            return data

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def close(self) -> None:
        self._file.close()


def _members(path: Path, file: IO[bytes], start: int = 0, folder: str = "") -> Iterator[tuple[str, int, int]]:
    """Name, place in the outermost file and size of each file of a tar; hard links are files, too.

    tarfile takes a damaged header, and the end of a cut file, for the end of the archive, which is a block of zeros.
    """
    places: dict[str, tuple[int, int]] = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while member := tar.next():
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep a million of them
            if member.size < 0 or member.issparse():
                raise tarfile.ReadError(f"{member.name} is sparse, or of a negative size")
            name, target = member.name.removeprefix("./"), member.linkname.removeprefix("./")
            if member.issym():
                raise UserError(f"{path}: {folder}{name} is a symbolic link; valid: files, as tar --dereference packs")
            if member.islnk() and target not in places:
                raise tarfile.ReadError(f"{name} links to {target}, which is no file before it")
            if not member.isreg() and not member.islnk():
                continue
            if member.isreg() and name.endswith(".tar") and not folder and (inner := tar.extractfile(member)):
                try:
                    yield from _members(path, inner, start + member.offset_data, f"{Path(name).stem}/")
                except tarfile.TarError as error:
                    raise tarfile.ReadError(f"{name}: {error}") from error
            else:
                places[name] = places[target] if member.islnk() else (start + member.offset_data, member.size)
                yield folder + name, *places[name]
        file.seek(tar.offset)
        if file.read(BLOCK) != bytes(BLOCK):
            raise tarfile.ReadError("no block of zeros at its end")


def in_order(found: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Those that are images, sorted by their names, folder after folder; hidden ones are passed over."""
    images = (
        (name, size)
        for name, size in found
        if is_image(name) and not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))
    )
    return dict(sorted(images, key=lambda each: each[0].split("/")))


def check_sizes(path: Path, found: Iterable[tuple[str, int]]) -> None:
    """UserError for an image that is too large to be one, and for a name that is there twice."""
    found = [(name, size) for name, size in found if is_image(name)]
    if large := [(name, size) for name, size in found if size > LARGEST]:
        name, size = large[0]
        raise UserError(f"{path}: {name} claims {size:,} bytes; valid: at most {LARGEST:,} for an image")
    if twice := [name for name, count in Counter(name for name, _ in found).items() if count > 1]:
        raise UserError(f"{path} holds {twice[0]} twice")


@contextlib.contextmanager
def reading(path: Path, name: str = "") -> Iterator[None]:
    """UserError for what Python and the system say of an archive that is damaged or cannot be read."""
    try:
        yield
    except UserError:
        raise
    except DAMAGE as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path}{f': {name}' if name else ''} cannot be read: {reason}; get it again") from error
