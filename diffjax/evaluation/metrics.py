"""The scores of a set of images: which there are, what each takes, and how it is written down.

The formulas stand in scores.py, the networks that features come from in networks.py. A score of a result:

    value           the number
    interval        its 95 % bootstrap confidence interval over the images, where the score has one
    spread          standard deviation over splits or subsets, where the score has some
    rule            what its name leaves open
    held_out_real   the same score of real images that were not trained on, to see what is left to gain
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffjax.errors import UserError, did_you_mean
from diffjax.evaluation import frechet, neighbours, pixels, scores
from diffjax.evaluation.networks import Features, Network
from diffjax.evaluation.scores import Score
from diffjax.evaluation.standard import Available, Images, Standard

FEW = 10_000  # images below which a Frechet distance is strongly biased
SPLIT, SPLITS, SHUFFLE = 5_000, 10, 2020  # of the Inception score: ADM's chunks; torch-fidelity's splits and seed
SUBSETS, SUBSET = 100, 1_000  # of the kernel distance in torch-fidelity
NEAREST, NEAREST_OF_DENSITY = 3, 5
NEIGHBOURS = 5  # of label agreement

Column = dict[str, Any]  # of one score, see the module docstring
Values = dict[str, Column]


@dataclass(frozen=True)
class Metric:
    """A group of scores that are computed together.

    Attributes:
        scores: general names, see `Network.called`.
        compute: (images, standard, kind of features) -> one Score for each of `scores`.
        needs: what it takes of the standard: "moments", "images", "labels"; "" nothing.
        rule: what the names leave open.
        kind: of features; "" is the network's main one.
        usual: whether it is computed when no scores are asked for.
        least: how many images it takes, of the samples and, where it needs images, of the reference.
        falls: whether less is better.
    """

    scores: tuple[str, ...]
    compute: Callable[[Images, Standard, str], tuple[Score, ...]]
    needs: str
    rule: str = ""
    kind: str = ""
    usual: bool = True
    least: int = 2
    falls: bool = False

    def lacks(self, network: Network, num: int, available: Available) -> str:
        """What is missing for these scores of `num` samples, in words; "" for nothing."""
        kind = self.kind or network.main
        if num < self.least:
            return f"{num} samples, and it takes {self.least}"
        of_moments = available.moments or available.kinds  # those of its images are computed where it has none
        if self.needs == "moments" and kind not in of_moments:
            return f"the reference has no mean and covariance of {kind}"
        if self.needs in ("images", "labels") and not available.images:
            return "the reference has no images, only mean and covariance"
        if self.needs in ("images", "labels") and kind not in available.kinds:
            return f"the reference has no {kind} of single images"
        if self.needs == "images" and available.images < self.least:
            return f"{available.images} images of the reference, and it takes {self.least}"
        if self.needs == "labels" and not available.labels:
            return "the samples or the reference have no labels"
        return ""


def _frechet(images: Images, standard: Standard, kind: str) -> tuple[Score, ...]:
    features = images.features[kind]
    if kind in standard.moments:
        moments = standard.moments[kind]
        return (scores.frechet_distance(features, moments.mean, moments.covariance),)
    return (Score(frechet.distance_of_features(features, _reference(standard)[kind])),)


def _at_infinity(images: Images, standard: Standard, kind: str) -> tuple[Score, ...]:
    moments = standard.moments[kind]
    return (scores.frechet_at_infinity(images.features[kind], moments.mean, moments.covariance),)


def _class_score(images: Images, standard: Standard, kind: str) -> tuple[Score, ...]:
    return (scores.inception_score(images.features[kind], split_size=SPLIT),)


def _class_score_shuffled(images: Images, standard: Standard, kind: str) -> tuple[Score, ...]:
    return (scores.inception_score(images.features[kind], splits=SPLITS, shuffle_seed=SHUFFLE),)


def _kernel(images: Images, standard: Standard, kind: str) -> tuple[Score, ...]:
    return (scores.kernel_distance(images.features[kind], _reference(standard)[kind]),)


def _kernel_of_subsets(images: Images, standard: Standard, kind: str) -> tuple[Score, ...]:
    reference = _reference(standard)[kind]
    size = min(SUBSET, len(reference), images.count)
    return (scores.kernel_distance_of_subsets(images.features[kind], reference, SUBSETS, size, SHUFFLE),)


def _precision_recall(images: Images, standard: Standard, kind: str) -> tuple[Score, ...]:
    return scores.precision_recall(images.features[kind], _reference(standard)[kind], k=NEAREST)


def _precision_recall_fp16(images: Images, standard: Standard, kind: str) -> tuple[Score, ...]:
    return scores.precision_recall(images.features[kind], _reference(standard)[kind], k=NEAREST, adm_fp16=True)


def _density_coverage(images: Images, standard: Standard, kind: str) -> tuple[Score, ...]:
    return scores.density_coverage(images.features[kind], _reference(standard)[kind], k=NEAREST_OF_DENSITY)


def _label_agreement(images: Images, standard: Standard, kind: str) -> tuple[Score, ...]:
    assert standard.images
    train, known = standard.images.features, standard.images.labels
    assert images.labels is not None
    assert known is not None
    pixels.check_labels(images.labels, known)
    found, reference = (np.rint(255 * each[kind]).astype(np.uint8) for each in (images.features, train))
    return (Score(neighbours.label_agreement(found, images.labels, reference, known, k=NEIGHBOURS)),)


def _reference(standard: Standard) -> Features:
    assert standard.images
    return standard.images.features


METRICS = (
    Metric(("fd",), _frechet, "moments", falls=True),
    Metric(("label_agreement",), _label_agreement, "labels", f"{NEIGHBOURS} nearest"),
    Metric(("sfd",), _frechet, "moments", kind="spatial", falls=True),
    Metric(("class_score",), _class_score, "", f"splits of {SPLIT:,} in order, without the bias", "logits"),
    Metric(
        ("class_score_shuffled",),
        _class_score_shuffled,
        "",
        f"{SPLITS} splits, shuffled, seed {SHUFFLE}, without the bias",
        "logits",
        least=SPLITS,
    ),
    Metric(("precision", "recall"), _precision_recall, "images", f"k = {NEAREST}, float64", least=NEAREST + 1),
    Metric(
        ("kd_subsets",),
        _kernel_of_subsets,
        "images",
        f"{SUBSETS} subsets of at most {SUBSET:,}, seed {SHUFFLE}, those of the samples drawn first",
        usual=False,
        falls=True,
    ),
    Metric(("kd",), _kernel, "images", "all pairs, unbiased", usual=False, falls=True),
    Metric(
        ("density", "coverage"),
        _density_coverage,
        "images",
        f"k = {NEAREST_OF_DENSITY}",
        usual=False,
        least=NEAREST_OF_DENSITY + 1,
    ),
    Metric(
        ("precision_adm_fp16", "recall_adm_fp16"),
        _precision_recall_fp16,
        "images",
        f"k = {NEAREST}, distances in float16 as in the ADM suite",
        usual=False,
        least=NEAREST + 1,
    ),
    Metric(
        ("fd_infinity",),
        _at_infinity,
        "moments",
        "linear in 1 / n of 15 random subsets, seed 0",
        usual=False,
        least=3,
        falls=True,
    ),
)


def chosen(network: Network, wanted: Collection[str] = ()) -> list[Metric]:
    """The groups of the scores `wanted`, by their names in results; by default the usual ones of the network.

    UserError for a score that the network does not have.
    """
    usable = [metric for metric in METRICS if (metric.kind or network.main) in network.kinds]
    if network.name == "pixels":
        usable = [metric for metric in usable if metric.needs == "labels" or metric.scores == ("fd",)]
    else:
        usable = [metric for metric in usable if metric.needs != "labels"]
    names = {network.called(score): metric for metric in usable for score in metric.scores}
    if unknown := [score for score in wanted if score not in names]:
        hint = did_you_mean(unknown[0], names)
        raise UserError(f"score {unknown[0]!r} is none of {network.name}{hint}; valid: {', '.join(names)}")
    return [m for m in usable if (m.usual if not wanted else any(names[name] is m for name in wanted))]


def computable(network: Network, num: int, available: Available, wanted: Collection[str] = ()) -> list[Metric]:
    """The groups of `chosen` for which nothing is missing.

    Raises:
        UserError: fewer than two images of either side, and where something is missing for a score that is wanted, or
            for all.
    """
    _check_count(num, "")
    if available.images:
        _check_count(available.images, " of the reference")
    found = chosen(network, wanted)
    lacks = {network.called(metric.scores[0]): metric.lacks(network, num, available) for metric in found}
    missing = {score: lack for score, lack in lacks.items() if lack}
    if missing and (wanted or len(missing) == len(found)):
        score, lack = next(iter(missing.items()))
        raise UserError(f"{score} cannot be computed: {lack}")
    return [metric for metric, lack in zip(found, lacks.values()) if not lack]


def score(images: Images, standard: Standard, network: Network, wanted: Collection[str] = ()) -> Values:
    """The scores of images by their names in results, see the module docstring.

    wanted: see `chosen`; of the usual scores those for which something is missing are left out.

    Raises:
        UserError: features that are not finite, and see `computable`.
    """
    for kind, features in images.features.items():
        scores.check_finite(features, f"the samples ({kind})")
    values: Values = {}
    for metric in computable(network, images.count, _available(images, standard), wanted):
        columns = _columns(metric, images, standard, network)
        held_out = standard.held_out
        if held_out and not metric.lacks(network, held_out.count, _available(held_out, standard)):
            real = metric.compute(held_out, standard, metric.kind or network.main)
            columns = [{**column, "held_out_real": found.value} for column, found in zip(columns, real)]
        for name, column in zip(metric.scores, columns):
            values[network.called(name)] = column
    return values


def _available(images: Images, standard: Standard) -> Available:
    known = standard.images
    labels = images.labels is not None and known is not None and known.labels is not None
    return Available(standard.moments, known.count if known else 0, tuple(known.features) if known else (), labels)


def _check_count(count: int, whose: str) -> None:
    if count < 2:
        raise UserError(f"the covariance of {count} images{whose} is undefined; at least 2 are needed")


def _columns(metric: Metric, images: Images, standard: Standard, network: Network) -> list[Column]:
    columns = []
    for found in metric.compute(images, standard, metric.kind or network.main):
        column: Column = {"value": found.value}
        if found.influence is not None:
            column["interval"] = list(scores.interval(found))
        if found.spread is not None:
            column["spread"] = found.spread
        if metric.rule:
            column["rule"] = metric.rule
        columns.append(column)
    return columns


def kinds(network: Network, wanted: Collection[str] = ()) -> list[str]:
    """The kinds of features that the scores take."""
    return list(dict.fromkeys(metric.kind or network.main for metric in chosen(network, wanted)))


def needs_images(network: Network, wanted: Collection[str] = ()) -> bool:
    """Whether some of the scores take single images of the reference."""
    return any(metric.needs in ("images", "labels") for metric in chosen(network, wanted))


def caveat(count: int, standard: Standard, network: Network) -> str:
    """A warning for Frechet distances of few images; "" where there are enough."""
    width = network.kinds[network.main]
    if network.name == "pixels":
        assert standard.images
        reference = standard.images.features[network.main]
        colours = reference.reshape(len(reference), -1, 3)
        width = colours.shape[1] * (1 if (colours == colours[..., :1]).all() else 3)
        few = [
            f"{n:,} {whose}"
            for n, whose in ((count, "samples"), (standard.images.count, "of the reference"))
            if n <= width
        ]
        if not few:
            return ""
        return (
            f"warning: {' and '.join(few)} are no more than the {width:,} dimensions of the pixels, so the Frechet "
            "distance says little; compare it with that of as many other images alone, or take more"
        )
    if min(count, standard.count or count) >= FEW:
        return ""
    return (
        f"warning: of fewer than {FEW:,} images {network.called('fd')} is biased upwards; compare results of equal "
        "numbers of images only"
    )


def title(count: int, network: Network, reference: int | None = None) -> str:
    """What the main score is called with its number of images: FID-50K; "" where they are too few or no such number.

    reference: how many images the reference is of; None: not stated.
    """
    if network.called("fd") != "fid" or min(count, reference or count) < FEW or count % 1000:
        return ""
    return f"FID-{count // 1000}K"
