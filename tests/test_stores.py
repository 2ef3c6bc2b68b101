"""Runs in an object store: a real S3 API on loopback, with faults, kills and several writers."""

import json
import os
import signal
import subprocess
import sys
import time

import boto3
import pytest
import s3
from conftest import QUICKSTART

import flaxqa
from flaxqa import batch, buckets, cli, config, inputs, stores
from flaxqa.errors import DataError, TryAgain, UsageError
from flaxqa.eval import questions

MODEL = QUICKSTART / "checkpoint"
HELDOUT = json.loads((QUICKSTART / "heldout.json").read_text())
RECORDS = [
    {"id": one["id"], "question": one["question"], "context": paragraph["context"]}
    for article in HELDOUT["data"]
    for paragraph in article["paragraphs"]
    for one in paragraph["qas"]
][:60]
RECORDS[7] |= {"question": " "}  # which is set aside
LINES = b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)
SHARD = 8


@pytest.fixture(scope="module")
def environment():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():  # fmt: skip
            patch.setenv(name, value)
        yield patch


@pytest.fixture(scope="module")
def server(environment):
    made = s3.Server()
    environment.setenv("AWS_ENDPOINT_URL", made.url)
    stores.opened.cache_clear()
    yield made
    made.stop()
    stores.opened.cache_clear()


@pytest.fixture
def bucket(server, request):
    """The URL of a new bucket."""
    name = f"b{abs(hash(request.node.nodeid))}"
    boto3.client("s3").create_bucket(Bucket=name)
    yield f"s3://{name}"
    server.fault, server.delay = lambda method, path: None, 0.0


@pytest.fixture(scope="module")
def reader():
    return flaxqa.load(MODEL, devices=1)


def options(source, output, **changes):
    given = {"shard_size": SHARD, **changes}
    return config.PredictConfig(model=str(MODEL), input=(str(source),), output=str(output), **given)


def parts_of(url):
    """The answers that are there, and what was set aside."""
    if not stores.is_url(str(url)):
        return {path.name: path.read_bytes()
                for path in [*url.glob("part-*"), url / "errors.jsonl"]}  # fmt: skip
    names = [name for name in stores.states_below(url)
             if name.startswith("part-") or name == "errors.jsonl"]  # fmt: skip
    return {name: stores.read(stores.below(url, name)) for name in names}


@pytest.fixture(scope="module")
def expected(tmp_path_factory, reader):
    """The parts of a local run."""
    folder = tmp_path_factory.mktemp("local")
    (folder / "in.jsonl").write_bytes(LINES)
    batch.predict(options(folder / "in.jsonl", folder / "out"), reader=reader)
    parts = parts_of(folder / "out")
    assert len(parts) == 9
    return parts


def put_input(bucket):
    stores.put(f"{bucket}/in.jsonl", LINES)
    return f"{bucket}/in.jsonl"


# --- runs ---


@pytest.mark.parametrize("source", ["bucket", "folder", "pattern", "local"])
def test_a_run_in_a_bucket_writes_the_bytes_of_a_local_one(
    bucket, reader, expected, tmp_path, source
):
    named = {"bucket": put_input(bucket), "pattern": f"{bucket}/*.jsonl", "folder": f"{bucket}/in",
             "local": tmp_path / "in.jsonl"}[source]  # fmt: skip
    stores.put(f"{bucket}/in/in.jsonl", LINES)
    (tmp_path / "in.jsonl").write_bytes(LINES)
    summary = batch.predict(options(named, f"{bucket}/out"), reader=reader)
    assert (summary.complete, summary.answered, summary.set_aside) == (True, 59, 1)
    assert parts_of(f"{bucket}/out") == expected
    again = batch.predict(options(named, f"{bucket}/out"), reader=reader)
    assert (again.complete, again.computed) == (True, 0)
    assert json.loads(stores.read(f"{bucket}/out/_SUCCESS"))["records"] == 60


def test_every_format_is_read_from_a_bucket(bucket, tmp_path):
    import datasets
    import pyarrow as pa
    import pyarrow.feather
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    pyarrow.feather.write_feather(pa.Table.from_pylist(RECORDS), tmp_path / "a.feather")
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    (tmp_path / "a.jsonl.gz").write_bytes(__import__("gzip").compress(LINES))
    (tmp_path / "a.jsonl.xz").write_bytes(__import__("lzma").compress(LINES))
    saved = datasets.Dataset.from_list(RECORDS)
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "saved")
    for path in tmp_path.rglob("*"):
        if path.is_file():
            stores.put(f"{bucket}/{path.relative_to(tmp_path)}", path.read_bytes())
    from test_inputs import asked

    for name in ("a.parquet", "a.feather", "a.json", "a.jsonl.gz", "a.jsonl.xz", "saved"):
        found = asked(f"{bucket}/{name}", size=7)
        assert [one.question for one in found] == [one["question"] for one in RECORDS], name
    with pytest.raises(UsageError, match="no split 'test'; it has train"):
        asked(f"{bucket}/saved", split="test")


