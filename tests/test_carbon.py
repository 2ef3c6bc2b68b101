"""Energy and CO2e: sums against numbers by hand, and a real tracker without a network."""

import functools
import importlib.util
import json
import logging
import signal
import socket
import subprocess
import sys
import time
import types

import pytest
from conftest import QUICKSTART
from test_batch import Stop, contents, stopped_after
from test_run import Stopped as Halted
from test_run import quickstart, small_chunks, stop_after  # noqa: F401 (a fixture)
from test_stores import bucket, environment, server  # noqa: F401 (fixtures)

import flaxqa
from flaxqa import batch, carbon, cli, parts, stores
from flaxqa.config import CarbonOptions, PredictConfig
from flaxqa.errors import UsageError
from flaxqa.eval import api, compare, evaluated, plots, report, run, summaries
from flaxqa.eval.config import CompareConfig, EvalConfig

MODEL, HELDOUT = str(QUICKSTART / "checkpoint"), str(QUICKSTART / "heldout.json")
FRANCE = {"carbon": True, "country": "FRA"}
READER = functools.cache(lambda: flaxqa.load(MODEL))


class Fake:
    """A tracker that has always measured 3 Wh when it stops, and 1 Wh when it starts."""

    made: list["Fake"] = []  # noqa: RUF012 (emptied by the fixture)

    def __init__(self, handler):
        self.handler, self.stopped = handler, False
        self.made.append(self)

    def data(self, kwh, seconds):
        return types.SimpleNamespace(
            energy_consumed=kwh, cpu_energy=kwh / 2, gpu_energy=0.0, ram_energy=kwh / 2,
            duration=seconds, tracking_mode="machine",
        )  # fmt: skip

    def start(self):
        self.handler.live_out(self.data(0.001, 1.0), None)

    def stop(self):
        self.stopped = True
        self.handler.out(self.data(0.003, 10.0), None)


@pytest.fixture
def fake(monkeypatch):
    """Trackers that measure nothing; each on a machine of its own."""
    monkeypatch.setattr(Fake, "made", [])
    monkeypatch.setattr(carbon, "tracker_of", lambda grid, handler: Fake(handler))
    monkeypatch.setattr(carbon, "this_host", lambda: f"host {len(Fake.made)}")
    return Fake.made


@pytest.fixture
def covered(monkeypatch):
    """The platforms that meters were asked about."""
    platforms, covers = [], carbon.Meter.covers

    def asked(self, platform):
        platforms.append(platform)
        covers(self, platform)

    monkeypatch.setattr(carbon.Meter, "covers", asked)
    return platforms


# --- what is refused ---


def told_by(capsys, *arguments):
    with pytest.raises(SystemExit) as error:
        cli.main(list(map(str, arguments)))
    return error.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--carbon"], "--country FRA, or --grid"),
        (["--carbon", "--country", "FRA", "--grid", "50"], "give only one"),
        (["--country", "FRA"], "country is given without --carbon"),
        (["--grid", "50"], "grid is given without --carbon"),
        (["--carbon", "--country", "fra"], "--country is 'fra', it must be three capital letters"),
        (["--carbon", "--country", "France"], "it must be three capital letters"),
        (["--carbon", "--grid", "-1"], "--grid is -1.0, it must be a number of at least 0"),
        (["--carbon", "--grid", "nan"], "--grid is nan, it must be a finite number"),
        (["--carbon", "--country", "ZZZ"], "'ZZZ', which codecarbon"),
        (["--carbon", "--country", "CAF"], "Central African Republic, for which codecarbon"),
    ],
)
@pytest.mark.parametrize("command", ["eval", "predict", "compare", "bench"])
def test_a_country_or_a_number_that_cannot_be_is_refused_by_name_before_a_model_is_looked_for(
    command, options, message, tmp_path, capsys
):
    data = [HELDOUT] if command == "predict" else ["--data", HELDOUT]
    common = ("--model", tmp_path / "none", "--output", tmp_path / "out")
    code, told = told_by(capsys, command, *data, *common, *options)
    assert code == 2
    assert message in told
    assert "none is missing" not in told


def test_from_python_the_same_is_refused():
    for kind, needed in ((EvalConfig, "data"), (CompareConfig, "data"), (PredictConfig, "input")):
        with pytest.raises(UsageError, match="give only one"):
            kind(model="m", output="o", **{needed: ("d",)}, carbon=True, country="FRA", grid=1.0)
    assert CarbonOptions(carbon=True, grid=0).grid == 0  # one's own water mill


