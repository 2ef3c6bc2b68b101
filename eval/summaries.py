"""What a comparison of backends says: sentences, its table, and where they disagree."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from flaxqa import carbon

from . import copies
from .plots import NOTHING, number
from .runs import last_part
from .squad import METRICS

SHOWN = 50  # disagreements
TITLE = 7  # backends that a title names
MINUS = "\u2212"
LONGEST = 1_000  # characters of a text
AROUND = 160  # characters on both sides of an answer


# --- numbers as text ---


def took(seconds: float | None) -> str:
    if seconds is None:
        return NOTHING
    return f"{number(seconds)} s" if seconds >= 1 else f"{number(1_000 * seconds)} ms"


def mebibytes(size: int | None) -> str:
    return NOTHING if size is None else f"{size / 2**20:,.0f} MiB"


def signed(value: float, digits: int = 2) -> str:
    return f"{value:+.{digits}f}".replace("-", MINUS)


def scored(value: float, interval: Sequence[float] | None, digits: int = 2) -> str:
    """A score and its 95 % interval."""
    ends = f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})" if interval else ""
    return f"{value:.{digits}f}{ends}"


def interval(low: float, high: float) -> str:
    return f"{signed(low)} to {signed(high)}"


# --- what a comparison says in words ---


def there(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The backends that were measured."""
    return [row for row in content["backends"] if "absent" not in row]


def speed(row: Mapping[str, Any]) -> float:
    """Questions a second, offline, in the way that is the fastest for it; 0 without any."""
    return max((float(one["questions_per_second"]) for one in row["offline"].values()), default=0.0)


def title(content: Mapping[str, Any]) -> str:
    """What was compared, on what."""
    names = list(dict.fromkeys(row["backend"] for row in content["backends"]))
    if len(names) > TITLE:
        names[TITLE - 1 :] = [f"{len(names) - TITLE + 1} more"]
    many = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)
    return f"{many} on {content['questions']:,} questions of {last_part(content['data']['name'])}"


