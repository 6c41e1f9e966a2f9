"""The html of a report: complete, escaped, with its pictures inside, and set beside what was published."""

import base64
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from diffjax.__main__ import main
from diffjax.data import sources
from diffjax.evaluation import protocol, published, report
from diffjax.evaluation.standard import Images
from diffjax.experiment import build
from diffjax.sampling.samples import write_samples
from diffjax.trees import leaves
from tests.programs import tiny_config

VOID = {"meta", "img"}
ODD = '<script>alert("&")</script>'
PICTURES = {f"Samples {ODD}": np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)}
VALUES = {
    "fid": {"value": 2.27, "interval": [2.0, 2.5], "held_out_real": 1.25},
    "inception_score": {"value": 278.24, "spread": 3.5, "rule": f"splits of 5,000 {ODD}"},
}
SAMPLES = {"sampling": {"sampler": "ddpm", "steps": 250, "guidance": {"scale": 1.5}}, "labels": ODD, "seed": 3}


class Page(HTMLParser):
    """What a page holds; fails where a tag is not closed in its place."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.pictures, self.texts, self.tables = [], set(), {}, {}, {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "img":
            given = dict(attributes)
            self.pictures[given["alt"]] = given["src"]
        elif tag == "table":
            self.tables[self.texts["h2"][-1]] = []
        elif tag == "tr":
            [*self.tables.values()][-1].append([])
        elif tag in ("td", "th"):
            [*self.tables.values()][-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("td", "th"):
            [*self.tables.values()][-1][-1][-1] += text
        elif self.open:
            self.texts.setdefault(self.open[-1], []).append(text)


def picture(source):
    kind, _, data = source.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))


def made(values=VALUES, **changes):
    given = {
        "features": "Inception-v3 of 2015-12-05",
        "features_sha256": "0a",
        "resize": "TensorFlow 1 bilinear to 299 x 299, (x - 128) / 128",
        "reference": {"name": "VIRTUAL_imagenet256_labeled.npz", "sha256": "ff", "count": None},
        "num": 50_000,
        "samples": SAMPLES | {"model": {"name": ODD}, "origin": {"workdir": "runs/a", "weights": "ema"}},
    }
    return protocol.result(values, **{**given, **changes})


def of(result, size=256, **options):
    return Page(report.page(f"runs/a {ODD}: FID-50K", result, PICTURES, size=size, **options))


def test_everything_is_on_the_page_as_text():
    result = made()
    page = of(result, caveat=f"warning {ODD}")
    assert page.tags - VOID == {"html", "title", "style", "body", "h1", "p", "h2", "table", "tr", "th", "td"}
    assert page.texts["h1"] == page.texts["title"] == [f"runs/a {ODD}: FID-50K"]
    assert page.texts["p"] == [f"warning {ODD}"]
    assert list(page.tables) == ["Scores", "Published scores", "Protocol", "Subject"]
    assert page.tables["Scores"] == [
        ["score", "value", "95 % interval", "spread", "held-out real images", "rule"],
        ["fid", "2.2700", "2.0000 to 2.5000", "", "1.2500", ""],
        ["inception_score", "278.2400", "", "3.5000", "", f"splits of 5,000 {ODD}"],
    ]
    for part in ("protocol", "subject"):
        expected = [[name, str(value)] for name, value in leaves(result[part]).items()]
        assert page.tables[part.capitalize()] == [["field", "value"], *expected]
    [(heading, source)] = page.pictures.items()
    assert heading in PICTURES
    np.testing.assert_array_equal(picture(source), PICTURES[heading])
    assert "caveat" not in report.page("a", result, {}, size=256).split("</style>")[1]


def rows_of(page):
    """{name of a published row: (its scores, what its protocol is)}, without the result's own."""
    head, own, *others = page.tables["Published scores"]
    assert own[0] == "this result"
    return {row[0]: (dict(zip(head[1:-1], row[1:])), row[-1]) for row in others}


def test_published_scores_of_the_same_protocol_and_of_others():
    page = of(made())
    found = rows_of(page)
    assert found["DiT-XL/2, cfg 1.5"] == (
        {"fid": "2.27", "inception_score": "278.24"},
        "same, as far as it is stated",
    )
    assert found["DiT-XL/2, cfg 1.25"][1] == "different: sampling.guidance.scale"
    assert found["DiS-H/2"] == ({"fid": "2.1", "inception_score": ""}, "different: resize")
    assert found["DiffiT-XL/2"][1] == "same, as far as it is stated"
    assert found.keys() == {row.name for row in published.ROWS if row.size == 256}
    assert page.tables["Published scores"][1] == ["this result", "2.27", "278.2", ""]
    samples = {"sampling": SAMPLES["sampling"] | {"sampler": "ddim"}}
    others = rows_of(of(made(num=10_000, samples=samples)))
    assert others["DiT-XL/2, cfg 1.5"][1] == "different: num, sampling.sampler"
    assert others["DiffiT-XL/2"][1] == "different: num"
    assert "different: reference.name" in rows_of(of(made(), size=512))["DiT-XL/2, cfg 1.5"][1]