def test_without_codecarbon_it_is_said_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'flaxqa\[carbon\]'"):
        run.evaluate(quickstart(tmp_path, model="none", **FRANCE))


def test_actors_of_ray_are_not_measured(tmp_path):
    with pytest.raises(UsageError, match="--carbon is for the engine local"):
        predict(tmp_path, engine="ray", **FRANCE)


def test_a_tracker_that_does_not_start_is_told_of_with_its_reason(monkeypatch):
    class Broken(Fake):
        def start(self):  # as codecarbon does with every error
            try:
                raise OSError("no such sensor")
            except OSError:
                logging.getLogger("codecarbon").warning("graceful", exc_info=True)

    monkeypatch.setattr(carbon, "tracker_of", lambda grid, handler: Broken(handler))
    with (
        pytest.raises(UsageError, match="cannot start here: OSError: no such sensor"),
        carbon.Meter(CarbonOptions(**FRANCE)),
    ):
        pass


def test_devices_that_codecarbon_does_not_see_are_refused(fake):
    with carbon.Meter(CarbonOptions(**FRANCE)) as meter:
        meter.covers("cpu")
        with pytest.raises(UsageError, match="computes on TPUs"):
            meter.covers("tpu")
        meter.latest["measured_by"]["gpu"] = "NVML"
        meter.covers("gpu")
    with carbon.Meter(CarbonOptions()) as meter:
        meter.covers("tpu")


# --- off ---


