"""Batch runs that are killed, out of memory, shared by processes, or computed by Ray."""

import collections
import errno
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT
from test_batch import (  # noqa: F401 (fixtures)
    GOOD,
    MODEL,
    QUESTIONS,
    configured,
    contents,
    lines_of,
    reader,
    rows,
    source,
    table_of,
    undisturbed,
)

from flaxqa import batch, cli, files, parts, plan, predict, work
from flaxqa.answerer import QuestionAnswerer
from flaxqa.errors import TryAgain, UsageError
from flaxqa.features import Windows


def command(source, output, *options):
    return [sys.executable, "-m", "flaxqa.cli", "predict", str(source), "--output", str(output),
            "--model", MODEL, "--shard-size", "30", *options]  # fmt: skip


def environment(**more):
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **more}


@pytest.fixture(scope="module")
def long_source(rows, tmp_path_factory):
    """Enough records for a run of a few seconds."""
    path = tmp_path_factory.mktemp("long") / "a.jsonl"
    with path.open("w") as file:
        for number in range(20 * QUESTIONS):
            row = rows[number % QUESTIONS]
            file.write(json.dumps({**row, "id": f"{row['id']}-{number}"}) + "\n")
    return path


@pytest.fixture(scope="module")
def long_undisturbed(long_source, tmp_path_factory):
    """A run from beginning to end, and its seconds."""
    output = tmp_path_factory.mktemp("long-undisturbed")
    began = time.monotonic()
    subprocess.run(
        command(long_source, output, "--shard-size", "100"),
        env=environment(), check=True, capture_output=True,
    )  # fmt: skip
    return contents(output), time.monotonic() - began