def test_another_run_is_not_mixed_and_restart_begins_anew(bucket, reader, expected):
    source, out = put_input(bucket), f"{bucket}/out"
    batch.predict(options(source, out, top_k=2), reader=reader)
    with pytest.raises(UsageError, match="has another run.*\n.*top_k"):
        batch.predict(options(source, out), reader=reader)
    stores.put(f"{out}/mine.txt", b"")
    with pytest.raises(UsageError, match="did not write: mine.txt"):
        batch.predict(options(source, out), reader=reader, restart=True)
    stores.remove([f"{out}/mine.txt"])
    batch.predict(options(source, out), reader=reader, restart=True)
    assert parts_of(out) == expected


def test_restart_begins_anew_where_the_run_is_damaged(bucket, reader, expected):
    source, out = put_input(bucket), f"{bucket}/out"
    batch.predict(options(source, out), reader=reader)
    stores.put(f"{out}/_run.json", b"{")
    with pytest.raises(DataError, match="--restart begins anew"):
        batch.predict(options(source, out), reader=reader)
    batch.predict(options(source, out), reader=reader, restart=True)
    assert parts_of(out) == expected


@pytest.mark.parametrize("change", [b"damaged", None])
@pytest.mark.parametrize(
    "name", ["part-00003-of-00008.parquet", "_errors/part-00000-of-00008.jsonl"]
)
def test_what_was_changed_or_lost_is_computed_anew(bucket, reader, expected, name, change):
    source, out = put_input(bucket), f"{bucket}/out"
    batch.predict(options(source, out), reader=reader)
    if change is None:
        stores.remove([f"{out}/{name}"])
    else:
        stores.put(f"{out}/{name}", change)
    summary = batch.predict(options(source, out), reader=reader)
    assert summary.complete
    assert parts_of(out) == expected


def test_shares_of_a_run_need_no_lock(bucket, reader, expected):
    source, out = put_input(bucket), f"{bucket}/out"
    first = batch.predict(options(source, out), share=(0, 2), reader=reader)
    assert not first.complete
    last = batch.predict(options(source, out), share=(1, 2), reader=reader)
    assert last.complete
    assert parts_of(out) == expected


