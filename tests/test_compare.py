"""Comparing backends: honest ones are VALID, cheats are not, absent ones are told of."""

import json

import numpy as np
import pytest
from conftest import QUICKSTART

from flaxqa import cli
from flaxqa.errors import UsageError
from flaxqa.eval import backends, compare, report, results, runner, squad, summaries
from flaxqa.eval import questions as dataset
from flaxqa.eval.config import BenchConfig, CompareConfig
from flaxqa.features import Feature
from flaxqa.tokens import Tokens

DATA = {"model": str(QUICKSTART / "checkpoint"), "data": str(QUICKSTART / "heldout.json")}
QUICK = {**DATA, "limit": 12, "rounds": 2, "min_seconds": 0.2, "min_queries": 12}
CHEATS = '''
import numpy as np
from flaxqa.eval.backends import Jax
from flaxqa.spans import Logits


class EveryTenth(Jax):
    """Gives every tenth window the logits of another answer."""

    def run(self, windows, way):
        found = super().run(windows, way)
        return [Logits(-one.start, -one.end) if index % 10 == 0 else one
                for index, one in enumerate(found)]


class OnceAnswered(Jax):
    """Keeps what it computed."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.kept = {}

    def run(self, windows, way):
        new = [one for one in windows if one.input_ids.tobytes() not in self.kept]
        for window, logits in zip(new, super().run(new, way) if new else [], strict=True):
            self.kept[window.input_ids.tobytes()] = logits
        return [self.kept[one.input_ids.tobytes()] for one in windows]


class HalfInTimedRuns(Jax):
    """Leaves out every second window once the accuracy run is over."""

    seen = 0

    def run(self, windows, way):
        self.seen += len(windows)
        if self.seen <= 20:
            return super().run(windows, way)
        found = super().run(windows[::2], way)
        nothing = [Logits(np.zeros(len(one), np.float32), np.zeros(len(one), np.float32))
                   for one in windows[1::2]]
        both = [None] * len(windows)
        both[::2], both[1::2] = found, nothing
        return both


class Missing(Jax):
    needs = "some-package"

    def __init__(self, *arguments):
        import a_package_that_is_missing


class Dies(Jax):
    def run(self, windows, way):
        if way == "shipped":
            raise SystemExit
        return super().run(windows, way)
'''


@pytest.fixture(scope="module")
def cheats(tmp_path_factory):
    """The module of the cheats, for this process and for the workers."""
    folder = tmp_path_factory.mktemp("cheats")
    (folder / "cheats.py").write_text(CHEATS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder))
        yield


NAMES = ("jax", "torch", "cheats:EveryTenth", "cheats:OnceAnswered", "cheats:HalfInTimedRuns",
         "cheats:Missing", "cheats:Dies")  # fmt: skip


@pytest.fixture(scope="module")
def compared(cheats, tmp_path_factory):
    output = tmp_path_factory.mktemp("compared")
    config = CompareConfig(**QUICK, output=str(output), backends=NAMES, sweep=False)
    return compare.compare(config), output


@pytest.fixture
def rows(compared):
    return {row["name"].partition("/")[0]: row for row in compared[0]["backends"]}


def test_honest_backends_are_valid_and_agree(compared, rows):
    for name in ("jax", "torch"):
        assert rows[name]["verdict"] == "VALID", rows[name]["reasons"]
        assert rows[name]["parity"]["largest"] < 1e-4
        assert rows[name]["parity"]["same_answers"] == 1
        assert rows[name]["scores"]["f1"]["difference_interval"] == [0, 0]
    assert compared[0]["float32_logit_differences"]["jax/float32 - torch/float32"] < 1e-4


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("cheats:EveryTenth", "logits differ from the reference's by"),
        ("cheats:EveryTenth", "of the answers are the reference's"),
        ("cheats:OnceAnswered", "answers seem to be kept"),
        ("cheats:HalfInTimedRuns", "answers in timed runs are not those of the accuracy run"),
        ("cheats:Dies", "it ended before it was measured: the process ended"),
    ],
)
def test_a_cheat_is_invalid_and_the_reason_is_told(rows, name, told):
    assert rows[name]["verdict"] == "INVALID"
    assert any(told in reason for reason in rows[name]["reasons"]), rows[name]["reasons"]