@pytest.mark.parametrize("row", published.ROWS, ids=lambda row: f"{row.name} {row.size}")
def test_a_result_of_the_protocol_of_a_row_is_the_same(row):
    tree = {}
    for field, value in row.protocol.items():
        *parents, name = field.split(".")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value
    assert row.differing(tree) == []
    assert row.differing({}) == list(row.protocol)
    values = {name: {"value": value} for name, value in row.values.items()}
    assert rows_of(of({"values": values, "protocol": tree, "subject": {}}, row.size))[row.name][1].startswith("same")


def test_rows_name_the_fields_of_results():
    """Those of sampling as an experiment describes it, all others as `protocol.result` writes them."""
    config = tiny_config("sampling.sampler=ddpm", "sampling.steps=250", "sampling.guidance.scale=1.5")
    result = made(samples=build(config, training=False).description())
    [row] = [row for row in published.ROWS if (row.name, row.size) == ("DiT-XL/2, cfg 1.5", 256)]
    assert row.differing(result["protocol"]) == []


def test_scores_that_nobody_published_have_no_such_table():
    values = {"frechet_distance_pixels": {"value": 1.0}}
    assert "Published scores" not in of(made(values)).tables
    assert "Published scores" not in of(made(), size=8).tables


def test_the_nearest_images():
    reference = np.array([[0.0, 0], [3, 0], [1, 0], [7, 0], [2, 0], [9, 0]], np.float32)
    samples = Images({"tiny": np.array([[0.1, 0], [8.1, 0]], np.float32)})
    found = report.nearest(samples, Images({"tiny": reference}), "tiny")
    np.testing.assert_array_equal(found, [[0, 2, 4, 1, 3], [5, 3, 1, 4, 2]])
    many = Images({"tiny": reference})
    np.testing.assert_array_equal(report.nearest(many, many, "tiny")[:, 0], np.arange(6))
    assert report.nearest(Images({"tiny": np.tile(reference, (9, 1))}), many, "tiny").shape == (8, 5)


@pytest.fixture(scope="module")
def training_images(tmp_path_factory):
    """Training digits as if a model had drawn them."""
    path = tmp_path_factory.mktemp("samples") / "samples.npz"
    images, labels = sources.arrays(sources.digits(split="train"))
    write_samples(path, images[:30], labels[:30], {"seed": 0})
    return path


@pytest.mark.parametrize("num", [30, 6])
def test_the_report_of_a_samples_file(training_images, tmp_path, capsys, num):
    written = tmp_path / "new/report.html"
    flags = [f"--samples={training_images}", "--reference=digits", f"--num={num}", f"--out={tmp_path / 'scores.json'}"]
    assert main(["evaluate", *flags, f"--report={written}"]) == 0
    assert f"wrote {written}\n" in capsys.readouterr().out
    page = Page(written.read_text())
    result = json.loads((tmp_path / "scores.json").read_text())
    names = [row[0] for row in page.tables["Scores"][1:]]
    assert names == list(result["values"])
    assert page.texts["h1"] == [f"{training_images}: pixel scores, not FID, {num} images"]
    assert [text.startswith("warning: ") for text in page.texts["p"]] == [True]
    grid, near = page.pictures
    assert grid == "Samples"
    assert near == "Samples (left), each with the images of the reference that are nearest by pixels"
    labels = np.load(training_images)["arr_1"][:num]
    assert picture(page.pictures[grid]).shape[1] == 66 * len(np.unique(labels))  # a column for each class
    first, itself, second = np.split(picture(page.pictures[near])[:, : 3 * 66], 3, axis=1)
    assert len(first) == min(num, 8) * 66
    np.testing.assert_array_equal(first, itself)  # of a training image itself
    assert (itself != second).any()


def test_the_report_of_a_model_shows_kept_images(tmp_path, capsys):
    flags = [f"--workdir={tmp_path}", "--reference=digits", f"--report={tmp_path / 'report.html'}"]
    assert main(["evaluate", *flags]) == 2
    error = capsys.readouterr().err
    assert "of a model's samples it needs --keep-images, which it shows" in error
    assert error.count("\n") == 1