def test_without_carbon_nothing_of_it_is_imported_or_written(tmp_path):
    code = f"""
import sys
from flaxqa import cli
for arguments in (
    ["eval", "--config", "quickstart", "--limit", "20", "--output", {str(tmp_path / "e")!r}],
    ["predict", {HELDOUT!r}, "--model", {MODEL!r}, "--output", {str(tmp_path / "p")!r}],
):
    try:
        cli.main(arguments)
    except SystemExit as end:
        assert end.code == 0
print([name for name in sys.modules if name.startswith("codecarbon")])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=tmp_path)  # fmt: skip
    *_, modules = done.stdout.splitlines()
    assert modules == "[]"
    assert "carbon" not in done.stdout
    assert "energy" not in done.stderr
    assert not [path for path in tmp_path.rglob("*") if "carbon" in path.name]
    for name in ("e/metrics.json", "p/_SUCCESS"):
        assert "carbon" not in json.loads((tmp_path / name).read_text())


# --- factors and sums ---


def test_every_factor_is_the_one_that_codecarbon_itself_would_use():
    from codecarbon.core.emissions import Emissions
    from codecarbon.core.units import Energy
    from codecarbon.external.geography import GeoMetadata
    from codecarbon.input import DataSource

    source = DataSource()
    mixes, own, refused = source.get_global_energy_mix_data(), Emissions(source), []
    for country in mixes:
        try:
            grams, told = carbon.factor(CarbonOptions(carbon=True, country=country))
        except UsageError:
            refused.append(country)
            continue
        kilograms = own.get_country_emissions(Energy.from_energy(kWh=2), GeoMetadata(country))
        assert grams == pytest.approx(1000 * kilograms / 2)
        assert mixes[country]["country_name"] in told
    assert refused == ["CAF"]
    assert len(mixes) > 200


def record(kwh=(0.0, 0.0, 0.0), grid=100.0, began=0.0, ended=10.0, **more):
    names = ("kwh_cpu", "kwh_gpu", "kwh_ram")
    return {
        "kwh": sum(kwh), **dict(zip(names, kwh, strict=True)), "g_co2e": sum(kwh) * grid,
        "grid_g_per_kwh": grid, "country": "FRA", "source": "a", "seconds": ended - began,
        "measured_by": {"cpu": "RAPL", "gpu": None, "ram": "estimate"}, "tracking": "machine",
        "hosts": 1, "questions": 10, "codecarbon": "3", "host": "A", "gpus": "all",
        "began": began, "ended": ended, **more,
    }  # fmt: skip


# Of records, by hand: kWh of CPU, GPU and RAM, g, seconds, hosts.
SUMS = {
    "one": ([record((1, 2, 3))], (1, 2, 3, 600, 10, 1)),
    "two hosts": (
        [record((1, 2, 3)), record((10, 0, 1), host="B", ended=5.0)],
        (11, 2, 4, 1700, 15, 2),
    ),
    "a host after a pause": (
        [record((1, 0, 1)), record((2, 0, 2), began=50.0, ended=60.0)],
        (3, 0, 3, 600, 20, 1),
    ),
    # Ten seconds, in which each of two meters measured the same machine.
    "a host twice at once": (
        [record((1, 4, 3)), record((1, 4, 3))],
        (1, 4, 3, 800, 10, 1),
    ),
    # 0 to 10 and 5 to 15: 15 of 20 seconds count.
    "a host overlapping": (
        [record((1, 4, 3)), record((1, 4, 3), began=5.0, ended=15.0)],
        (1.5, 6, 4.5, 1200, 15, 1),
    ),
    "one inside another": (
        [record((3, 0, 3), ended=30.0), record((1, 0, 1), began=10.0, ended=20.0)],
        (3, 0, 3, 600, 30, 1),
    ),
    "a GPU for each": (
        [record((1, 4, 3), gpus="0"), record((1, 5, 3), gpus="1")],
        (1, 9, 3, 1300, 10, 1),
    ),
    "another electricity": (
        [record((1, 0, 0)), record((3, 0, 0), host="B", grid=20.0)],
        (4, 0, 0, 160, 20, 2),
    ),
}


@pytest.mark.parametrize("name", SUMS)
def test_records_add_up_as_by_hand(name):
    records, (cpu, gpu, ram, grams, seconds, hosts) = SUMS[name]
    for order in (records, records[::-1]):
        found = carbon.add(*order)
        assert [found[f"kwh_{part}"] for part in carbon.PARTS] == pytest.approx([cpu, gpu, ram])
        assert found["kwh"] == pytest.approx(cpu + gpu + ram)
        assert found["g_co2e"] == pytest.approx(grams)
        assert found["grid_g_per_kwh"] == pytest.approx(grams / (cpu + gpu + ram))
        assert (found["seconds"], found["hosts"]) == (pytest.approx(seconds), hosts)
        assert found["questions"] == 10 * len(records)
        assert not {"host", "gpus", "began", "ended"} & found.keys()
    assert carbon.add(found, record((1, 0, 0)))["hosts"] == hosts + 1  # sums can be added, too
    assert carbon.add(found, record((1, 0, 0)))["kwh_cpu"] == pytest.approx(cpu + 1)


def test_a_sum_says_all_ways_in_which_it_was_measured_once_each():
    mixed = {"cpu": "estimate: 8 W", "gpu": "NVML", "ram": "estimate"}
    other = record(host="B", measured_by=mixed, country=None, source="given by --grid")
    found = carbon.add(record(), other, record())
    assert found["measured_by"] == {"cpu": "RAPL; estimate: 8 W", "gpu": "NVML", "ram": "estimate"}
    assert (found["country"], found["source"]) == ("FRA", "a; given by --grid")
    assert carbon.add(found, other)["measured_by"] == found["measured_by"]
    assert (found["kwh"], found["grid_g_per_kwh"]) == (0, 100)


def test_numbers_for_a_thousand_questions_are_by_those_that_were_measured():
    assert carbon.per_1000(record((1, 0, 1)), 500) == {
        "kwh_per_1000_questions": 4.0, "g_co2e_per_1000_questions": 400.0,
    }  # fmt: skip
    assert set(carbon.per_1000(record((1, 0, 1)), 0).values()) == {None}
    found = carbon.result([record((1, 0, 1))], 40)
    assert (found["questions"], found["of_questions"]) == (10, 40)
    assert found["kwh_per_1000_questions"] == 200
    told = carbon.told(found)
    assert "energy 2e+03 Wh (CPU by RAPL, RAM estimated; the whole machine)" in told
    assert "measured on 10 of 40 questions" in told


def test_the_grams_of_a_grid_are_its_number_times_the_energy(fake):
    with carbon.Meter(CarbonOptions(carbon=True, grid=50.0)) as meter:
        meter.count(6)
        assert meter.reading()["questions"] == 0  # as of the last reading
        found = meter.stop()
    assert (found["kwh"], found["g_co2e"]) == (0.003, pytest.approx(0.15))
    assert (found["country"], found["source"]) == (None, "given by --grid")
    assert (found["seconds"], found["questions"]) == (10.0, 6)
    assert meter.stop() == found


# --- a real tracker ---


def test_codecarbon_measures_without_network_files_words_or_signals(tmp_path, monkeypatch, capfd):
    """Whatever its own configuration asks for."""
    asked = []

    def refuse(*arguments, **keywords):
        asked.append(arguments)
        raise OSError("there is no network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    (tmp_path / ".codecarbon.config").write_text(
        "[codecarbon]\nsave_to_api = true\noutput_methods = csv,api\nlog_level = debug\n"
        "emissions_endpoint = http://127.0.0.1:9\nelectricitymaps_api_token = x\npue = 3\n"
        "co2_signal_api_token = x\ncountry_iso_code = CAN\nregion = quebec\n"
        "allow_multiple_runs = false\ntracking_mode = process\nforce_cpu_power = 100\n"
        "force_ram_power = 40\n"
    )
    monkeypatch.chdir(tmp_path)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with carbon.Meter(CarbonOptions(**FRANCE)) as meter:
        assert meter.reading()["kwh"] < 1e-6
        time.sleep(0.3)
        meter.count(1)
        logging.getLogger("codecarbon").error("as one of its threads would say meanwhile")
    found = meter.reading()
    assert asked == []
    assert [path.name for path in tmp_path.iterdir()] == [".codecarbon.config"]
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("codecarbon").filters == []  # another user of it hears it again
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert found["kwh"] > 0
    assert found["kwh"] == pytest.approx(sum(found[f"kwh_{part}"] for part in carbon.PARTS))
    assert found["g_co2e"] == pytest.approx(found["kwh"] * found["grid_g_per_kwh"])
    assert (found["country"], found["tracking"], found["questions"]) == ("FRA", "machine", 1)
    assert "average of France in 20" in found["source"]
    assert 0.3 < found["seconds"] < 60  # without what codecarbon took to look around
    assert found["ended"] - found["began"] == pytest.approx(found["seconds"], abs=0.05)
    by = found["measured_by"]
    # What codecarbon is told of the machine counts; but no data centre is added to it.
    assert by["ram"] == "estimate: 40 W, as codecarbon was told"
    assert found["kwh_ram"] * 3.6e6 / found["seconds"] == pytest.approx(40, rel=0.5)
    assert by["cpu"] == "estimate: by the load of the machine up to 100 W, as codecarbon was told"
    assert len(found["host"]) == 12
    assert socket.gethostname() not in json.dumps(found)


def test_how_each_part_is_measured_is_read_from_codecarbons_own_objects():
    from codecarbon.core.cpu import DEFAULT_POWER_PER_CORE
    from codecarbon.external.hardware import CPU
    from codecarbon.external.ram import RAM

    def said(*hardware, force=None):
        conf = {"cpu_count": 2, "cpu_physical_count": 1}
        tracker = types.SimpleNamespace(_hardware=hardware, _conf=conf, _force_cpu_power=force)
        return carbon.measured_by(tracker)

    def cpu(mode, watts):
        return CPU(".", mode, "a processor", watts)

    assert said() == {"cpu": None, "gpu": None, "ram": None}
    guess = 2 * DEFAULT_POWER_PER_CORE
    assert said(cpu("cpu_load", guess))["cpu"].endswith(f"{guess} W, a guess, 4 W a thread")
    assert said(cpu("cpu_load", 85))["cpu"].endswith("a guess, what it takes for any processor")
    assert said(cpu("constant", 120))["cpu"] == "estimate: half of 120 W, the processor's TDP"
    assert said(RAM(force_ram_power=7))["ram"] == "estimate: 7 W, as codecarbon was told"

    class GPU:
        def __init__(self, *names):
            devices = [type(name, (), {})() for name in names]
            self.devices = types.SimpleNamespace(devices=devices)

    class Raspberry:
        chip_part = "RAM"

    assert said(GPU("NvidiaGPUDevice", "NvidiaGPUDevice"))["gpu"] == "NVML"
    assert said(GPU())["gpu"] is None
    assert said(Raspberry())["ram"] == "vcgencmd"


# --- eval ---


def metrics_of(output):
    return json.loads((output / "metrics.json").read_text())


def test_eval_tells_of_its_energy_and_answers_the_same_bytes(fake, covered, tmp_path, capsys):
    plain = run.evaluate(quickstart(tmp_path / "plain"))
    assert covered == ["cpu"]
    assert fake == []
    options = ("--model", MODEL, "--data", HELDOUT, "--limit", 40, "--devices", 1)
    code, told = told_by(capsys, "eval", *options, "--carbon", "--grid", 50, "--output",
                         tmp_path / "out")  # fmt: skip
    assert code == 0
    assert "energy 3 Wh" in told
    found = metrics_of(tmp_path / "out")["carbon"]
    assert (found["kwh"], found["g_co2e"]) == (0.003, pytest.approx(0.15))
    assert found["kwh_per_1000_questions"] == pytest.approx(0.003 * 1000 / 40)
    assert (found["questions"], found["of_questions"], found["hosts"]) == (40, 40, 1)
    assert [one.stopped for one in fake] == [True]
    assert "carbon" not in plain
    for name in ("predictions.json", "nbest_predictions.json", "per_example.parquet"):
        content = (tmp_path / "out" / name).read_bytes()
        assert content == (tmp_path / "plain" / name).read_bytes()
    result = json.loads((tmp_path / "out" / "run.json").read_text())
    assert result["config"]["carbon"] is True
    assert "carbon" not in result


@pytest.mark.parametrize(
    ("first", "then", "questions", "kwh"),
    # A stopped run is read last when it starts, 1 Wh; 14 of its questions were kept.
    [(FRANCE, FRANCE, (26, 40), 0.004), ({}, FRANCE, (26, 40), 0.003), (FRANCE, {}, None, None)],
)
def test_a_resumed_eval_adds_what_is_known_of_its_parts(
    fake, small_chunks, tmp_path, monkeypatch, first, then, questions, kwh  # noqa: F811
):  # fmt: skip
    with monkeypatch.context() as patched:
        stop_after(patched, 2)
        with pytest.raises(Halted):
            run.evaluate(quickstart(tmp_path, **first))
    metrics = run.evaluate(quickstart(tmp_path, **then))
    assert metrics["resumed_questions"] == 14
    if questions is None:
        assert "carbon" not in metrics
        return
    found = metrics["carbon"]
    assert (found["questions"], found["of_questions"]) == questions
    assert found["kwh"] == pytest.approx(kwh)
    assert f"measured on {questions[0]} of {questions[1]} questions" in carbon.told(found)


# --- predict ---


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    predict(output)
    return output


def predict(output, *, restart=False, share=None, **options):
    return batch.predict(
        predicted(output, **options), reader=READER(), restart=restart, share=share
    )


def predicted(output, **options):
    return PredictConfig(
        input=(HELDOUT,), output=str(output), model=MODEL, shard_size=140, **options
    )


def test_the_energy_of_two_hosts_that_share_a_run_is_added(
    fake, covered, undisturbed, tmp_path, capsys
):
    first = predict(tmp_path, **FRANCE, share=(0, 2))
    assert (first.carbon["kwh"], first.carbon["questions"], first.complete) == (0.003, 280, False)
    code, told = told_by(capsys, "predict", HELDOUT, "--model", MODEL, "--output", tmp_path,
                         "--shard-size", 140, "--shard", "1/2", "--carbon",
                         "--country", "FRA")  # fmt: skip
    assert (code, len(fake)) == (0, 2)
    assert covered == ["cpu", "cpu"]
    assert "energy 6 Wh" in told
    found = json.loads((tmp_path / "_SUCCESS").read_text())["carbon"]
    assert (found["kwh"], found["seconds"]) == (pytest.approx(0.006), pytest.approx(20))
    assert (found["hosts"], found["questions"], found["of_questions"]) == (2, 559, 559)
    assert found["g_co2e"] == pytest.approx(0.006 * found["grid_g_per_kwh"])
    assert batch.finalize(tmp_path).carbon == found
    assert contents(tmp_path) == contents(undisturbed)
    assert (tmp_path / "_run.json").read_bytes() == (undisturbed / "_run.json").read_bytes()


def test_a_resumed_predict_adds_its_parts_and_one_that_only_looks_adds_nothing(
    fake, undisturbed, tmp_path, monkeypatch
):
    with monkeypatch.context() as patched:
        stopped_after(patched, 2)
        with pytest.raises(Stop):
            predict(tmp_path, **FRANCE)
    found = predict(tmp_path, **FRANCE).carbon
    assert (found["kwh"], found["questions"], found["hosts"]) == (pytest.approx(0.006), 559, 2)
    assert predict(tmp_path, **FRANCE).carbon == found
    assert predict(tmp_path).carbon == found
    assert contents(tmp_path) == contents(undisturbed)
    predict(tmp_path, restart=True)
    assert not list(tmp_path.glob("_carbon-*"))


def test_what_a_kill_leaves_counts_with_the_questions_of_its_last_reading(
    fake, tmp_path, monkeypatch
):
    """The tracker is never told to stop, and nothing is written afterwards."""
    killed, note = [], parts.Output.note_measured
    with monkeypatch.context() as patched:
        stopped_after(patched, 2)
        patched.setattr(carbon.Meter, "stop", lambda self: killed.append(self))
        patched.setattr(parts.Output, "note_measured",
                        lambda *given: None if killed else note(*given))  # fmt: skip
        with pytest.raises(Stop):
            predict(tmp_path, **FRANCE)
    (left,) = tmp_path.glob("_carbon-*.json")
    assert json.loads(left.read_text())["kwh"] == 0.001
    found = predict(tmp_path, **FRANCE).carbon
    assert found["kwh"] == pytest.approx(0.004)
    assert (found["questions"], found["of_questions"]) == (279, 559)
    left.write_text(left.read_text().replace("0.001", "9.001"))  # a damaged one is not believed
    assert batch.finalize(tmp_path).carbon["kwh"] == pytest.approx(0.003)


def test_in_a_bucket_it_is_the_same(fake, bucket):  # noqa: F811
    output = stores.below(bucket, "out")
    for share in ((0, 2), (1, 2)):
        done = predict(output, **FRANCE, share=share)
    assert (done.carbon["kwh"], done.carbon["hosts"]) == (pytest.approx(0.006), 2)
    assert done.carbon["questions"] == 559
    written = json.loads(stores.read(stores.below(output, "_SUCCESS")))
    assert written["carbon"] == done.carbon
    again = predict(output, restart=True)
    assert again.carbon is None
    assert not [name for name in stores.states_below(output) if "carbon" in name]


# --- compare, and pages ---


def test_a_comparison_has_the_energy_of_all_and_of_each_backends_rounds(
    fake, covered, tmp_path, monkeypatch
):
    queries, ask = [], compare.Worker.ask

    def asking(self, *message):
        told = ask(self, *message)
        queries.extend([told["queries"]] if message[0] == "offline" else [])
        return told

    monkeypatch.setattr(compare.Worker, "ask", asking)
    config = CompareConfig(
        model=MODEL, data=HELDOUT, output=str(tmp_path), limit=5, rounds=2, ways=("tuned",),
        scenarios=("offline",), backends=("jax",), sweep=False, min_seconds=0.1,
        min_queries=1, carbon=True, grid=100.0,
    )  # fmt: skip
    content = compare.compare(config)
    assert (len(fake), covered) == (1 + 2, ["cpu"])
    assert all(one.stopped for one in fake)
    assert content["carbon"]["kwh"] == 0.003
    assert "questions" not in content["carbon"]
    offline, kwh = content["backends"][0]["offline"]["tuned"], 1000 * 0.006 / sum(queries)
    assert len(queries) == 2  # rounds, of 3 Wh each
    assert offline["kwh_per_1000_questions"] == pytest.approx(kwh)
    assert offline["g_co2e_per_1000_questions"] == pytest.approx(100 * kwh)
    head, rows = summaries.table(content)
    place = head.index("Wh/1,000, tuned")
    assert rows[0][place] == plots.number(1000 * kwh)
    assert any(text.startswith("energy 3 Wh") for text in summaries.summary(content))
    assert "energy 3 Wh" in report.page([report.read(tmp_path)])
    frame = api.Comparison(content).to_pandas()
    assert frame["tuned_kwh_per_1000_questions"].notna().all()


def test_a_table_of_runs_has_energy_where_any_was_measured(fake, tmp_path):
    for name, options in (("a", FRANCE), ("b", {})):
        run.evaluate(quickstart(tmp_path / name, limit=20, **options))
    a, b = (report.read(tmp_path / name) for name in "ab")
    head, rows = evaluated.table([a.evaluation, b.evaluation])
    assert head[-3:] == list(carbon.CELLS)
    assert [row[-3:] for row in rows] == [["150", "8.41", "measured"], ["\u2013"] * 3]
    assert "150" in report.page([a, b])
    head, rows = evaluated.table([b.evaluation])
    assert not set(head) & set(carbon.CELLS)
    assert len(rows[0]) == len(head)