def test_a_backend_that_is_not_installed_is_told_of_with_what_installs_it(rows):
    absent = rows["cheats:Missing"]["absent"]
    assert absent == "a_package_that_is_missing is not installed: pip install some-package"


def test_every_round_is_kept_and_the_numbers_are_of_them(compared, rows):
    for name in ("jax", "torch"):
        for way in ("shipped", "tuned"):
            offline = rows[name]["offline"][way]
            totals = [sum(one.values()) for one in offline["rounds"]]
            assert len(totals) == 2
            assert offline["seconds"] == pytest.approx(np.mean(totals))
            assert offline["questions_per_second"] == pytest.approx(12 / offline["seconds"])
            assert offline["lowest"] <= offline["questions_per_second"] <= offline["highest"]
        single = rows[name]["single"]
        assert single["queries"] == len(single["latencies"]) >= 12
        assert 0 < single["p50"] <= single["p90"] <= single["p99"] <= max(single["latencies"])
        assert sum(single["stages"].values()) == pytest.approx(np.mean(single["latencies"]))
        assert rows[name]["peak_memory_bytes"] > 50 * 2**20
        assert rows[name]["load_seconds"] > 0 < rows[name]["first_call_seconds"]
        assert rows[name]["device"] == "cpu"
        assert rows[name]["device_memory_bytes"] is None
        tuned = rows[name]["offline"]["tuned"]
        useful = compared[0]["useful_flops"] / tuned["stages"]["compute"]
        assert tuned["useful_flops_per_second"] == pytest.approx(useful)
        assert 0 < tuned["share_of_products"] < 3
    assert rows["jax"]["about"]["kernels"] == "native"
    assert compared[0]["device"] == "cpu"
    assert rows["jax"]["offline"]["tuned"]["slower_than_first"] == 1
    mine, theirs = (
        [sum(one.values()) for one in rows[name]["offline"]["tuned"]["rounds"]]
        for name in ("jax", "torch")
    )
    wanted = np.median(np.array(theirs) / np.array(mine))
    assert rows["torch"]["offline"]["tuned"]["slower_than_first"] == pytest.approx(wanted)


def test_the_disagreements_are_those_of_the_cheats(compared, rows):
    found = compared[0]["disagreements"]
    assert 1 <= len(found) <= 2
    for one in found:
        assert one["answers"]["jax/float32"] == one["reference"]
        assert one["answers"]["cheats:EveryTenth/float32"] != one["reference"]


def test_groups_have_every_question_once(compared):
    for groups in compared[0]["groups"].values():
        assert sum(group["questions"] for group in groups) == 12
    whole = {row["name"]: row["scores"]["f1"]["value"]
             for row in compared[0]["backends"] if "scores" in row}  # fmt: skip
    for groups in compared[0]["groups"].values():
        for name, f1 in whole.items():
            parts = [one["questions"] * one["scores"][name]["f1"] for one in groups]
            assert sum(parts) / 12 == pytest.approx(f1)


def test_the_file_has_what_is_returned(compared):
    assert json.loads((compared[1] / "comparison.json").read_text()) == compared[0]


def test_the_page_of_the_comparison_names_the_cheats(compared):
    page = report.page([report.read(compared[1])])
    assert page.count('class="INVALID"') == 4
    assert "cheats:Missing/float32 was not measured" in page


