"""Build an experiment from a config: data, model, method, optimizer, shardings, initial state, step.

This module and inputs.py alone read a config. Nothing large is ever held by one device: shapes come from
`jax.eval_shape`, shardings from the shapes, and the state is made by a jitted function whose outputs are already
sharded. The data, the frozen networks, the decoder and the sampler are opened when they are first asked for.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffjax import contracts, models, rng
from diffjax.config import Config
from diffjax.config.load import nested, stored
from diffjax.config.schema import is_read, leaves, section_values
from diffjax.contracts import Apply, Batch, Method, Metrics, Sampler, Stored, Tree, bind
from diffjax.data import pipeline
from diffjax.data.source import Source
from diffjax.errors import UserError
from diffjax.evaluation.evaluators import EVALUATORS
from diffjax.inputs import data_spec, load_source, preparation
from diffjax.methods import METHODS, diffusion, encoders
from diffjax.ops.macs import count_macs
from diffjax.options import Options
from diffjax.parallel.mesh import batch_sharding, check_batch, check_processes, make_mesh, replicated
from diffjax.parallel.rules import LogicalAxes, on_mesh, parameters, shardings
from diffjax.sampling import generate
from diffjax.training import batches, ema, optimizer
from diffjax.training.state import TrainState, initial_state, state_shardings, with_shardings
from diffjax.training.step import train_step
from diffjax.weights.store import tree_sha256

SAMPLE_BATCH = 128  # samples at a time, of evaluators


@dataclass(frozen=True)
class Schedule:
    """When a run does what, in steps or minutes."""

    total_steps: int
    checkpoint_every: int
    checkpoint_minutes: float
    keep: int
    keep_every: int
    keep_best: str  # an evaluator, or ""
    snapshot_every: int
    report_every: int
    hang_minutes: float
    evaluate_every: Mapping[str, int]  # by evaluator; those that run at all


@dataclass(frozen=True)
class Experiment:
    """Everything built from a config: mesh, model, method, jitted init and step; data and sampler on first use.

    Attributes:
        config: what it was built of; other modules hand it on and read the properties below.
        method: how the backbone is trained and sampled. apply: the backbone, (params, *inputs) -> output.
        schedule: when a run saves, reports and evaluates.
        averages: how the averages of the parameters move. sigma_rel: relative lengths of the power-function EMAs by
            name.
        abstract: shapes, dtypes and shardings of the state.
        init: () -> state at step 0. fresh: () -> its parameters alone. start: parameters -> state at step 0.
        step: (state, frozen, batch, key) -> (state, metrics), jitted; donates the state.
    """

    config: Config
    mesh: Mesh
    method: Method
    apply: Apply
    schedule: Schedule
    averages: ema.Rates
    sigma_rel: Mapping[str, float]
    abstract: TrainState
    init: Callable[[], TrainState]
    fresh: Callable[[], Tree]
    start: Callable[[Tree], TrainState]
    step: Callable[[TrainState, Tree, Batch, jax.Array], tuple[TrainState, Metrics]]

    @property
    def model(self) -> Any:
        return self.method.model

    @property
    def name(self) -> str:
        """The name of the backbone."""
        return self.config.model.name

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def batch_size(self) -> int:
        """Global batch size."""
        return self.config.batch_size

    @property
    def size(self) -> int:
        """Side of an image, a latent or a grid of tokens."""
        return self.config.data.size

    @property
    def channels(self) -> int:
        return self.config.data.channels

    @property
    def num_classes(self) -> int:
        """Labels that the model is conditioned on; 0: none."""
        condition = self.method.condition
        return condition.count if condition and condition.kind == "labels" else 0

    @property
    def data_folder(self) -> str:
        """Folder of the training data; "" for embedded ones."""
        return str(self.config.data.options.get("dir", ""))

    @property
    def sampling(self) -> Any:
        """The options of sampling, of the method's own type."""
        return self.config.sampling

    @property
    def initial(self) -> tuple[str, tuple[str, ...]]:
        """Where the parameters come from ("": they are fresh), and which parts start fresh nevertheless."""
        given = self.config.init
        return given.from_, given.new if given.from_ else ()

    @property
    def caveat(self) -> str:
        """What a user should know before training, one line; "" for nothing."""
        warmup, total = self.config.optim.warmup_steps, self.config.total_steps
        if warmup < total or total < 20:  # a run of a few steps shows that a recipe runs
            return ""
        return (
            f"optim.warmup_steps = {warmup} is not less than total_steps = {total}: the learning rate never reaches "
            f"optim.lr; a tenth of the steps is usual, --config.optim.warmup_steps={total // 10}"
        )

    @property
    def tensorboard(self) -> bool:
        return self.config.log.tensorboard

    @property
    def precision(self) -> str:
        """The compute dtype."""
        return str(self.config.model.options.get("dtype", "float32"))

    @functools.cached_property
    def key(self) -> jax.Array:
        """Root of the training streams."""
        return jax.jit(lambda: rng.stream(self.seed, "train"), out_shardings=replicated(self.mesh))()

    @functools.cached_property
    def source(self) -> Source:
        """The training data."""
        if METHODS[self.config.method].images:
            folder = Path(str(self.config.data.options["dir"]))
            encoders.check_made_as_stated(folder, preparation(self.config))
        return self.other_source()

    @property
    def source_options(self) -> Options:
        """The options of the data source."""
        return self.config.data.options

    def other_source(self, **options: Any) -> Source:
        """The training data with other options of the source, such as another split."""
        return load_source(self.config.data, **options)

    def images_of_tokens(self, **options: Any) -> Source:
        """The images that the tokens were made of, with other options of their source."""
        return load_source(self.config.images, **options)

    @functools.cached_property
    def sampler(self) -> Sampler:
        """The sampler of the config. UserError where the method draws nothing."""
        return self.make_sampler()

    def make_sampler(self, **how: Any) -> Sampler:
        """The sampler of the config, see `contracts.MakeSampler` for how."""
        if self.method.sampler is None:
            raise UserError(f"{self.name} draws nothing: method {self.config.method!r} makes {self.method.makes}")
        return self.method.sampler(self.sampling, **how)

    @functools.cached_property
    def decode(self) -> Tree:
        """The decoder from samples to pictures, with its parameters; None where samples are pictures."""
        return self.method.decoder.load() if self.method.decoder else None

    def decoder_protocol(self) -> dict[str, Any]:
        """What the protocol of samples says of the autoencoder that decodes them, json-able.

        Nothing where samples need none, or where how they were made says it.
        """
        decoder = self.method.decoder
        if not decoder or decoder.described is None:
            return {}
        found = {"sha256": tree_sha256(self.decode.args[0]), **decoder.described}
        return {f"autoencoder_{name}": value for name, value in found.items()}

    @functools.cached_property
    def frozen(self) -> dict[str, Tree]:
        """The parameters that the method uses and does not train, by network, sharded like the others."""
        found = {}
        for name, network in self.method.frozen.items():
            params = network.load()
            found[name] = jax.device_put(params, self.param_shardings(params, network.logical_axes))
        return found

    def frozen_sha256(self) -> dict[str, str]:
        """sha256 of the values of each frozen tree, by name."""
        return {name: tree_sha256(params) for name, params in self.frozen.items()}

    def param_shardings(self, params: Tree, axes: LogicalAxes) -> Tree:
        """NamedShardings of parameters or their shapes, by the strategy of the config."""
        parallel = self.config.parallel
        return shardings(params, self.mesh, parallel.strategy, axes, parallel.replicate_below)

    @functools.cached_property
    def _prepare(self) -> Callable:
        prepare = on_mesh(functools.partial(batches.prepare, seed=self.seed), self.mesh)
        return jax.jit(prepare, static_argnums=0, out_shardings=batch_sharding(self.mesh))

    def put(self, stored: Stored, source: Source | None = None) -> Batch:
        """This host's part of a batch -> arrays of the global batch as training sees it, sharded over the mesh.

        source: that it is of; by default the training data.
        """
        sharding = batch_sharding(self.mesh)
        preparation = (source or self.source).preparation

        def global_array(array: np.ndarray) -> jax.Array:
            shape = (self.batch_size, *array.shape[1:])
            return jax.make_array_from_process_local_data(sharding, array, shape)

        with jax.transfer_guard_host_to_device("allow"):  # the one transfer of a step that is meant
            return self._prepare(preparation, jax.tree.map(global_array, stored))

    def stream(self, start: int = 0) -> pipeline.Batches:
        """This host's part of the stream of training batches, from number `start` on."""
        data = self.config.data
        return pipeline.Batches(
            self.source,
            batch_size=self.batch_size,
            seed=self.seed,
            flip=data.flip,
            workers=data.workers,
            threads=data.threads,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            start=start,
        )

    def batches(self, source: Source, num: int) -> Iterator[tuple[Batch, int]]:
        """The first `num` examples of a source: global batches, and how many examples count of each.

        Those with `index` below that count; the others fill up the batch. The order of several processes' rows differs.
        """
        own = np.arange(jax.process_index(), self.batch_size, jax.process_count())
        for first in range(0, num, self.batch_size):
            numbers = np.minimum(first + own, num - 1)
            examples = [source.examples[int(i)] for i in numbers]
            unmirrored = np.zeros(len(own), bool)
            stored = pipeline.collate(source, examples, own, unmirrored, first // self.batch_size)
            yield self.put(stored, source), min(self.batch_size, num - first)

    @functools.cached_property
    def _terms(self) -> Callable:
        of_method = self.method.terms
        assert of_method

        def terms(params: Tree, frozen: Tree, batch: Batch, key: jax.Array) -> tuple[Metrics, jax.Array, jax.Array]:
            return *of_method(self.apply, params, frozen, batch, key, train=False), batch.index

        return jax.jit(on_mesh(terms, self.mesh), out_shardings=replicated(self.mesh))

    def terms(self, params: Tree, batch: Batch, key: jax.Array) -> tuple[Metrics, jax.Array, jax.Array]:
        """`Method.terms` without dropout and `batch.index`, compiled; on every process those of the whole batch."""
        return self._terms(params, self.frozen, batch, key)

    @functools.cached_property
    def _reconstruct(self) -> Callable:
        of_method = self.method.reconstruct
        assert of_method

        def reconstruct(params: Tree, batch: Batch) -> jax.Array:
            return of_method(self.apply, params, batch.x)[jax.numpy.argsort(batch.index)]

        return jax.jit(on_mesh(reconstruct, self.mesh), out_shardings=replicated(self.mesh))

    def reconstructions(self, params: Tree, batch: Batch) -> np.ndarray:
        """`Method.reconstruct` of a batch, float32, on every process all of it, in the order of its `index`."""
        return np.asarray(self._reconstruct(params, batch))

    @functools.cached_property
    def _compiled_sampler(self) -> functools.partial:
        return generate.compile_sampler(self.sampler, self.model, self.mesh, self.seed, decode=self.decode)

    def images(self, params: Tree, conditions: np.ndarray) -> Iterator[np.ndarray]:
        """Samples 0, 1, ... as float32 [b, h, w, c], one per condition, in batches; the same on every process."""
        numbers, rows = np.arange(len(conditions)), min(len(conditions), SAMPLE_BATCH)
        return generate.generate_everywhere(self._compiled_sampler, params, conditions, numbers, self.mesh, rows)

    @functools.cached_property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the pictures that are drawn, or decoded of what is drawn; nothing is compiled."""
        if not self.method.decoder:
            return self.size, self.size
        height, width, _ = generate.shape_of(
            self._compiled_sampler, self.abstract.params, self.conditions(0, 1), self.mesh
        )
        return height, width

    def sampled_by(self, sampler: str, steps: int) -> "Experiment":
        """The same with another sampler ("": the same) and number of steps (0: the same).

        UserError for a method without them, and a sampler that does not exist.
        """
        if not (sampler or steps):
            return self
        own = self.sampling
        if not isinstance(own, diffusion.Sampling):
            method = self.config.method
            raise UserError(f"method {method!r} has no samplers with steps; leave out sampler and steps")
        options = own.options if sampler in ("", own.sampler) else {}  # those of the other sampler have defaults
        sampling = dataclasses.replace(own, sampler=sampler or own.sampler, options=options, steps=steps or own.steps)
        other = with_sampling(self, sampling)
        vars(other).update(source=self.source, decode=self.decode)  # opened and on the devices once
        _ = other.sampler  # says what cannot be
        return other

    def draw(self, params: Tree, conditions: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(numbers [n], samples float32 [n, h, w, c]) of this process's part of samples 0, 1, ..., in batches."""
        numbers, rows = np.arange(len(conditions)), min(len(conditions), SAMPLE_BATCH)
        return generate.generate(self._compiled_sampler, params, conditions, numbers, self.mesh, rows)

    def conditions(self, first: int, num: int) -> np.ndarray:
        """Conditions of samples first, first + 1, ...: classes in equal parts, or those of the training examples."""
        condition = self.method.condition
        if condition is None or condition.kind == "labels":
            return generate.interleaved_labels(first + num, self.num_classes)[first:]
        return self._of_training_examples(first, num)

    def _of_training_examples(self, first: int, num: int) -> np.ndarray:
        """The conditions of training examples first, first + 1, ... in stored order, over again after the last."""
        numbers = np.arange(first, first + num) % len(self.source.examples)
        found = []
        for block in np.split(numbers, range(SAMPLE_BATCH, num, SAMPLE_BATCH)):  # not all examples at once
            found.append(pipeline.conditions(self.source, block))
        return np.concatenate(found)

    def evaluators(self) -> dict[str, contracts.Evaluator]:
        """Those that run in training, by name. UserError for one that this experiment cannot have."""
        made = {}
        for name in self.schedule.evaluate_every:
            given = {leaf: value for leaf, value in self.config.evals[name].items() if leaf != "every_steps"}
            made[name] = EVALUATORS[name].build(self, **given)
        return made

    def step_flops(self) -> float:
        """Model FLOPs of one training step: 3 x the forward pass, 2 per multiply-accumulate, no recomputation."""
        return 6.0 * self.batch_size * count_macs(self.apply, self.abstract.params, *self.method.inputs)

    def description(self) -> dict[str, Any]:
        """The leaves that samples depend on, json-able: those that are read and are not None."""
        config = self.config
        specs = leaves(config.model.name)
        given = {path: value for path, value in config.values.items() if value is not None}
        read = {path: value for path, value in given.items() if is_read(specs[path], config.values)}
        tree = json.loads(json.dumps(nested(read)))
        return {
            "model": tree["model"],
            "data": config.data.name,
            "process": tree[config.method],
            "sampling": tree["sampling"],
            "precision": self.precision,
        }

    def stored_config(self) -> dict[str, Any]:
        """The config as a run folder keeps it, json-able."""
        return stored(self.config)

    def config_sha256(self) -> str:
        text = json.dumps(self.stored_config(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def build(config: Config, mesh: Mesh | None = None, devices: Any = None, *, training: bool = True) -> Experiment:
    """Check a config against itself and the devices, and prepare the jitted functions; compiles nothing yet.

    mesh: in place of the one that the config asks for. training: whether batches have to fit the devices.
    """
    rng.check_environment()
    mesh = mesh or make_mesh(mesh_sizes(config), devices)
    if training:
        check_batch(config.batch_size, mesh, config.optim.accumulate)
        check_processes(mesh)
    method = METHODS[config.method].build(
        model_maker(config.model.name, config.model.options), data_spec(config), config.settings
    )
    model = method.model
    axes = (*method.extra_axes, *model.logical_axes)
    averages = ema.rates(config.ema, config.batch_size)

    def fresh(key: jax.Array) -> Tree:
        params, extra = model.init(key, *method.inputs)["params"], method.extra(rng.fold_name(key, "extra"))
        if both := sorted(params.keys() & extra.keys()):
            raise UserError(f"parameters of method {config.method} and of {config.model.name} have one name: {both[0]}")
        return {**params, **extra}

    params_key = rng.stream(config.seed, "params")
    known = parameters(jax.eval_shape(fresh, params_key), axes)
    optim, rate = optimizer.make(config.optim, config.total_steps, known)

    def start(params: Tree) -> TrainState:
        return initial_state(params, optim, averages.power_emas)

    def init(key: jax.Array) -> TrainState:
        return start(fresh(key))

    shapes = jax.eval_shape(init, params_key)
    parallel, state_axes = config.parallel, optimizer.OPTIMIZERS[config.optim.name].state_axes
    sharding = state_shardings(shapes, mesh, parallel.strategy, parallel.replicate_below, axes, state_axes)
    jitted_init = jax.jit(on_mesh(init, mesh), out_shardings=sharding)

    apply = bind(model)
    step = functools.partial(
        train_step,
        loss=functools.partial(method.loss, apply),
        optimizer=optim,
        learning_rate=rate,
        rates=averages,
        microbatches=config.optim.accumulate,
    )
    return Experiment(
        config=config,
        mesh=mesh,
        method=method,
        apply=apply,
        schedule=schedule(config),
        averages=averages,
        sigma_rel=ema.by_name(config.ema.sigma_rel),
        abstract=with_shardings(shapes, sharding),
        init=lambda: jitted_init(params_key),
        fresh=lambda: jax.jit(on_mesh(fresh, mesh), out_shardings=sharding.params)(params_key),
        start=jax.jit(start, out_shardings=sharding),
        step=jax.jit(on_mesh(step, mesh), donate_argnums=0, out_shardings=(sharding, replicated(mesh))),
    )


def mesh_sizes(config: Config) -> dict[str, int]:
    """Devices along each axis of the mesh."""
    mesh = config.parallel.mesh
    return {"data": mesh.data, "fsdp": mesh.fsdp, "tensor": mesh.tensor}


def schedule(config: Config) -> Schedule:
    every = {name: int(str(options["every_steps"])) for name, options in config.evals.items() if options["every_steps"]}
    saved, judge = config.checkpoint.every_steps, config.checkpoint.keep_best
    if judge and (judge not in every or every[judge] % saved):
        raise UserError(
            f"checkpoint.keep_best = {judge!r}: valid with evals.{judge}.every_steps a multiple of "
            f"checkpoint.every_steps = {saved}, so that the steps it judges are kept"
        )
    return Schedule(
        total_steps=config.total_steps,
        checkpoint_every=config.checkpoint.every_steps,
        checkpoint_minutes=config.checkpoint.every_minutes,
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every_steps,
        keep_best=config.checkpoint.keep_best,
        snapshot_every=config.ema.snapshot_every_steps,
        report_every=config.log.every_steps,
        hang_minutes=config.log.hang_minutes,
        evaluate_every=every,
    )


def model_maker(name: str, options: Options) -> contracts.MakeModel:
    """Builds the backbone of a name and options; see `contracts.MakeModel`."""

    def make(*, optional: Mapping[str, Any] = {}, **arguments: Any) -> Any:
        known = models.arguments(name)
        allowed = {argument: value for argument, value in optional.items() if argument in known}
        return models.create(name, **{**options, **allowed, **arguments})

    return make


def with_sampling(experiment: Experiment, sampling: Any) -> Experiment:
    """The experiment with other options of sampling; all else is shared."""
    values = {**experiment.config.values, **section_values("sampling.", sampling)}
    config = dataclasses.replace(experiment.config, sampling=sampling, values=values)
    return dataclasses.replace(experiment, config=config)
