"""The public files that this package reads, by name: where each is published, what it reproduces, where it is kept.

Nothing is fetched but by the command `fetch`. Sizes and sha256 are those that sources state: the pointers of the model
hubs, and for the files of download sites those that several users computed. Where none is known, the first fetch
records what came. FID, IS: 50,000 samples against the ADM reference unless said otherwise.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from diffjax.download import Expected, Record, copy, download, is_address, verified
from diffjax.errors import UserError, did_you_mean
from diffjax.files import cache_folder, local_path

REFERENCE = "reference"  # in place of a family: images or statistics to compare with
FBAI = "https://dl.fbaipublicfiles.com"
HUB = "https://huggingface.co"
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches"
DIGIT = "huggingface.co/DAMO-NLP-SG/DiGIT, folder outputs/"


class File(NamedTuple):
    """One file: its name, and what is known of it beforehand (see `download.Expected`)."""

    name: str
    size: int = 0
    sha256: str = ""


class Row(NamedTuple):
    """A name that `fetch` knows.

    Attributes:
        family: a key of `weights.FAMILIES`, or REFERENCE.
        files: that belong together, in one folder; the first holds the arrays.
        address: of the first file; the others lie beside it. "": it has none that a program could use.
        page: where people find it.
        licence: of the weights, as stated where they are published.
        purpose: what it is, and the published result with its protocol.
    """

    family: str
    files: tuple[File, ...]
    address: str
    page: str
    licence: str
    purpose: str


def _hub(family: str, repository: str, files: tuple[File, ...], licence: str, purpose: str) -> Row:
    page = f"{HUB}/{repository}"
    return Row(family, files, f"{page}/resolve/main/{files[0].name}", page.removeprefix("https://"), licence, purpose)


def _digit(folder: str, family: str, purpose: str) -> Row:
    """A training checkpoint of fairseq, of which no address of a single file was stated."""
    files = (File("checkpoint_last.pt"),)
    return Row(family, files, "", f"{DIGIT}{folder}", "MIT (code)", purpose)


def _dinov2(size: str, file: File, purpose: str) -> Row:
    address = f"{FBAI}/dinov2/dinov2_{size}/{file.name}"
    return Row("dinov2", (file,), address, "github.com/facebookresearch/dinov2", "Apache-2.0", purpose)


def _reference(folder: str, file: File, purpose: str) -> Row:
    page = "github.com/openai/guided-diffusion, evaluations/"
    return Row(REFERENCE, (file,), f"{ADM}/{folder}/{file.name}", page, "ImageNet images: its terms", purpose)


WEIGHTS = "diffusion_pytorch_model.safetensors"
ROWS: dict[str, Row] = {
    "sd-vae-ft-ema": _hub(
        "vae",
        "stabilityai/sd-vae-ft-ema",
        (File(WEIGHTS, 334_643_276), File("config.json")),
        "MIT",
        "AutoencoderKL f8: latents of every recipe; decoder of DiT's FID 2.27",
    ),
    "sd-vae-ft-mse": _hub(
        "vae",
        "stabilityai/sd-vae-ft-mse",
        (
            File(WEIGHTS, 334_643_276, "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815"),
            File("config.json", 547, "92d3dfb746fca211a2c9e019e285f8597412211728dce3c5bcf4eda0f2d62e7e"),
        ),
        "MIT",
        "the same encoder, smoother decoder: DiT's 400K tables; 2.30 in place of 2.27",
    ),
    "taesd": _hub(
        "tiny_vae",
        "madebyollin/taesd",
        (
            File(WEIGHTS, 9_793_292, "d7956d561b1efbd861ad9b03fd8f01510f9e87eddc07bdfd20837009433f6ee5"),
            File("config.json"),
        ),
        "MIT",
        "AutoencoderTiny (version 1.2): quick previews, of no published score",
    ),
    "DiT-XL-2-256x256": Row(
        "dit",
        (File("DiT-XL-2-256x256.pt", 2_700_611_775),),
        f"{FBAI}/DiT/models/DiT-XL-2-256x256.pt",
        "github.com/facebookresearch/DiT",
        "CC-BY-NC-4.0",
        "FID 2.27, IS 278.24: 250 DDPM steps, cfg 1.5 on three channels, ft-EMA decoder; 9.62 without guidance",
    ),
    "DiT-XL-2-512x512": Row(
        "dit",
        (File("DiT-XL-2-512x512.pt"),),
        f"{FBAI}/DiT/models/DiT-XL-2-512x512.pt",
        "github.com/facebookresearch/DiT",
        "CC-BY-NC-4.0",
        "FID 3.04, IS 240.82: 250 DDPM steps, cfg 1.5 on three channels; 12.03 without guidance",
    ),
    "SiT-XL-2-256x256": Row(
        "sit",
        (File("SiT-XL-2-256x256.pt"),),
        "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/SiT-XL-2-256.pt"
        "?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=0",
        "github.com/willisma/SiT",
        "see its page",
        "FID 2.15 (ODE), 2.06 (SDE, 250 steps): cfg 1.5, ft-EMA decoder; 9.35 and 8.26 without guidance",
    ),
    "U-DiT-L-1000k": _hub(
        "udit",
        "yuchuantian/U-DiT",
        (File("U-DiT-L-1000k.pt"),),
        "see its page",
        "FID 7.54, IS 135.49 after 1M steps: 250 DDPM steps, no guidance, ft-EMA decoder",
    ),
    "diffit_256": _hub(
        "diffit",
        "nvidia/DiffiT",
        (
            File(
                "diffit_256.safetensors",
                2_260_035_624,
                "10b013068389a05e5f0ffaf508c243aeba62b7ce2fce693971644ac70dd63235",
            ),
        ),
        "NVIDIA, non-commercial",
        "FID 1.73, IS 276.49: 250 DDPM steps, guidance of scale 4.4 that rises with time, ft-EMA decoder",
    ),
    "diffit_512": _hub(
        "diffit",
        "nvidia/DiffiT",
        (
            File(
                "diffit_512.safetensors",
                2_489_166_112,
                "9614ace6238b3f90c38c47f672371ac599e04af53db5788e78b0064320644c31",
            ),
        ),
        "NVIDIA, non-commercial",
        "FID 2.67, IS 252.12: 250 DDPM steps, cfg 1.49, ft-EMA decoder",
    ),
    "DiGIT-base-stage1": _digit(
        "base_8k_stage1_400epoch", "digit_stage1", "FID 9.13, IS 73.85: no classes, torch-fidelity, validation set"
    ),
    "DiGIT-base-stage1-cls": _digit(
        "base_8k_stage1_cls_400epoch", "digit_stage1", "FID 4.79, IS 142.87: classes, torch-fidelity, validation set"
    ),
    "DiGIT-base-stage2": _digit("base_8k_stage2_400epoch", "digit_stage2_ar", "pixels of the base models' tokens"),
    "DiGIT-large-stage1": _digit(
        "large_16k_stage1", "digit_stage1", "FID 4.59, IS 141.29: no classes, torch-fidelity, validation set"
    ),
    "DiGIT-large-stage1-cls": _digit(
        "large_16k_stage1_cls", "digit_stage1", "FID 3.39, IS 205.96: classes, torch-fidelity, validation set"
    ),
    "DiGIT-large-stage2": _digit("large_16k_stage2", "digit_stage2_ar", "pixels of the large models' tokens"),
    "dinov2_vitb14_reg4": _dinov2(
        "vitb14",
        File(
            "dinov2_vitb14_reg4_pretrain.pth",
            346_393_545,
            "73182a088cf94833c94b1666d1c99e02fe87e2007bff57b564fb6206e25dba71",
        ),
        "ViT-B/14 with registers: features of DiGIT's base models",
    ),
    "dinov2_vitl14_reg4": _dinov2(
        "vitl14",
        File(
            "dinov2_vitl14_reg4_pretrain.pth",
            1_217_607_321,
            "36e4deffbaef061a2576705b0c36f93621e2ae20bf6274694821b0b492551b51",
        ),
        "ViT-L/14 with registers: features of DiGIT's large models",
    ),
    "dinov2_vitl14": _dinov2(
        "vitl14",
        File(
            "dinov2_vitl14_pretrain.pth",
            1_217_586_395,
            "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
        ),
        "ViT-L/14: features of the distance FD-DINOv2",
    ),
    "vqgan_jax_strongaug": Row(
        "vqgan",
        (File("vqgan_jax_strongaug.ckpt"),),
        "",
        "drive.google.com/file/d/13S_unB87n6KKuuMdyMnyExW0G1kplTbP (named by github.com/LTH14/mage)",
        "see its page",
        "VQGAN of MAGE: pixel tokens of DiGIT",
    ),
    "VIRTUAL_imagenet256_labeled": _reference(
        "imagenet/256",
        File(
            "VIRTUAL_imagenet256_labeled.npz",
            2_037_122_530,
            "b32732719497e42660a9affb4a966068cba0855ac449b82015e34ec376d20758",
        ),
        "ADM reference, ImageNet 256: statistics of the training set, 10,000 images",
    ),
    "VIRTUAL_imagenet512": _reference(
        "imagenet/512",
        File("VIRTUAL_imagenet512.npz"),
        "ADM reference, ImageNet 512: statistics of the training set, 10,000 images",
    ),
    "pt_inception-2015-12-05": Row(
        "inception",
        (
            File(
                "pt_inception-2015-12-05-6726825d.pth",
                95_628_359,
                "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            ),
        ),
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "github.com/mseitzer/pytorch-fid",
        "Apache-2.0",
        "Inception of 2015, the network of FID and IS, as ported for PyTorch",
    ),
    "classify_image_graph_def": Row(
        "inception",
        (File("classify_image_graph_def.pb"),),
        f"{ADM}/classify_image_graph_def.pb",
        "github.com/openai/guided-diffusion, evaluations/",
        "Apache-2.0",
        "the same as TensorFlow's graph, which the ADM suite runs",
    ),
    "inception_v3_weights_fid": Row(
        "inception",
        (
            File(
                "inception_v3_weights_fid.pickle",
                sha256="4e030efa5bccac3222d975f658d1884f9e00fab24f2812082884539220b90d77",
            ),
        ),
        "https://www.dropbox.com/s/xt6zvlvt22dcwck/inception_v3_weights_fid.pickle?dl=1",
        "github.com/matthias-wright/jax-fid",
        "Apache-2.0",
        "the same as ported for JAX, from the file for PyTorch",
    ),
}


def row_of(name: str) -> Row:
    """The row of a name. UserError for an unknown one."""
    if name not in ROWS:
        raise UserError(f"public file {name!r} is unknown{did_you_mean(name, ROWS)}; valid: {', '.join(ROWS)}")
    return ROWS[name]


def folder_of(name: str) -> Path:
    """Where the files of a row lie once they are fetched."""
    return cache_folder() / "weights" / name


def find(text: str | Path) -> Path:
    """The file or folder that a user names: a path that exists, else the fetched file of that name.

    UserError for a name whose file was not fetched yet; any other path is given back as it is.
    """
    name, path = str(text), Path(text)
    if path.exists() or name not in ROWS:
        return path
    kept = folder_of(name) / ROWS[name].files[0].name
    if not kept.is_file():
        raise UserError(f"{name} is no path here and was not fetched yet; `python -m diffjax fetch {name}` does that")
    return kept


def check_source(name: str, out: Path, source: str) -> None:
    """UserError where the files of a row are not in the folder `out` and there is nowhere to take them from."""
    row = row_of(name)
    if not (source or row.address or all((out / file.name).is_file() for file in row.files)):
        file = row.files[0].name
        raise UserError(
            f"{name} has no address that a program could use; get {file} at {row.page}, then "
            f"`python -m diffjax fetch {name} --from={file}`"
        )


def fetch(name: str, out: Path, source: str = "") -> Iterator[tuple[Path, Record, bool]]:
    """Bring the files of a row to the folder `out`, the first last; yields (path, its record, whether it is new).

    Files that are there already are checked.

    Args:
        source: a path, or another address than the published one: of the first file, or of the folder of all.

    Raises:
        UserError: see `check_source`, `download.download` and `download.copy`.
    """
    check_source(name, out, source)
    row = ROWS[name]
    for file in reversed(row.files):  # where the arrays are, everything is
        path, expected = out / file.name, Expected(file.size, file.sha256)
        if record := verified(path, expected):
            yield path, record, False
        elif source and not is_address(source):
            yield path, copy(_given_path(row, file, local_path(source)), path, expected), True
        else:
            yield path, download(_given_address(row, file, source or row.address), path, expected), True


def _given_path(row: Row, file: File, given: Path) -> Path:
    """Where a file of a row lies, by the path of the first one or of their folder."""
    if given.is_dir():
        return given / file.name
    return given if file is row.files[0] else given.with_name(file.name)


def _given_address(row: Row, file: File, given: str) -> str:
    """As `_given_path`; the address of a folder ends in a slash."""
    folder, _, last = given.rpartition("/")
    return given if last and file is row.files[0] else f"{folder}/{file.name}"