def test_bench_finds_the_highest_rate_that_keeps_the_bound(tmp_path, monkeypatch, capsys):
    command = ["bench", *(f"--{name}={value}" for name, value in DATA.items()), "--limit", "8",
               "--rounds", "1", "--min-seconds", "0.3", "--min-queries", "10", "--no-sweep",
               "--latency-bound", "0.5", "--output", str(tmp_path)]  # fmt: skip
    assert cli.run(command) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["backends"]
    assert row["name"] == "jax/float32"
    assert row["verdict"] == "VALID"
    assert row["single"].keys() >= {"p50", "p99"}
    assert "latencies" not in row["single"]  # which comparison.json has
    whole = json.loads((tmp_path / "comparison.json").read_text())
    assert len(whole["backends"][0]["single"]["latencies"]) >= 10
    server = row["server"]
    assert server["rate"] == max(one["rate"] for one in server["trials"] if one["p99"] <= 0.5)
    assert [one["rate"] for one in server["trials"]] == sorted(
        one["rate"] for one in server["trials"]
    )
    for name in ("comparison.json", "report.html", "summary.md"):
        assert (tmp_path / name).stat().st_size > 500


def test_the_rates_that_are_tried_close_in_on_the_highest():
    class Worker:
        """Keeps the bound up to 37 questions a second."""

        absent = None

        def ask(self, command, *arguments):
            if command == "single":
                return {"latencies": [0.1]}
            return {"rate": arguments[0], "latencies": [0.2 if arguments[0] <= 37 else 2.0]}

    one = results.Contestant(None, Worker())
    compare.find_rate(one, BenchConfig(**DATA, output="", latency_bound=1.0))
    rates = [trial["rate"] for trial in one.server]
    assert rates == pytest.approx([10, 20, 40, 30, 35, 37.5])


@pytest.mark.parametrize(
    ("dtype", "stray", "f1", "verdict"),
    [("float32", 0, 1.0, "VALID"), ("float32", 2, 1.0, "INVALID"), ("int8", 40, 1.0, "VALID"),
     ("int8", 60, 1.0, "INVALID"), ("int8", 0, 0.7, "INVALID")],
)  # fmt: skip
def test_other_dtypes_may_stray_a_little_and_lose_by_chance(dtype, stray, f1, verdict):
    questions = dataset.read(QUICKSTART / "heldout.json").questions[:100]
    right = {one.id: one.answers[0] for one in questions}
    given = {
        one.id: right[one.id] if index < 100 * f1 else "no" for index, one in enumerate(questions)
    }
    job = runner.Job("x", dtype, "", "", 384, 1, "")

    class Worker:
        absent = None
        ready = {"load_seconds": 1.0, "first_call_seconds": 1.0, "device": "cpu"}  # noqa: RUF012

    reference = results.Contestant(job, Worker(), answers=right)
    one = results.Contestant(job, Worker(), answers=given)
    one.logits = reference.logits = np.zeros((2, 9))
    one.offline["tuned"] = [{"seconds": dict.fromkeys(runner.STAGES, 2.0), "total": 6.0,
                             "elapsed": 6.0, "queries": 1_000, "wrong": stray}]  # fmt: skip
    config = BenchConfig(**DATA, output="")
    about = {"useful_flops": 8e9, "device_name": "cpu"}
    about["product_flops_per_second"] = {"float32": 16e9}
    row = results.Results(questions, False, reference, [one], config, about).row(one)
    assert row["verdict"] == verdict, row["reasons"]
    assert row["offline"]["tuned"]["useful_flops_per_second"] == 4e9
    share = row["offline"]["tuned"]["share_of_products"]
    assert share == (0.25 if dtype == "float32" else None)
    Worker.ready["device"] = "an H100"
    elsewhere = results.Results(questions, False, reference, [one], config, about).row(one)
    assert elsewhere["device"] == "an H100"
    assert elsewhere["offline"]["tuned"]["share_of_products"] is None


