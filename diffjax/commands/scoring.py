"""How images are scored: the flags of `evaluate` and `sweep` that say it, and what they stand for."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from absl import flags

from diffjax.commands import define_path
from diffjax.data import image_sets
from diffjax.evaluation import metrics, networks, pixels, protocol, standard
from diffjax.evaluation.metrics import Values
from diffjax.evaluation.networks import NETWORKS, RESIZES, Network
from diffjax.evaluation.standard import Images, Source, Standard


def define_scoring(values: flags.FlagValues) -> None:
    reference = f"{', '.join(image_sets.EMBEDDED)}, images, or a file of statistics"
    flags.DEFINE_string("reference", None, reference, flag_values=values)
    help = "network by whose features images are compared; that of the reference by default"
    flags.DEFINE_enum("features", None, list(NETWORKS), help, flag_values=values)
    define_path("weights", None, "weights of the network, instead of the fetched ones", values)
    flags.DEFINE_enum(
        "resize", None, list(RESIZES), "how it gets its images; its own rule by default", flag_values=values
    )
    flags.DEFINE_list("scores", [], "which, by their names in results; the usual ones by default", flag_values=values)


@dataclass(frozen=True)
class Scoring:
    """The reference, the network by whose features images are compared with it, and the scores (none: the usual)."""

    source: Source
    network: Network
    scores: tuple[str, ...] = ()

    @functools.cached_property
    def standard(self) -> Standard:
        """The reference as the network sees it; computed when it is first needed."""
        return standard.of_source(self.source, self.network, single=self.single)

    @property
    def single(self) -> bool:
        """Whether single images of the reference are needed."""
        return metrics.needs_images(self.network, self.scores)

    def values(self, images: Images) -> Values:
        return metrics.score(images, self.standard, self.network, self.scores)

    def result(self, values: Values, made: Mapping[str, Any], num: int) -> dict[str, Any]:
        """The result of scores, see `protocol.result`. made: how the images were made."""
        return protocol.result(values, **self.network.identity(), reference=self.source.identity, num=num, samples=made)

    def check(self, num: int, labels: bool, shape: tuple[int, ...] | None = None) -> None:
        """UserError where `num` images cannot be scored, before any is drawn.

        labels: whether they have labels. shape: their height and width, where it is known.
        """
        metrics.computable(self.network, num, self.source.available(self.network, labels), self.scores)
        if shape and self.source.shape:
            pixels.check_sizes(tuple(shape), self.source.shape)
        if shape:
            self.network.check_size(shape)

    def has_all(self, values: Mapping[str, Any], num: int, labels: bool) -> bool:
        """Whether these values of a result are all that can be computed. num, labels: see `check`."""
        available = self.source.available(self.network, labels)
        computable = metrics.computable(self.network, num, available, self.scores)
        return all(self.network.called(score) in values for metric in computable for score in metric.scores)

    def caveat(self, num: int) -> str:
        """A warning about too few images, one line; "" where there are enough."""
        return metrics.caveat(num, self.standard, self.network)


def scoring_of(values: flags.FlagValues) -> Scoring:
    """What the flags ask for, with the reference opened and the network loaded; UserError for what cannot be."""
    source = standard.open_source(values.reference)
    network = networks.load(values.features or standard.default_network(source), values.weights, values.resize or "")
    standard.check_network(source, network)
    metrics.chosen(network, values.scores)  # refuses names that are none
    return Scoring(source, network, tuple(values.scores))
