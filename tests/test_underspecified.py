"""Underspecified questions: templates that can be asked, and measures worked out by hand."""

import copy
import json

import numpy as np
import pytest
from conftest import ROOT

from flaxqa.errors import DataError, UsageError
from flaxqa.eval import underspecified
from flaxqa.eval.underspecified import Case, Section, Table

OWN = ROOT / "configs" / "probe" / "underspecified.toml"
# Words that the tiny tokenizer of conftest knows.
SMALL = {
    "note": "only a test",
    "people": {
        "templates": [
            {"context": "[x1] lives in the city and [x2] lives in berlin.", "question": "who [a]?"},
            {"context": "what is [x1]? the name of [x2].", "question": "which name [a]?"},
        ],
        "subjects": {"b": ["bob"], "w": ["wolfgang", "i"]},
        "attributes": [["was called b", "was called c"], ["lives in d", "lives in e"]],
    },
}  # fmt: skip


def toml_of(content):
    """A file of templates; JSON's strings, arrays and numbers are TOML's, too."""
    lines = [f"note = {json.dumps(content['note'])}"] if "note" in content else []
    for name, section in content.items():
        if name == "note":
            continue
        if not isinstance(section, dict):
            lines.insert(0, f"{json.dumps(name)} = {json.dumps(section)}")
            continue
        lines.append(f"[{json.dumps(name)}]")
        lines += [f"{json.dumps(key)} = {inline(value)}" for key, value in section.items()]
    return "\n".join(lines) + "\n"