def test_whoever_is_first_counts(bucket, reader, expected):
    """A part that is there without a note, as where a writer was killed between the two."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    source, out = put_input(bucket), f"{bucket}/out"
    name = "part-00002-of-00008"
    batch.predict(options(source, out), reader=reader)

    def leave(rows):
        """The part as another kind of machine may write it, and nothing that tells of it."""
        stores.remove(
            f"{out}/{one}" for one in (f"_manifest/{name}.json", "_manifest.jsonl", "_SUCCESS")
        )
        table = pq.read_table(pa.BufferReader(expected[f"{name}.parquet"]))[:rows]
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="none")
        stores.put(f"{out}/{name}.parquet", sink.getvalue().to_pybytes())
        return sink.getvalue().to_pybytes()

    theirs = leave(SHARD)
    assert theirs != expected[f"{name}.parquet"]
    assert batch.predict(options(source, out), reader=reader).computed == 8
    assert parts_of(out) == expected | {f"{name}.parquet": theirs}
    leave(SHARD - 1)
    with pytest.raises(DataError, match="is not of this run"):
        batch.predict(options(source, out), reader=reader)


def test_many_finished_parts_are_told_by_few_objects(bucket, server, reader, expected, monkeypatch):
    monkeypatch.setattr(buckets, "ROLLED_AFTER", 3)
    source, out = put_input(bucket), f"{bucket}/out"
    batch.predict(options(source, out), reader=reader)
    stores.remove([f"{out}/_SUCCESS", f"{out}/_manifest.jsonl"])
    stores.put(f"{out}/part-00001-of-00008.parquet", b"damaged")
    begin = len(server.requests)
    assert batch.predict(options(source, out), reader=reader).computed == 8
    read = [path for method, path in server.requests[begin:]
            if method == "GET" and "/_manifest/part-" in path]  # fmt: skip
    assert len(read) == 3  # the damaged one, and two that came after the last roll
    assert parts_of(out) == expected
    batch.predict(options(source, out, top_k=2), reader=reader, restart=True)
    assert [name for name in stores.states_below(out) if "rolled" in name] != []


# --- kills and several writers ---


def start(arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "flaxqa", *map(str, arguments)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def command(bucket):
    return ["predict", f"{bucket}/in.jsonl", "--model", MODEL, "--output", f"{bucket}/out",
            "--shard-size", SHARD, "--devices", 1]  # fmt: skip


def test_two_writers_at_once_never_harm_each_other(bucket, expected):
    put_input(bucket)
    both = [start(command(bucket)) for _ in range(2)]
    for one in both:
        _, errors = one.communicate(timeout=120)
        assert one.returncode == 3, errors.decode()  # one record was set aside
    assert parts_of(f"{bucket}/out") == expected
    assert stores.state_of(f"{bucket}/out/_SUCCESS") is not None


def test_kills_at_any_point_cost_a_shard_at_most(bucket, server, expected):
    put_input(bucket)
    kills = 0
    for puts in (1, 3, 4, 4, 4, 4):
        seen = len(server.requests)
        server.delay = 0.02
        run = start(command(bucket))
        while run.poll() is None:
            done = [one for one in server.requests[seen:] if one[0] == "PUT"]
            if len(done) >= puts:
                run.send_signal(signal.SIGKILL)
            time.sleep(0.005)
        run.communicate()
        kills += run.returncode == -signal.SIGKILL
    server.delay = 0.0
    last = start(command(bucket))
    _, errors = last.communicate(timeout=120)
    assert last.returncode == 3, errors.decode()
    assert kills >= 5
    assert parts_of(f"{bucket}/out") == expected


@pytest.mark.slow
def test_ray_with_nothing_shared_but_the_bucket(bucket, expected, tmp_path, monkeypatch):
    put_input(bucket)
    for path in MODEL.iterdir():
        stores.put(f"{bucket}/checkpoint/{path.name}", path.read_bytes())
    own = [*command(bucket), "--engine", "ray", "--workers", 2]
    own[own.index(MODEL)] = f"{bucket}/checkpoint"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run = start(own)
    _, errors = run.communicate(timeout=200)
    assert run.returncode == 3, errors.decode()
    assert parts_of(f"{bucket}/out") == expected


# --- faults ---


def fail_request(server, number, status=500):
    """Lets the request of that number from now on fail, once; gives what was failed."""
    begin, failed = len(server.requests), []

    def fault(method, path):
        if len(server.requests) - begin != number or failed:
            return None
        failed.append((method, path))
        return status

    server.fault = fault
    return failed


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_a_fault_at_every_point_ends_with_75_and_is_resumed(
    bucket, server, reader, tmp_path, monkeypatch, every
):
    monkeypatch.setattr(stores, "TRIES", 1)
    (tmp_path / "in.jsonl").write_bytes(LINES)
    batch.predict(options(tmp_path / "in.jsonl", tmp_path / "out", shard_size=30), reader=reader)
    wanted = parts_of(tmp_path / "out")

    def run(out):
        inputs.sha256_of.cache_clear()
        return batch.predict(options(put_input(bucket), out, shard_size=30), reader=reader)

    begin = len(server.requests)
    run(f"{bucket}/whole")
    total = len(server.requests) - begin
    kinds = set()
    for number in range(2, total + 1, every):  # the first puts the input
        out = f"{bucket}/out{number}"
        failed = fail_request(server, number)
        with pytest.raises(TryAgain, match=bucket):
            run(out)
        kinds |= {method for method, _ in failed}
        server.fault = lambda method, path: None
        assert run(out).complete
        assert parts_of(out) == wanted, number
    if every == 1:
        assert kinds == {"GET", "PUT", "LIST", "HEAD", "DELETE"}
    assert total > 30


def test_throttling_is_waited_for(bucket, server, reader, expected, monkeypatch):
    monkeypatch.setattr(stores, "PAUSE", 0.01)
    source = put_input(bucket)
    counted = []

    def fault(method, path):
        counted.append(path)
        return 503 if len(counted) % 3 == 0 else None

    server.fault = fault
    assert batch.predict(options(source, f"{bucket}/out"), reader=reader).complete
    server.fault = lambda method, path: None
    assert parts_of(f"{bucket}/out") == expected


def run_cli(*arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main([str(one) for one in arguments])
    return ended.value.code


@pytest.mark.parametrize("command", ["predict", "eval"])
def test_missing_credentials_are_told_before_the_model_loads(
    bucket, command, monkeypatch, capsys, tmp_path
):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setattr(flaxqa.checkpoint, "load", None)
    stores.opened.cache_clear()
    (tmp_path / "in.jsonl").write_bytes(LINES)
    given = {"predict": [tmp_path / "in.jsonl"], "eval": ["--data", QUICKSTART / "heldout.json"]}
    code = run_cli(command, *given[command], "--model", MODEL, "--output", f"{bucket}/out")
    stores.opened.cache_clear()
    assert code == 2
    assert "credentials" in (told := capsys.readouterr().err)
    assert "AWS_PROFILE" in told


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://no-such-bucket/in.jsonl", "is missing|cannot be"),
        ("gs://bucket/in.jsonl", r"pip install 'flaxqa\[gcs\]'"),
        ("az://bucket/in.jsonl", r"pip install 'flaxqa\[azure\]'"),
        ("https://example.org/in.jsonl", "a URL that cannot be used here"),
        ("simplecache::s3://bucket/in.jsonl", "missing|URL"),
    ],
)
def test_what_cannot_be_opened_is_told(server, url, message):
    with pytest.raises(UsageError, match=message):
        inputs.find([url])


def test_a_store_that_replaces_what_is_there_is_refused(bucket, reader, monkeypatch):
    store = stores.placed(bucket)[0]
    create = type(store).pipe_file

    def careless(path, value, mode="overwrite", **kwargs):
        return create(store, path, value, **kwargs)

    monkeypatch.setattr(store, "pipe_file", careless)
    with pytest.raises(UsageError, match="cannot be written safely"):
        batch.predict(options(put_input(bucket), f"{bucket}/out"), reader=reader)


# --- listings, checkpoints, configs, evaluation ---


def test_a_listing_of_many_pages_is_whole(bucket):
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        client = boto3.client("s3")
        name = bucket.removeprefix("s3://")
        list(pool.map(
            lambda i: client.put_object(Bucket=name, Key=f"out/part-{i:05d}", Body=b"x"),
            range(1_500),
        ))  # fmt: skip
    assert len(stores.states_below(f"{bucket}/out")) == 1_500


def test_checkpoint_data_config_and_results_of_an_evaluation(bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for path in MODEL.iterdir():
        stores.put(f"{bucket}/checkpoint/{path.name}", path.read_bytes())
    stores.put(f"{bucket}/dev.json", (QUICKSTART / "heldout.json").read_bytes())
    stores.put(
        f"{bucket}/configs/mine.toml",
        b'model = "../checkpoint"\ndata = "../dev.json"\nlimit = 40\noutput = "../run"\n',
    )
    assert run_cli("eval", "--config", f"{bucket}/configs/mine.toml") == 0
    metrics = json.loads(stores.read(f"{bucket}/run/metrics.json"))
    local = tmp_path / "local"
    assert run_cli("eval", "--model", MODEL, "--data", QUICKSTART / "heldout.json", "--limit", "40",
                   "--output", local) == 0  # fmt: skip
    names = {path.name for path in local.iterdir()}
    assert {*stores.states_below(f"{bucket}/run")} == names
    assert (
        stores.read(f"{bucket}/run/predictions.json") == (local / "predictions.json").read_bytes()
    )
    capsys.readouterr()
    run_cli("score", f"{bucket}/dev.json", f"{bucket}/run/predictions.json", "--only-predicted",
            "--out-file", f"{bucket}/score.json")  # fmt: skip
    assert json.loads(stores.read(f"{bucket}/score.json"))["f1"] == metrics["f1"]
    again = flaxqa.load(f"{bucket}/checkpoint", devices=1)
    assert again.checkpoint.name == f"{bucket}/checkpoint"
    assert len(list((tmp_path / "cache" / "flaxqa" / "fetched").iterdir())) == 1


def test_a_changed_checkpoint_is_fetched_anew(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for path in MODEL.iterdir():
        stores.put(f"{bucket}/c/{path.name}", path.read_bytes())
    first = flaxqa.checkpoint.load(f"{bucket}/c").directory
    assert flaxqa.checkpoint.load(f"{bucket}/c/").directory != first or first.is_dir()
    content = json.loads((MODEL / "config.json").read_text())
    stores.put(f"{bucket}/c/config.json", json.dumps(content | {"x": 1}).encode())
    assert flaxqa.checkpoint.load(f"{bucket}/c").directory != first


def test_file_urls_are_local(tmp_path):
    (tmp_path / "a b.jsonl").write_bytes(LINES)
    url = (tmp_path / "a b.jsonl").as_uri()
    assert url.startswith("file:///")
    (found,) = inputs.find([url])
    assert found.path == str(tmp_path / "a b.jsonl")
    with pytest.raises(DataError, match="a URL that cannot be used here"):
        questions.inputs_of("ftp://x/y.json", config.DataOptions())


def test_environment_is_only_for_loopback(server):
    assert os.environ["AWS_ENDPOINT_URL"].startswith("http://127.0.0.1:")