def test_speeds_on_different_devices_are_no_ratio():
    questions = [dataset.SquadExample("0", "q", "c", ("x",))]

    def contestant(device):
        class Worker:
            absent = None
            ready = {"load_seconds": 1.0, "first_call_seconds": 1.0, "device": device}  # noqa: RUF012

        job = runner.Job(device, "float32", "", "", 384, 1, "")
        one = results.Contestant(job, Worker(), {"0": "x"})
        one.offline["tuned"] = [{"seconds": dict.fromkeys(runner.STAGES, 2.0), "total": 6.0,
                                 "elapsed": 6.0, "queries": 1, "wrong": 0}]  # fmt: skip
        return one

    every = [contestant("an H100"), contestant("an H100"), contestant("cpu")]
    about = {"useful_flops": 8e9, "device_name": "an H100", "product_flops_per_second": {}}
    config = BenchConfig(**DATA, output="")
    made = results.Results(questions, False, every[0], every, config, about)
    ratios = [made.offline(one, "tuned")["slower_than_first"] for one in every]
    assert ratios == [1.0, 1.0, None]


def test_paired_differences_have_narrower_intervals_than_the_scores():
    rng = np.random.default_rng(0)
    own = rng.random(400)
    found = squad.difference_interval(own, own - 0.01)
    assert found["difference"] == pytest.approx(1.0)
    assert found["difference_interval"] == pytest.approx((1.0, 1.0))
    low, high = squad.difference_interval(own, rng.random(400))["difference_interval"]
    assert low < 0 < high


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"backends": ("torch/int8",)}, "'torch' computes in float32, bfloat16, not 'int8'"),
        ({"backends": ("keras",)}, "backend 'keras' is not one of"),
        ({"backends": ()}, "at least one"),
        ({"backends": ("jax", "jax/float32")}, "none of them twice"),
    ],
)
def test_a_backend_that_cannot_be_is_refused_before_anything_is_done(tmp_path, change, told):
    with pytest.raises(UsageError, match=told):
        compare.compare(CompareConfig(**QUICK, output=str(tmp_path / "new"), **change))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "change", [{"rounds": 0}, {"min_seconds": 0.0}, {"scenarios": ()}, {"latency_bound": np.inf}]
)
def test_settings_that_measure_nothing_are_refused(change):
    with pytest.raises(UsageError, match=next(iter(change))):
        CompareConfig(**{**QUICK, "output": "", **change})


def test_backends_of_jax_leave_a_trace_each(tmp_path):
    config = CompareConfig(
        **{**QUICK, "limit": 3, "rounds": 1, "min_queries": 3}, output=str(tmp_path / "out"),
        backends=("jax", "torch"), scenarios=("offline",), ways=("tuned",), sweep=False,
        profile=str(tmp_path / "traces"),
    )  # fmt: skip
    found = compare.compare(config)
    assert [row["verdict"] for row in found["backends"]] == ["VALID", "VALID"]
    assert [path.name for path in (tmp_path / "traces").iterdir()] == ["jax-float32"]
    assert len(sorted((tmp_path / "traces").rglob("*.trace.json.gz"))) == 1


def test_what_jax_does_not_compute_is_not_traced(tmp_path):
    config = CompareConfig(**QUICK, output=str(tmp_path / "out"), backends=("torch",),
                           profile=str(tmp_path / "traces"))  # fmt: skip
    with pytest.raises(UsageError, match="--profile is for JAX backends"):
        compare.compare(config)
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_here_is_told_of(tmp_path):
    config = CompareConfig(**QUICK, output=str(tmp_path), backends=("jax",), device="gpu")
    with pytest.raises(
        UsageError, match="reference jax-model/float32 fails: .*JAX has no gpu here"
    ):
        compare.compare(config)


def test_tpus_are_measured_one_backend_after_the_other(tmp_path, monkeypatch):
    """They belong to one process at a time: each has ended before the next begins."""
    alive, most = set(), []

    class Ended(compare.Worker):
        def __init__(self, *arguments, **options):
            most.append(len(alive))
            alive.add(self)
            super().__init__(*arguments, **options)
            if self.ready.get("platform"):
                self.ready["platform"] = "tpu"

        def close(self):
            alive.discard(self)
            super().close()

    def on_cpu(job):
        return {**job_of(job), "device": "cpu"}

    job_of = compare.dataclasses.asdict
    monkeypatch.setattr(compare.dataclasses, "asdict", on_cpu)
    monkeypatch.setattr(compare, "Worker", Ended)
    config = CompareConfig(
        **{**QUICK, "limit": 3, "rounds": 1, "min_queries": 3}, output=str(tmp_path),
        backends=("jax", "jax-xla"), scenarios=("offline",), ways=("tuned",), sweep=False,
    )  # fmt: skip
    found = compare.compare(config)
    assert most == [0, 0, 0]
    assert [row["verdict"] for row in found["backends"]] == ["VALID", "VALID"]
    assert found["device"] == "tpu"