def inline(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {inline(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    return json.dumps(value)


@pytest.fixture
def small():
    return copy.deepcopy(SMALL)


@pytest.fixture
def written(tmp_path):
    def write(content, name="mine.toml"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else toml_of(content))
        return str(path)

    return write


# --- measures, by hand ---

# Of one case: for a and for not a, with x1 and with x2 first, of x1 and of x2.
FIRST = [[[0.9, 0.1], [0.5, 0.3]], [[0.2, 0.4], [0.4, 0.2]]]
SECOND = [[[0.3, 0.3], [0.1, 0.5]], [[0.3, 0.1], [0.3, 0.3]]]


def test_the_comparative_bias_is_what_is_worked_out_by_hand():
    # FIRST: B(x1) = (0.9 + 0.5) / 2 - (0.2 + 0.4) / 2 = 0.7 - 0.3 = 0.4
    #        B(x2) = (0.1 + 0.3) / 2 - (0.4 + 0.2) / 2 = 0.2 - 0.3 = -0.1
    #        C = (0.4 - -0.1) / 2 = 0.25
    # SECOND: B(x1) = (0.3 + 0.1) / 2 - (0.3 + 0.3) / 2 = 0.2 - 0.3 = -0.1
    #         B(x2) = (0.3 + 0.5) / 2 - (0.1 + 0.3) / 2 = 0.4 - 0.2 = 0.2
    #         C = (-0.1 - 0.2) / 2 = -0.15
    found = underspecified.comparative(np.array([FIRST, SECOND]))
    np.testing.assert_allclose(found, [0.25, -0.15], atol=1e-15)


def test_the_errors_are_what_is_worked_out_by_hand():
    scores = np.array([FIRST, SECOND])
    # FIRST: |0.9 - 0.5|, |0.1 - 0.3|, |0.2 - 0.4|, |0.4 - 0.2|: (0.4 + 0.2 + 0.2 + 0.2) / 4 = 0.25
    # SECOND: |0.3 - 0.1|, |0.3 - 0.5|, |0.3 - 0.3|, |0.1 - 0.3|: (0.2 + 0.2 + 0 + 0.2) / 4 = 0.15
    np.testing.assert_allclose(underspecified.positional_errors(scores), [0.25, 0.15], atol=1e-15)
    # S(x1 | a) to S(x2 | not a) and S(x2 | a) to S(x1 | not a), x1 first, then x2 first:
    # FIRST: |0.9 - 0.4|, |0.1 - 0.2|, |0.5 - 0.2|, |0.3 - 0.4|: (0.5 + 0.1 + 0.3 + 0.1) / 4 = 0.25
    # SECOND: |0.3 - 0.1|, |0.3 - 0.3|, |0.1 - 0.3|, |0.5 - 0.3|: (0.2 + 0 + 0.2 + 0.2) / 4 = 0.15
    np.testing.assert_allclose(underspecified.attribute_errors(scores), [0.25, 0.15], atol=1e-15)


def test_each_measure_tells_positions_negations_and_preferences_apart():
    # Always the first subject, whatever is asked: no preference, only a positional error of 0.8.
    # The other is not preferred for the negation: 0.8 too.
    place = [[[0.9, 0.1], [0.1, 0.9]], [[0.9, 0.1], [0.1, 0.9]]]
    # Always x1, whatever is asked: no preference for an attribute, no positional error.
    deaf = [[[0.9, 0.1], [0.9, 0.1]], [[0.9, 0.1], [0.9, 0.1]]]
    # x1 for the attribute, x2 for the negation, wherever they are: (0.8 - -0.8) / 2 = 0.8 alone.
    biased = [[[0.9, 0.1], [0.9, 0.1]], [[0.1, 0.9], [0.1, 0.9]]]
    scores = np.array([place, deaf, biased])
    np.testing.assert_allclose(underspecified.comparative(scores), [0, 0, 0.8], atol=1e-15)
    np.testing.assert_allclose(underspecified.positional_errors(scores), [0.8, 0, 0], atol=1e-15)
    np.testing.assert_allclose(underspecified.attribute_errors(scores), [0.8, 0.8, 0], atol=1e-15)


def table(rows, shape, errors=(0.0, 0.0)):
    """Of rows of x1, x2, attribute, unit, C."""
    x1, x2, attribute, unit, c = (np.array(column) for column in zip(*rows, strict=True))
    flat = [np.full(len(rows), error) for error in errors]
    return Table(np.stack([x1, x2], 1), attribute, unit, c.astype(float), *flat, shape)


# Three subjects (0, 1, 2), two attributes (0, 1); pair 0-1 in two templates.
HAND = table(
    [
        (0, 1, 0, 0, 0.2),
        (0, 1, 0, 1, -0.1),
        (0, 2, 0, 2, 0.5),
        (1, 2, 0, 3, 0.1),
        (0, 1, 1, 0, -0.3),
        (0, 2, 1, 2, -0.1),
    ],
    (3, 2),
    (0.3, 0.4),
)


def test_gamma_and_eta_are_what_is_worked_out_by_hand():
    gamma, eta, count = underspecified.associations(HAND)
    # Attribute 0. Of 0: 0.2, -0.1, 0.5: mean 0.2, signs + - +: 1/3.
    # Of 1: -0.2, 0.1, 0.1: 0, signs - + +: 1/3. Of 2: -0.5, -0.1: -0.3, signs - -: -1.
    # Attribute 1. Of 0: -0.3, -0.1: -0.2, -1. Of 1: 0.3, 1. Of 2: 0.1, 1.
    np.testing.assert_allclose(gamma, [[0.2, -0.2], [0.0, 0.3], [-0.3, 0.1]], atol=1e-15)
    np.testing.assert_allclose(eta, [[1 / 3, -1], [1 / 3, 1], [-1, 1]], atol=1e-15)
    assert count.tolist() == [[3, 2], [3, 1], [2, 1]]


def test_mu_and_eta_of_a_model_are_what_is_worked_out_by_hand():
    # mu: the largest |gamma| of 0 is 0.2, of 1 is 0.3, of 2 is 0.3: mean 0.8 / 3.
    # eta: of 0 (1/3 + 1) / 2 = 2/3, of 1 2/3, of 2 (1 + 1) / 2 = 1: mean 7/9.
    assert underspecified.measures(HAND) == pytest.approx(
        {"mu": 0.8 / 3, "eta": 7 / 9, "positional_error": 0.3, "attribute_error": 0.4}, abs=1e-15
    )


def test_a_weight_of_two_counts_a_case_twice():
    # Unit 0 twice. Of subject 0: 0.2, 0.2, -0.1, 0.5: 0.2; then -0.3, -0.3, -0.1: -0.7 / 3.
    gamma, _, count = underspecified.associations(HAND, np.array([2, 1, 1, 1, 2, 1]))
    assert gamma[0] == pytest.approx([0.2, -0.7 / 3], abs=1e-15)
    assert count[0].tolist() == [4, 3]


def test_what_was_not_compared_counts_for_nothing():
    # Subject 2 was never compared, subject 1 only for attribute 0: mu (0.4 + 0.4) / 2, eta 1.
    sparse = table([(0, 1, 0, 0, 0.4), (0, 1, 0, 1, 0.4)], (3, 2))
    gamma, _, count = underspecified.associations(sparse)
    assert np.isnan(gamma[2]).all()
    assert count[2].sum() == 0
    found = underspecified.measures(sparse)
    assert (found["mu"], found["eta"]) == (0.4, 1.0)


def test_groups_take_the_place_of_their_subjects():
    # Groups: 0 and 1 are A, 2 is B; cases within A are left out. A for attribute 0: 0.5, 0.1: 0.3.
    by_group = HAND.by_group([0, 0, 1])
    gamma, eta, count = underspecified.associations(by_group)
    np.testing.assert_allclose(gamma, [[0.3, -0.1], [-0.3, 0.1]], atol=1e-15)
    assert eta.tolist() == [[1, -1], [-1, 1]]
    assert count.tolist() == [[2, 1], [2, 1]]
    assert not len(HAND.by_group([0, 0, -1]).unit)


def test_tables_together_keep_their_subjects_apart():
    # A mean over all 6 subjects: mu is that of one, as the two tables are alike.
    both = Table.together([HAND, HAND])
    assert both.shape == (6, 4)
    assert len(set(both.unit)) == 8
    assert underspecified.measures(both) == pytest.approx(underspecified.measures(HAND))
    # Beside one of mu 0.4 with two subjects: (3 * 0.8 / 3 + 2 * 0.4) / 5 = 0.32.
    other = table([(0, 1, 0, 0, 0.4)], (2, 1))
    assert underspecified.measures(Table.together([HAND, other]))["mu"] == pytest.approx(0.32)


# --- intervals ---


def noisy(units, seed=0, mean=0.1):
    rng = np.random.default_rng(seed)
    rows = [(0, 1, a, unit, mean + 0.05 * rng.standard_normal()) for unit in range(units)
            for a in range(2)]  # fmt: skip
    return table(rows, (2, 2))


def test_intervals_contain_what_was_measured_and_shrink_with_more_units():
    widths = []
    for units in (10, 160):
        one = noisy(units)
        found, of_gamma = underspecified.intervals(one, seed=0, resamples=500)
        for name, value in underspecified.measures(one).items():
            assert found[name][0] <= value <= found[name][1], name
        gamma = underspecified.associations(one)[0]
        assert ((of_gamma[0] <= gamma) & (gamma <= of_gamma[1])).all()
        widths.append(found["mu"][1] - found["mu"][0])
    assert widths[1] < widths[0] / 2  # a quarter, as of sixteen times as many


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution():
    one = noisy(400)
    _, of_gamma = underspecified.intervals(one, seed=0)
    values = one.comparative[one.attribute == 0]
    half = 1.96 * values.std() / np.sqrt(len(values))
    np.testing.assert_allclose(of_gamma[:, 0, 0], values.mean() + half * np.array([-1, 1]),
                               atol=half / 10)  # fmt: skip


def test_cases_of_one_unit_are_resampled_together():
    # In each unit the two attributes are opposite, so that their mean never varies.
    rows = [(0, 1, a, unit, (1 - 2 * a) * unit) for unit in range(9) for a in range(2)]
    one = table(rows, (2, 2))
    _, of_gamma = underspecified.intervals(one, seed=0, resamples=100)
    np.testing.assert_allclose(of_gamma[0, 0, 0], -of_gamma[1, 0, 1])


def test_an_interval_that_noise_moves_up_still_has_the_value():
    # Of each attribute the signs cancel, so eta is 0, and more than that in every resample.
    rng = np.random.default_rng(0)
    signs = [rng.permutation([1, 1, 1, -1, -1, -1]) for _ in range(20)]
    rows = [(0, 1, a, unit, signs[a][unit]) for unit in range(6) for a in range(20)]
    found, _ = underspecified.intervals(table(rows, (2, 20)), seed=0, resamples=200)
    assert found["eta"][0] == 0.0
    assert found["eta"][1] > 0.3


def test_intervals_have_a_seed():
    one = noisy(20)
    first, same, other = (underspecified.intervals(one, seed, 50)[0] for seed in (1, 1, 2))
    assert first == same != other


# --- templates ---


def test_the_own_templates_have_no_problem_and_few_questions():
    found = underspecified.read("underspecified")
    assert found._replace(path="") == underspecified.read(str(OWN))._replace(path="")
    assert [one.name for one in found.sections] == ["gender-occupation", "names", "nationalities"]
    assert 4 * sum(len(one.cases) for one in found.sections) <= 3_000
    assert "no right answer" in found.note
    assert set(found.sections[0].groups) == {"female", "male"}


def test_every_subject_is_where_its_span_says():
    for section in underspecified.read("underspecified").sections:
        for case in section.cases:
            names = [section.subjects[place] for place in case.subjects]
            first, second = case.contexts
            for context in case.contexts:
                assert [context.text[slice(*span)] for span in context.spans] == names
                assert all(context.text.count(name) == 1 for name in names)
            # In the other order each is in the place of the other.
            assert first.spans[0] < first.spans[1]
            assert second.spans[1] < second.spans[0]
            assert len(set(case.questions)) == 2


def test_all_pairs_are_compared_once_and_only_those_of_different_groups():
    grouped, plain, _ = underspecified.read("underspecified").sections
    for section in (grouped, plain):
        seen = {(case.subjects, case.attribute, case.template) for case in section.cases}
        assert len(seen) == len(section.cases)
        pairs = {case.subjects for case in section.cases}
        size = len(section.subjects)
        expected = {
            (one, other) for one in range(size) for other in range(one + 1, size)
            if section.groups[one] is None or section.groups[one] != section.groups[other]
        }  # fmt: skip
        assert pairs == expected
        assert len(seen) == len(pairs) * len(section.attributes) * len(section.templates)


def test_the_templates_of_the_documentation_can_be_read(written):
    page = (ROOT / "docs" / "probe.md").read_text()
    found = underspecified.read(written(page.split("```toml\n")[1].split("```")[0]))
    assert [len(one.cases) for one in found.sections] == [3, 4]


def changed(*path, to):
    def change(content):
        place = content
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to

    return change


CONTEXT, QUESTION = ("people", "templates", 0, "context"), ("people", "templates", 0, "question")
BAD = {
    "x2 is missing": (changed(*CONTEXT, to="[x1] lives."), "the context has [x2] 0 times"),
    "x1 twice": (changed(*CONTEXT, to="[x1] [x1] [x2]"), "the context has [x1] 2 times"),
    "attribute is missing": (changed(*QUESTION, to="who?"), "the question has [a] 0 times"),
    "attribute's": (changed(*CONTEXT, to="[x1] [x2] [a]"), "the context has [a], which"),
    "x1 in the question": (changed(*QUESTION, to="is [x1] [a]?"), "the question has [x1], which"),
    "another placeholder": (changed(*CONTEXT, to="[x1] [x2] [x3]"), "the context has [x3], which"),
    "blank": (changed(*QUESTION, to=" "), "the question must be a string that is not blank"),
    "a number": (changed(*QUESTION, to=3), "the question must be a string that is not blank"),
    "question names a subject": (
        changed(*QUESTION, to="who is bob and [a]?"), "names subject 'bob'"),
    "attribute names a subject": (
        changed("people", "attributes", 0, to=["is i", "was i"]), "names subject 'i'"),
    "twice in the context": (
        changed(*CONTEXT, to="bob, [x1] and [x2]"), "is 2 times in 'bob, bob and wolfgang'"),
    "part of a word": (
        changed(*CONTEXT, to="[x1]ing and [x2]"), "'bob' must be once in the context, as words of"),
    "no negation": (changed("people", "attributes", 1, to=["lives"]), "['lives'] has no negation"),
    "no pair": (changed("people", "attributes", 1, to="lives"), "'lives' has no negation"),
    "three": (changed("people", "attributes", 1, to=["a", "b", "c"]), "must be a pair of strings"),
    "own negation": (changed("people", "attributes", 1, to=["is", "Is "]), "is its own negation"),
    "attribute twice": (
        changed("people", "attributes", 1, to=["was called b", "e"]), "called b' is there twice"),
    "no attributes": (changed("people", "attributes", to=[]), "attributes must be an array"),
    "subject twice": (
        changed("people", "subjects", "b", to=["bob", "Bob"]), "subject 'bob' is there twice"),
    "one subject": (changed("people", "subjects", to=["bob"]), "at least two are needed"),
    "one group": (changed("people", "subjects", to={"b": ["bob", "i"]}), "there is one group only"),
    "empty group": (changed("people", "subjects", "c", to=[]), "a group is empty"),
    "numbers": (changed("people", "subjects", to=[1, 2]), "subjects must be an array of strings"),
    "template's key": (
        changed("people", "templates", 1, "text", to="x"), "template 2 must be a table"),
    "no table": (changed("people", "templates", to=["x"]), "template 1 must be a table of"),
    "empty table": (changed("people", "templates", to=[{}]), "template 1 must be a table of"),
    "no templates": (changed("people", "templates", to="x"), "templates must be an array of"),
    "unknown key": (changed("people", "attribute", to=[]), "attribute is no part of a section"),
    "no section": (changed("peoples", to=5), "[peoples] is no section"),
    "note": (changed("note", to=5), "note is no string"),
    "missing part": (lambda content: content["people"].pop("subjects"), "has no subjects"),
    "nothing": (lambda content: content.clear(), "there are no sections"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_templates_that_cannot_be_are_refused_by_name(name, small, written):
    change, said = BAD[name]
    change(small)
    with pytest.raises(DataError) as caught:
        underspecified.read(written(small))
    assert said in str(caught.value)
    assert "mine.toml" in str(caught.value)


def test_all_problems_are_in_one_error(small, written):
    changed(*CONTEXT, to="[x1]")(small)
    changed("people", "attributes", 1, to=["lives"])(small)
    small["more"] = {**SMALL["people"], "subjects": ["bob"]}
    with pytest.raises(DataError) as caught:
        underspecified.read(written(small))
    for said in ("[people] template 1", "no negation", "[more] subjects: 1"):
        assert said in str(caught.value)


@pytest.mark.parametrize(("name", "content", "said"), [
    ("a.toml", "a = [", "is not TOML"), ("a.json", "{", "is not JSON"), ("a.json", "[]", "object"),
    ("a.json", "{}", "there are no sections"), ("a", "{", "is not JSON"),
    ("a.json", "[" * 100_000, "is not JSON"),
])  # fmt: skip
def test_a_file_that_cannot_be_read_as_templates_is_named(name, content, said, written):
    with pytest.raises(DataError, match=said):
        underspecified.read(written(content, name))


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "a.toml").write_bytes(b"note = '\xff'")
    with pytest.raises(DataError, match=r"a\.toml is not TOML"):
        underspecified.read(str(tmp_path / "a.toml"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match="nothing.toml cannot be read"):
        underspecified.read(str(tmp_path / "nothing.toml"))


# --- UnQover's files ---


def unqover(first, second, attribute="was b", template="0", text=None, **change):
    """An entry as generate_underspecified_templates.py writes it."""
    text = text or f"{first} met {second}."

    def asked(question):
        answers = {f"ans{place}": {"text": name, "start": "", "end": ""}
                   for place, name in enumerate((first, second))}  # fmt: skip
        return {"question": question, "pred": "", **answers}

    key = f"None|None|{first}|{second}|{template}|None|{attribute}|{attribute}"
    return {key: {"context": text, "q0": asked(f"Who {attribute}?"),
                  "q1": asked(f"Who can never {attribute}?"), **change}}  # fmt: skip


def test_templates_of_unqover_are_read(written):
    content = {
        **unqover("Wolfgang", "Bob"), **unqover("Bob", "Wolfgang"),
        **unqover("Bob", "Wolfgang", "was c", "3"), **unqover("Wolfgang", "Bob", "was c", "3"),
    }  # fmt: skip
    (section,) = underspecified.read(written(json.dumps(content), "slotmap.json")).sections
    assert section == Section(
        "slotmap", ("Wolfgang", "Bob"), (None, None), ("was b", "was c"), ("0", "3"),
        tuple(
            Case((1, 0), place, place,
                 (("Bob met Wolfgang.", ((0, 3), (8, 16))),
                  ("Wolfgang met Bob.", ((13, 16), (0, 8)))),
                 (f"Who {attribute}?", f"Who can never {attribute}?"))
            for place, attribute in enumerate(("was b", "was c"))
        ),
    )  # fmt: skip


def test_clusters_of_unqover_are_groups(written):
    text = json.dumps(unqover("Bob", "Ann") | unqover("Ann", "Bob"))
    text = text.replace("None|None|Bob", "B|A|Bob").replace("None|None|Ann", "A|B|Ann")
    (section,) = underspecified.read(written(text, "a.json")).sections
    assert dict(zip(section.subjects, section.groups, strict=True)) == {"Bob": "B", "Ann": "A"}


PAIR = unqover("Bob", "Ann") | unqover("Ann", "Bob")
BAD_UNQOVER = {
    "one order": (unqover("Bob", "Ann"), "Ann and Bob, template 0, 'was b': one order only"),
    "key": (PAIR | {"Bob|Ann": {}}, "'Bob|Ann' must be group|group|subject"),
    "same subject": (PAIR | unqover("Bob", "Bob"), "with two subjects"),
    "nothing in it": (PAIR | {"a|b|c|d|e|f|g|h": 5}, "'a|b|c|d|e|f|g|h' must have a context"),
    "no question": (unqover("Bob", "Ann", q1={}) | unqover("Ann", "Bob"), "must have a context"),
    "not in the context": (
        unqover("Bob", "Ann", text="Bob is Anna.") | unqover("Ann", "Bob"), "both in the context"),
    "other questions": (
        unqover("Bob", "Ann", q0=unqover("Bob", "Ann", "was d").popitem()[1]["q0"])
        | unqover("Ann", "Bob"), "the two orders ask different questions"),
    "twice": (unqover("Bob", "Ann", text="Bob, Bob, Ann") | unqover("Ann", "Bob"), "is 2 times in"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_UNQOVER)
def test_entries_of_unqover_that_cannot_be_are_refused_by_name(name, written):
    content, said = BAD_UNQOVER[name]
    with pytest.raises(DataError) as caught:
        underspecified.read(written(json.dumps(content), "a.json"))
    assert said in str(caught.value)
