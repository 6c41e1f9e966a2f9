import json

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from diffjax.training import metrics
from diffjax.training.metrics import Board, NonFiniteError, Reporter, Spent, memory, peak_flops


class FakeDevice:
    def __init__(self, kind):
        self.device_kind = kind


def reporter(folder, **kwargs):
    options = {"total_steps": 4, "batch_size": 8, "every_steps": 2, "flops_per_step": 1e9, "tensorboard": False}
    return Reporter(folder, **{**options, **kwargs})


def scalars(loss, grad_norm=1.0):
    return {"loss": jnp.float32(loss), "grad_norm": jnp.float32(grad_norm)}


def test_windows_are_averaged_and_appended(tmp_path, capsys):
    report = reporter(tmp_path)
    for step, loss in enumerate((1.0, 3.0, 5.0, 9.0), start=1):
        report.step(step, scalars(loss) | {"learning_rate": jnp.float32(step / 8)})
    report.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(2, 2.0), (4, 7.0)]
    assert lines[1]["images_per_second"] == pytest.approx(8 / lines[1]["step_seconds"])
    assert lines[1]["tflops_per_second"] == pytest.approx(1e-3 / lines[1]["step_seconds"])
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("step 2/4  loss 2.0000  grad_norm 1.000  learning_rate 0.25  images_per_second ")
    assert lines[1]["learning_rate"] == 0.5


@pytest.mark.parametrize("values", [scalars(np.nan), scalars(np.inf), scalars(1.0, np.nan)])
def test_a_non_finite_loss_or_gradient_names_its_step(tmp_path, values):
    report = reporter(tmp_path)
    with pytest.raises(NonFiniteError, match="at step 3"):
        report.step(3, values)
    report.close()


def test_a_pause_is_not_counted_as_step_time(tmp_path):
    report = reporter(tmp_path, every_steps=4)
    for step in (1, 2):
        report.step(step, scalars(1.0))
    report.pause()
    report.step(3, scalars(1.0))
    assert len(report._durations) == 1
    report.close()


def test_tensorboard_gets_scalars_and_pictures(tmp_path):
    report = reporter(tmp_path, tensorboard=True, every_steps=1)
    report.step(1, scalars(2.5))
    report.image("samples", 1, np.zeros((4, 4, 3), np.uint8))
    report.close()
    [file] = (tmp_path / "tensorboard").iterdir()
    data, tags = file.read_bytes(), set()
    while data:  # records: length (8), its checksum (4), payload, checksum (4)
        length = int.from_bytes(data[:8], "little")
        tags |= {value.tag for value in Event.FromString(data[12 : 12 + length]).summary.value}
        data = data[16 + length :]
    assert {"loss", "grad_norm", "samples"} <= tags


def test_a_silent_process_writes_nothing(tmp_path, capsys):
    report = reporter(tmp_path, lead=False, tensorboard=True)
    for step in (1, 2):
        report.step(step, scalars(1.0))
    report.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_peaks_are_found_by_the_longest_name():
    assert peak_flops(FakeDevice("TPU v5 lite")) == 197e12
    assert peak_flops(FakeDevice("TPU v5p")) == 459e12
    assert peak_flops(FakeDevice("NVIDIA H100 80GB HBM3")) == 989e12
    assert peak_flops(FakeDevice("cpu")) is None


def test_tensorboard_forgets_what_is_passed_again(tmp_path):
    """The first event of a start that resumes from a step says so; what was written beyond it counts no more."""
    Board(tmp_path / "first").close()
    Board(tmp_path / "again", start=40).close()
    events = {}
    for name in ("first", "again"):
        [file] = (tmp_path / name).iterdir()
        events[name] = list(records(file.read_bytes()))
    assert not [event for event in events["first"] if event.HasField("session_log")]
    [begin] = [event for event in events["again"] if event.HasField("session_log")]
    assert (begin.step, begin.session_log.status) == (41, SessionLog.START)


def records(data):
    """The events of a file: length, checksum, event, checksum."""
    while data:
        size = int.from_bytes(data[:8], "little")
        yield Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets, for all that the reporter asks."""

    class Clock:
        now = 1000.0

    for name in ("perf_counter", "monotonic", "time"):
        monkeypatch.setattr(metrics.time, name, lambda: Clock.now)
    return Clock


def test_goodput_is_the_time_of_kept_steps_over_that_since_the_first_start(tmp_path, clock):
    report = reporter(tmp_path / "..", every_steps=10, total_steps=100, lead=False)
    clock.now += 30
    report.step(1, scalars(1.0), asked=clock.now - 25)  # compiles: not useful
    for step in (2, 3):
        clock.now += 2
        report.step(step, scalars(1.0), asked=clock.now - 1)
    report.pause()
    clock.now += 6  # a checkpoint
    clock.now += 3
    report.step(4, scalars(1.0), asked=clock.now - 3)
    assert report.spent() == Spent(seconds=43, useful=7, elapsed=43, starts=1)
    meta = report.spent().to_meta()
    assert meta["goodput"] == 7 / 43

    clock.now += 57  # lost steps, and nobody there
    again = reporter(tmp_path / "..", before=Spent.of_meta(meta), lead=False)
    clock.now += 10
    assert again.spent() == Spent(seconds=53, useful=7, elapsed=110, starts=2)


def test_a_clock_that_went_back_takes_no_time_away(clock):
    meta = Spent(seconds=5, useful=4, elapsed=5, starts=1).to_meta()
    clock.now -= 500
    assert Spent.of_meta(meta) == Spent(seconds=5, useful=4, elapsed=5, starts=1)


def test_a_run_of_an_earlier_version_counts_its_goodput_from_now_on():
    assert Spent.of_meta({"seconds": 77.0}) == Spent(seconds=77.0)
    assert Spent.of_meta({}) == Spent()


def test_memory_is_that_of_the_fullest_device():
    class Device:
        def __init__(self, used, peak):
            self.stats = {"bytes_in_use": used * 2**30, "peak_bytes_in_use": peak * 2**30, "num_allocs": 3}

        def memory_stats(self):
            return self.stats

    assert memory([Device(3, 8), Device(5, 7)]) == {"memory_gib": 5, "memory_peak_gib": 8}
    assert memory([type("Silent", (), {"memory_stats": lambda self: None})()]) == {}