def test_large_batches_on_accelerators_have_few_shapes(monkeypatch):
    """What has to be compiled for each shape gets rows of six lengths, in batches of one size."""
    seen = set()

    class Fixed(backends.Padded):
        fixed, device = True, "gpu"

        def __init__(self):
            pass

        def logits(self, inputs):
            seen.add(inputs["input_ids"].shape)
            return inputs["input_ids"] * 1.0, inputs["attention_mask"] * 1.0

    rng = np.random.default_rng(0)
    sizes = rng.gamma(7, 25, 2_000).astype(int).clip(20, 384)
    context = Tokens(np.zeros(2, np.int32))
    windows = [
        Feature(i, np.arange(n, dtype=np.int32), 1, context, slice(0, 2), False)
        for i, n in enumerate(sizes)
    ]
    for window, one in zip(windows, Fixed().run(windows, "tuned"), strict=True):
        assert np.array_equal(one.start, window.input_ids)
        assert (one.end == 1).all()
    partial = {shape for shape in seen if shape[0] != 65_536 // shape[1]}
    assert len(seen) <= 6
    assert len(partial) <= 1
    seen.clear()
    Fixed().run(windows[:3], "tuned")
    ((rows, _),) = seen
    assert rows == 4  # a few windows are not computed as many


def test_a_backend_that_fails_is_told_of_by_its_traceback_and_exit_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_backend.py").write_text(
        "from flaxqa.eval.backends import Jax\n\nclass Broken(Jax):\n"
        "    def __init__(self, *arguments):\n        raise ArithmeticError('of its own')\n"
    )
    command = ["compare", *(f"--{name}={value}" for name, value in DATA.items()), "--limit", "4",
               "--rounds", "1", "--min-seconds", "0.1", "--min-queries", "4", "--no-sweep",
               "--scenarios", "offline", "--output", "out",
               "--backends", "jax", "broken_backend:Broken"]  # fmt: skip
    assert cli.run(command) == 3
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["backends"]
    assert rows[0]["verdict"] == "VALID"
    assert (rows[1]["absent"], rows[1]["failed"]) == ("ArithmeticError: of its own", True)
    log = (tmp_path / "out" / "workers.log").read_text()
    assert "Traceback" in log
    assert "of its own" in log


@pytest.mark.slow
def test_start_and_step_are_measured_of_those_that_have_them(tmp_path):
    config = CompareConfig(**QUICK, output=str(tmp_path), backends=("jax", "jax-model"),
                           sweep=False, scenarios=("start", "step", "offline"))  # fmt: skip
    ours, plain = compare.compare(config)["backends"]
    assert ours["starts"].keys() == plain["starts"].keys() == {"empty", "full"}
    for start in (*ours["starts"].values(), *plain["starts"].values()):
        assert start["same_answers"]
        assert start["seconds"] > start["answers_seconds"] > 0
    assert plain["starts"]["full"]["seconds"] < plain["starts"]["empty"]["seconds"]
    assert plain["step"] is None
    assert 0 < ours["step"]["seconds"] < 60
    assert 0 < ours["step"]["share_of_products"] < 3
    assert ours["offline"]["streamed"]["questions_per_second"] > 0
    assert "streamed" not in plain["offline"]
    head, (mine, _) = summaries.table({"backends": [ours, plain]})
    assert mine[head.index("start cold")].endswith("s")
    assert "%" in mine[head.index("step TFLOP/s")]