def computed_shards(output):
    """How often each shard was noted."""
    lines = (output / "_manifest.jsonl").read_bytes().splitlines()
    return collections.Counter(json.loads(line)["shard"] for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, 12])
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(
    long_source, long_undisturbed, tmp_path, kills
):
    reference, seconds = long_undisturbed
    rng = random.Random(0)
    killed = 0
    while killed < kills:
        output = tmp_path / f"out{killed}"
        while killed < kills:
            process = subprocess.Popen(
                command(long_source, output, "--shard-size", "100"), env=environment(),
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            try:
                process.wait(rng.uniform(0, 1.1 * seconds))
                assert process.returncode == 0
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                killed += 1
                # What was noted stays and is never computed again: one shard is lost at most.
                if (output / "_manifest.jsonl").exists():
                    assert max(computed_shards(output).values(), default=1) == 1
        done = subprocess.run(
            command(long_source, output, "--shard-size", "100"),
            env=environment(), capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode()
        assert contents(output) == reference
        assert set(computed_shards(output).values()) == {1}


def test_sigterm_ends_a_run_within_five_seconds_and_it_goes_on(
    long_source, long_undisturbed, tmp_path
):
    reference, _ = long_undisturbed
    process = subprocess.Popen(
        command(long_source, tmp_path, "--shard-size", "100"), env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not list(tmp_path.glob("part-*")) and process.poll() is None:
        time.sleep(0.02)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 143
    assert time.monotonic() - began < 5
    done = subprocess.run(
        command(long_source, tmp_path, "--shard-size", "100"),
        env=environment(),
        capture_output=True,
    )
    assert done.returncode == 0
    assert contents(tmp_path) == reference


def test_a_full_disk_is_told_of_and_the_run_goes_on_when_there_is_room(
    monkeypatch, source, undisturbed, tmp_path, capsys
):
    """os.write fails as it does on a full disk, in the middle of a part."""
    write, written = os.write, 0

    def until_full(descriptor, content):
        nonlocal written
        if written > 20_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = write(descriptor, content[:4_096])
        written += count
        return count

    arguments = command(source, tmp_path)[3:]
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "write", until_full)
        with pytest.raises(SystemExit) as error:
            cli.main(arguments)
    assert error.value.code == 75
    told = capsys.readouterr().err
    assert "No space left on device" in told
    assert str(tmp_path / "part-0000") in told
    with pytest.raises(SystemExit) as error:
        cli.main(arguments)
    assert error.value.code == 0
    assert contents(tmp_path) == contents(undisturbed)


@pytest.mark.parametrize("kernels", ["native", "xla"])
def test_batches_are_halved_when_the_memory_does_not_suffice(
    monkeypatch, source, undisturbed, tmp_path, kernels, caplog
):
    most = 500
    predictors = []
    start = predict.Predictor.start

    def with_little_memory(self, chosen, chunk):
        predictors.append(self)
        one = start(self, chosen, chunk)
        if chosen.shape.tokens > most:
            return one._replace(logits=None)
        return one

    monkeypatch.setattr(predict.Predictor, "start", with_little_memory)
    summary = batch.predict(configured(source, tmp_path, kernels=kernels))
    assert summary.batch_tokens == predictors[0].row_tokens[-1] == 384  # the longest window
    assert summary.answered == QUESTIONS
    assert "out of memory with batches of" in caplog.text
    assert table_of(tmp_path)["answer"] == table_of(undisturbed)["answer"]
    entries = lines_of(tmp_path / "_manifest.jsonl")
    assert entries[-1]["computed_by"]["batch_tokens"] == 384
    if kernels == "native":
        assert contents(tmp_path) == contents(undisturbed)


def test_memory_that_does_not_suffice_for_one_window_ends_the_run(monkeypatch, source, tmp_path):
    def without_memory(self, chosen, chunk):
        return predict.UnderWay(chunk, chosen, None)

    with monkeypatch.context() as patch:
        patch.setattr(predict.Predictor, "start", without_memory)
        with pytest.raises(TryAgain, match="memory does not suffice for a batch of 384 tokens"):
            batch.predict(configured(source, tmp_path))
    assert batch.predict(configured(source, tmp_path)).complete


def test_an_error_of_the_devices_is_recognised_as_lack_of_memory(source, tmp_path, monkeypatch):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
    assert predict.is_out_of_memory(error)
    assert not predict.is_out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: no"))

    def failing(*arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: the device is lost")

    predictor = work.load_reader(configured(source, tmp_path)).predictor
    shape = predictor.plan([10])[0].shape
    predictor.compiled[shape] = failing
    nothing = predict.Chunk(Windows.of([]), [], np.dtype(np.float32))
    empty = plan.Batch(shape, [[] for _ in predictor.devices])
    with pytest.raises(jax.errors.JaxRuntimeError, match="device is lost"):
        predictor.start(empty, nothing)


# --- several processes ---


def test_processes_that_share_the_work_write_the_same_bytes(source, undisturbed, tmp_path):
    config = configured(source, tmp_path)
    first = batch.predict(config, share=(0, 2))
    assert not first.complete
    assert first.computed == 70  # shards 0, 2 and the short 4
    with pytest.raises(TryAgain, match=r"misses part-00001-of-00005, part-00003-of-00005"):
        batch.finalize(tmp_path)
    second = batch.predict(config, share=(1, 2))
    assert second.complete  # the last one to end completes the run
    assert contents(tmp_path) == contents(undisturbed)
    assert [path.name for path in tmp_path.glob("_manifest*")] == ["_manifest.jsonl"]
    assert batch.finalize(tmp_path).answered == 130
    assert batch.predict(config).computed == 0


def test_a_run_can_go_on_with_another_number_of_processes(source, undisturbed, tmp_path):
    config = configured(source, tmp_path)
    batch.predict(config, share=(2, 3))
    assert batch.predict(config, share=(0, 2)).computed == 70 - 30
    assert batch.predict(config).computed == 130 - 30 - 40
    assert contents(tmp_path) == contents(undisturbed)


def test_a_share_that_cannot_be_is_refused(source, tmp_path):
    for share in ((2, 2), (-1, 2)):
        with pytest.raises(UsageError, match="the first must be from 0 to"):
            batch.predict(configured(source, tmp_path), share=share)
    with pytest.raises(UsageError, match="has no run"):
        batch.finalize(tmp_path)


def test_processes_of_jax_distributed_write_the_same_bytes(source, undisturbed, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            command(source, tmp_path, "--multihost"),
            env=environment(JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_NUM_PROCESSES="2",
                            JAX_PROCESS_ID=str(i), JAX_NUM_CPU_DEVICES="1"),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert (tmp_path / "_SUCCESS").exists()
    assert contents(tmp_path) == contents(undisturbed)


@pytest.fixture(scope="module")
def cluster():
    """Ray, on loopback, in this machine."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        include_dashboard=False, _node_ip_address="127.0.0.1", object_store_memory=128 << 20,
        log_to_driver=False, logging_level="ERROR", num_cpus=2,
        runtime_env={"env_vars": {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}},
    )  # fmt: skip
    yield ray
    ray.shutdown()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("workers", [1, 2])
def test_ray_writes_the_same_bytes(cluster, source, undisturbed, tmp_path, workers):
    summary = batch.predict(configured(source, tmp_path, engine="ray", workers=workers))
    assert summary.complete
    assert summary.computed == 130
    assert contents(tmp_path) == contents(undisturbed)
    assert batch.predict(configured(source, tmp_path, engine="ray")).computed == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_worker_of_ray_that_is_killed_is_replaced(
    cluster, long_source, long_undisturbed, tmp_path
):
    import psutil

    reference, _ = long_undisturbed
    config = configured(long_source, tmp_path, engine="ray", workers=1, shard_size=100)
    killed = []
    note = parts.Output.note

    def kill_a_worker(self, entry):
        note(self, entry)
        if len(killed) < 1 and entry.shard >= 3:
            for process in psutil.process_iter(["cmdline"]):
                line = " ".join(process.info["cmdline"] or [])
                if line.startswith("ray::") and "RayWorker" in line:
                    process.kill()
                    killed.append(process.pid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts.Output, "note", kill_a_worker)
        summary = batch.predict(config)
    assert killed
    assert summary.complete
    assert contents(tmp_path) == reference


# --- in other people's pipelines ---


def test_a_dataset_is_mapped(rows, reader):
    import datasets

    dataset = datasets.Dataset.from_list([*rows[:40], {**GOOD, "question": " ", "n": 40}])
    answered = dataset.map(QuestionAnswerer(MODEL), batched=True, batch_size=16)
    assert answered.column_names == [
        "id", "question", "context", "n", "answer", "start", "end", "score", "no_answer_score",
        "n_windows", "error",
    ]  # fmt: skip
    for row, one in zip(answered, reader.answers(rows[:40]), strict=False):
        assert (row["answer"], row["start"], row["score"]) == (
            one[0].text, one[0].start, pytest.approx(one[0].score),
        )  # fmt: skip
    assert (answered[40]["answer"], answered[40]["start"]) == ("", -1)
    assert answered[0]["error"] == ""
    assert answered[40]["error"] == "the question is blank"
    with pytest.raises(UsageError, match="no column 'passage'; it has id, question"):
        dataset.map(QuestionAnswerer(MODEL, context="passage"), batched=True)


@pytest.mark.filterwarnings("default")
def test_a_dataset_of_ray_is_mapped(cluster, rows, reader):
    import ray.data

    dataset = ray.data.from_items(rows[:40]).map_batches(
        QuestionAnswerer, fn_constructor_args=(MODEL,), batch_size=16, num_cpus=0.2,
        compute=ray.data.ActorPoolStrategy(size=1),
    )  # fmt: skip
    found = sorted(dataset.take_all(), key=lambda row: row["n"])
    wanted = [one[0].text for one in reader.answers(rows[:40])]
    assert [row["answer"] for row in found] == wanted