def head_of(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was compared, when and on what, a name and a value each."""
    data, machine = content["data"], content["machine"]
    every = data.get("questions")
    part = f" of {every:,}" if every and every != content["questions"] else ""
    on = "" if content["device"] == "cpu" else f", {content['device_name']}"
    dtypes = dict.fromkeys(row["dtype"] for row in content["backends"])
    found = [
        ("checkpoint", last_part(content["model"]["name"])),
        ("data", f"{last_part(data['name'])}, {content['questions']:,}{part} questions"),
        ("dtypes", ", ".join(dtypes)),
        ("machine", f"{machine['cpus']} CPUs of {machine['processor']}{on}"),
        ("measured", str(content["measured"])[:16].replace("T", " ")),
    ]
    if content.get("commit"):
        found.append(("flaxqa", str(content["commit"])[:12]))
    return found


def summary(content: Mapping[str, Any]) -> list[str]:
    """What one would say of it, a sentence each."""
    rows = there(content)
    valid = [row for row in rows if row["verdict"] == "VALID"]
    exact = [row for row in rows if row["dtype"] == "float32"]
    said = [
        f"{len(rows)} of {len(content['backends'])} backends were measured on "
        f"{content['questions']:,} questions of {last_part(content['data']['name'])} with "
        f"{last_part(content['model']['name'])}, on {content['machine']['cpus']} CPUs of "
        f"{content['machine']['processor']}"
        f"{'' if content['device'] == 'cpu' else ' with ' + content['device_name']}."
    ]
    if differ := content["float32_logit_differences"]:
        largest = max(differ.values())
        same = min(row["parity"]["same_answers"] for row in exact)
        said.append(
            f"In float32 the logits of any two backends differ by at most {number(largest)}; "
            f"{same:.2%} of the answers or more are those of {content['reference']}."
        )
    fastest = sorted((row for row in valid if speed(row)), key=speed, reverse=True)
    for dtype, device in dict.fromkeys((row["dtype"], row["device"]) for row in fastest):
        ranked = [row for row in fastest if (row["dtype"], row["device"]) == (dtype, device)]
        on = "" if content["device"] == "cpu" else f" on {device}"
        text = f"Fastest in {dtype}{on} is {ranked[0]['backend']}"
        text += f" with {number(speed(ranked[0]))} questions/s"
        if len(ranked) > 1:
            ratio = speed(ranked[0]) / speed(ranked[1])
            text += f", {ratio:.2f} times {ranked[1]['backend']}"
        said.append(text + ".")
    quick = [row for row in valid if row["single"]]
    if quick:
        best = min(quick, key=lambda row: row["single"]["p99"])
        said.append(
            f"One question at a time, {best['name']} answers 99 of 100 within "
            f"{took(best['single']['p99'])}."
        )
    said += [f"{carbon.told(one)}." for one in [content.get("carbon")] if one]
    for row in rows:
        said += [f"{row['name']} is INVALID: {reason}." for reason in row.get("reasons", ())]
    for row in content["backends"]:
        if "absent" in row:
            said.append(f"{row['name']} was not measured: {row['absent']}.")
    return said


Span = tuple[int, int]  # characters, the second one past the end
Table = tuple[list[str], list[list[str]]]  # the head and the rows
Cells = list[tuple[str, str]]  # the column and what stands there


def table(content: Mapping[str, Any], dollars: float | None = None) -> Table:
    """The main table: its head and its rows, as text; a column where any backend has something.

    Args:
      content: of comparison.json.
      dollars: the price of an hour of the machine; what the comparison was told when left out.
    """
    # Where each computes is said if not all do so on the processor.
    placed = any(row["device"] != "cpu" for row in there(content))
    dollars = price(content, dollars)
    measured = [(row, None if "absent" in row else dict(cells(row, placed, dollars)))
                for row in content["backends"]]  # fmt: skip
    longest = max((list(each) for _, each in measured if each), key=len, default=["backend"])
    head = list(dict.fromkeys([*longest, *(name for _, each in measured for name in each or ())]))
    order = {name: place for place, name in enumerate(COLUMNS)}
    head.sort(key=lambda name: order.get(column(name), len(order)))
    rows = []
    for row, each in measured:
        if each is None:
            each = {"backend": row["name"], "on": NOTHING, "verdict": "absent"}
            rows.append([each.get(name, "") for name in head])
        else:
            rows.append([each.get(name, NOTHING) for name in head])
    return head, rows


def price(content: Mapping[str, Any], dollars: float | None) -> float | None:
    """Dollars for an hour of the machine: as given, otherwise as the comparison was told."""
    if dollars is not None:
        return dollars
    told: float | None = content.get("config", {}).get("dollars_per_hour")
    return told


def column(name: str) -> str:
    """The column of COLUMNS that one is, whatever the way."""
    return name.partition(", ")[0]


def by_theme(head: Sequence[str], rows: Sequence[Sequence[str]]) -> dict[str, Any]:
    """The main table in parts that fit a page, each with the backend; those with something."""
    found = {}
    known = {name for names in THEMES.values() for name in names}
    for theme, names in THEMES.items():
        places = [
            place
            for place, name in enumerate(head)
            if column(name) in names or (theme == "Answers" and column(name) not in known)
        ]
        if any(head[place] not in ("backend", "on", "verdict") for place in places):
            first = [
                head.index("backend"),
                *(place for place in places if head[place] != "backend"),
            ]
            found[theme] = ([head[place] for place in first],
                            [[row[place] for place in first] for row in rows])  # fmt: skip
    return found


COLUMNS = (
    "backend", "on", "verdict", *(one.label for one in METRICS.values()), "questions/s",
    "useful TFLOP/s", "Wh/1,000", "questions/s per W", "questions/$", "host", "step TFLOP/s",
    "start cold", "start", "p50", "p99", "served/s", "same answers", "logits apart",
    f"F1 {MINUS} reference", "load", "first call", "memory", "device memory",
)  # fmt: skip


THEMES = {
    "Answers": ("backend", "on", "verdict", *(one.label for one in METRICS.values())),
    "Beside the reference": ("same answers", "logits apart", f"F1 {MINUS} reference"),
    "Throughput": ("questions/s",),
    "Use of the machine": ("useful TFLOP/s", "step TFLOP/s", "host"),
    "Energy": ("Wh/1,000", "questions/s per W"),
    "Cost": ("questions/$",),
    "Latency": ("p50", "p99", "served/s"),
    "Start and memory": ("start cold", "start", "load", "first call", "memory", "device memory"),
}  # fmt: skip


def cells(row: Mapping[str, Any], placed: bool, dollars: float | None) -> Cells:
    """What the table says of a backend that was measured."""
    f1 = row["scores"]["f1"]
    found: Cells = [("backend", row["name"]), *([("on", row["device"])] if placed else []),
                    ("verdict", row["verdict"])]  # fmt: skip
    found += [
        (METRICS[name].label, scored(one["value"], one.get("interval")))
        for name, one in row["scores"].items()
    ]
    for way, one in row["offline"].items():
        spread = f"{number(one['lowest'])} to {number(one['highest'])}"
        found.append((f"questions/s, {way}", f"{number(one['questions_per_second'])} ({spread})"))
        found.append((f"useful TFLOP/s, {way}", useful(one)))
        if "kwh_per_1000_questions" in one:
            kwh = one["kwh_per_1000_questions"]
            found.append((f"Wh/1,000, {way}", number(1_000 * kwh)))
            per_joule = 1_000 / (3.6e6 * kwh) if kwh else None
            found.append((f"questions/s per W, {way}", number(per_joule)))
        if dollars:
            per_dollar = one["questions_per_second"] * 3_600 / dollars
            found.append((f"questions/$, {way}", f"{per_dollar:,.0f}"))
        if one["host_share"] is not None:
            found.append((f"host, {way}", f"{one['host_share']:.1%}"))
    if row["step"] is not None:
        found.append(("step TFLOP/s", useful(row["step"])))
    for caches, name in (("empty", "start cold"), ("full", "start")):
        if caches in row["starts"]:
            found.append((name, took(row["starts"][caches]["seconds"])))
    if row["single"]:
        found += [(name, took(row["single"][name])) for name in ("p50", "p99")]
    if row["server"]:
        found.append(("served/s", number(row["server"]["rate"])))
    found += [
        ("same answers", f"{row['parity']['same_answers']:.2%}"),
        ("logits apart", number(row["parity"]["largest"])),
        (f"F1 {MINUS} reference",
         f"{signed(f1['difference'])} ({interval(*f1['difference_interval'])})"),
        ("load", took(row["load_seconds"])),
        ("first call", took(row["first_call_seconds"])),
        ("memory", mebibytes(row["peak_memory_bytes"])),
    ]  # fmt: skip
    if placed:
        found.append(("device memory", mebibytes(row["device_memory_bytes"])))
    return found


def useful(offline: Mapping[str, Any]) -> str:
    """The rate of multiplications and additions that answers need, and its share of a product's."""
    share = offline["share_of_products"]
    rate = number(offline["useful_flops_per_second"] / 1e12)
    return rate if share is None else f"{rate} ({share:.0%})"


def groups(content: Mapping[str, Any]) -> dict[str, Table]:
    """EM and F1 of each backend by groups of questions; what there is less of is side by side."""
    names, found = [row["name"] for row in there(content)], {}
    for by, rows in content["groups"].items():
        cells = [[" / ".join(f"{value:.1f}" for value in row["scores"][name].values())
                  for name in names] for row in rows]  # fmt: skip
        labels, counts = [row["group"] for row in rows], [f"{row['questions']:,}" for row in rows]
        if len(rows) < len(names):
            columns = [
                [names[place], *(row[place] for row in cells)] for place in range(len(names))
            ]
            found[by] = ([by, *labels], [["questions", *counts], *columns])
        else:
            both = zip(labels, counts, cells, strict=True)
            found[by] = ([by, "questions", *names], [[label, n, *row] for label, n, row in both])
    return found


def markdown(content: Mapping[str, Any]) -> str:
    """A summary for a README."""
    said = "\n".join(f"- {sentence}" for sentence in summary(content))
    return said + "\n\n" + copies.plain_markdown(*table(content)) + "\n"


# --- texts of the data ---


def excerpt(context: str, answers: Sequence[str]) -> list[tuple[str, bool]]:
    """The part of a context around answers, in pieces; of each whether it is an answer."""
    found = [(at, at + len(text)) for text in answers if text and (at := context.find(text)) >= 0]
    return [(text, marks[0]) for text, marks in pieces(context, found)]


def pieces(context: str, *marks: Sequence[Span]) -> list[tuple[str, tuple[bool, ...]]]:
    """The part of a context around spans, in pieces; its beginning where there are none.

    Args:
      context: of a question.
      *marks: spans of characters; each piece comes with whether it is inside one of each.
    """
    spans = [span for each in marks for span in each]
    begin = max(min((span[0] for span in spans), default=0) - AROUND, 0)
    end = min(max((span[1] for span in spans), default=AROUND) + AROUND, len(context))
    ends = sorted({begin, end, *(place for span in spans for place in span)})

    def inside(part: Span) -> tuple[bool, ...]:
        return tuple(any(a <= part[0] and part[1] <= b for a, b in each) for each in marks)

    outside = tuple(False for _ in marks)
    found = [("… ", outside)] if begin else []
    for flags, parts in itertools.groupby(itertools.pairwise(ends), inside):
        every = list(parts)
        found.append((context[every[0][0] : every[-1][1]], flags))
    return [*found, *([(" …", outside)] if end < len(context) else [])]


def shown(text: str) -> Any:
    """A text of the data as HTML: not endless, and no mark in it turns what stands around it."""
    import markupsafe

    return markupsafe.Markup("<bdi>{}</bdi>").format(cut(text))  # which escapes it


def cell(text: str) -> Any:
    """A cell as HTML; its line may break before brackets and after slashes."""
    import markupsafe

    value, space, brackets = text.partition(" (")
    if space and value[:1] in f"0123456789+{MINUS}":
        html = markupsafe.Markup('<bdi class="pair"><span>{}</span> <span>({}</span></bdi>')
        return html.format(value, brackets)
    parts = markupsafe.Markup("/<wbr>").join(text.split("/"))
    return markupsafe.Markup("<bdi>{}</bdi>").format(parts)


def cut(text: str) -> str:
    """The beginning of a text that is too long to be shown."""
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"


def disagreements(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What not all answer alike, as the page shows it."""
    shown = []
    for one in content["disagreements"][:SHOWN]:
        by_text: dict[str, list[str]] = {}
        for name, text in one["answers"].items():
            by_text.setdefault(text or "", []).append(name)
        shown.append({
            "question": one["question"],
            "right": one["right"],
            "pieces": excerpt(one["context"], [*by_text, one["reference"] or ""]),
            "answers": [
                {"text": text, "names": names, "reference": text == (one["reference"] or "")}
                for text, names in by_text.items()
            ],
        })  # fmt: skip
    return shown
