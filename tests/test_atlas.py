"The look-alike atlas: confusions by harm, memory by errors, twins first."

import json
import tracemalloc

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pillsnap.core.records import Provenance
from pillsnap.evaluation import atlas as A
from pillsnap.synth.catalogue import make_catalogue

PROV = Provenance("synthetic", "a" * 64, "b" * 64)
PILL = {
    "dl_material": "우르소데옥시콜산",
    "di_class_no": "[02360]이담제",
    "di_etc_otc_code": "일반의약품",
    "dl_name": "가나정 100밀리그램",
}


def table(pairs):
    "Answers as the evaluation has them, from (true, answered)."
    out = pd.DataFrame(pairs, columns=["true", "answered"])
    path = [f"{t}/{i}.png" for i, t in enumerate(out["true"])]
    return out.assign(path=path, group=out["true"] + "_0_0", confidence=np.linspace(0.9, 0.5, len(out)))


@pytest.mark.spec("BX12")
def test_one_harmful_error_stands_before_many_harmless_ones():
    records = {
        "true": PILL,
        "same": {**PILL, "dl_name": "다라정 100mg"},
        "dose": {**PILL, "dl_name": "가나정 200mg"},
        "access": {**PILL, "di_etc_otc_code": "전문의약품", "dl_name": "가나정 300mg"},
        "class": {**PILL, "di_class_no": "[02340]제산제"},
        "other": {**PILL, "dl_material": "졸피뎀타르타르산염"},
        "blank": {},
    }
    counts = {"same": 900, "dose": 300, "access": 30, "class": 2, "other": 1, "blank": 3}
    found = A.by_harm({("true", k): n for k, n in counts.items()}, records)
    assert [c.answered for c in found] == ["blank", "class", "other", "access", "dose", "same"]
    assert [c.harm for c in found] == [A.Harm.OTHER] * 3 + [A.Harm.ACCESS, A.Harm.STRENGTH, A.Harm.SAME]


FIELDS = st.fixed_dictionaries(
    {
        "dl_material": st.sampled_from(["가", "나", "가|나", "나|가", "", None]),
        "di_class_no": st.sampled_from(["[1]", "[2]", None]),
        "di_etc_otc_code": st.sampled_from(["전문의약품", "일반의약품", ""]),
        "dl_name": st.sampled_from(["정 5mg", "정 10밀리그램", "정 5/10mg", "정", None]),
    }
)


@given(FIELDS, FIELDS)
@settings(deadline=None)
def test_harm_is_symmetric_and_never_smaller_for_what_is_unknown(a, b):
    harm = A.harm_between(a, b)
    assert harm == A.harm_between(b, a)
    assert A.harm_between({**a, "dl_material": None}, b) is A.Harm.OTHER
    assert A.harm_between({**a, "di_etc_otc_code": None}, b) >= harm
    assert A.harm_between({**a, "dl_name": None}, b) >= harm
    if all(a.values()):
        assert A.harm_between(a, dict(a)) is (A.Harm.SAME if A.strengths_mg(a) else A.Harm.STRENGTH)


@pytest.mark.parametrize(
    ("name", "mg"),
    [
        ("가바토파정 100mg", (100,)),
        ("쿠에타핀정 12.5밀리그램", (12.5,)),
        ("메트정 1,000밀리그람(메트포르민염산염)", (1000,)),
        ("엑스포지정 5/160밀리그램", (5, 160)),
        ("씬지로이드정 0.1밀리그램", (0.1,)),
        ("레보정 100마이크로그램", (0.1,)),
        ("은행엽정 1그램", (1000,)),
        ("비타민정", ()),
        ("세파Mg정 2정", ()),
    ],
)
def test_strengths_are_read_from_names(name, mg):
    assert A.strengths_mg({"dl_name": name}) == mg


@pytest.mark.spec("BX12")
def test_memory_grows_with_the_errors_and_not_with_classes_or_photos():
    "At 4,523 classes and 100,000 answers the full matrix would take 164 MB."
    records = {d.kcode: d.record for d in make_catalogue(4523, seed=17)}
    keys, rng = np.array(sorted(records), object), np.random.default_rng(3)
    true = rng.integers(4523, size=100_000)
    peaks = {}
    for errors in (500, 20_000):
        answered = true.copy()
        answered[:errors] = (true[:errors] + rng.integers(1, 4523, size=errors)) % 4523
        t, a = keys[true], keys[answered]
        tracemalloc.start()
        found = A.by_harm(A.count_confusions(t, a), records)
        peaks[errors] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert sum(c.count for c in found) == errors
    assert peaks[500] < 1e6, f"{peaks[500] / 1e6:.1f} MB for 500 errors"
    assert peaks[20_000] < 30e6, f"{peaks[20_000] / 1e6:.1f} MB for 20,000 errors"


@pytest.mark.spec("BX12")
def test_a_whole_atlas_of_4523_drugs_stays_small():
    records = {d.kcode: d.record for d in make_catalogue(4523, seed=17)}
    keys, rng = np.array(sorted(records), object), np.random.default_rng(3)
    true = rng.integers(4523, size=100_000)
    answered = np.where(rng.random(100_000) < 0.02, rng.integers(4523, size=100_000), true)
    answers = table(list(zip(keys[true], keys[answered])))
    means = rng.normal(size=(4523, 64)).astype(np.float32)
    tracemalloc.start()
    atlas = A.make_atlas(answers, records, A.nearest_drugs(list(keys), means, block=256))
    doc = atlas.to_dict()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6, f"{peak / 1e6:.0f} MB"
    assert doc["photos"] == 100_000 and len(doc["confusions"]) == len({x for x in zip(true, answered) if x[0] != x[1]})
    assert len(json.dumps(doc, ensure_ascii=False).encode()) < 5e6
    levels = [h.words for h in reversed(A.Harm)]
    harms = [levels.index(c["harm"]) for c in doc["confusions"]]
    assert harms == sorted(harms) and doc["errors"] == sum(doc["errors_by_harm"].values())


@pytest.mark.spec("BX12")
def test_planted_twins_come_first_whether_confused_or_not():
    catalogue = make_catalogue(48, seed=17)
    records = {d.kcode: d.record for d in catalogue}
    (a, b), calm = catalogue.twins[0], catalogue.twins[1]
    x, y = [k for k in records if k not in {*catalogue.twins[0], *calm}][:2]
    right = [(k, k) for k in records for _ in range(10)]
    pairs = A.make_atlas(table([*right, (a, b), *[(x, y)] * 9]), records).pairs()
    assert (pairs[0].true, pairs[0].answered, pairs[0].count) == (a, b, 1) and pairs[0].cluster
    assert (pairs[1].true, pairs[1].answered, pairs[1].count) == (*calm, 0)
    assert pairs[-1].true == x and pairs[-1].count == 9 and not pairs[-1].twins
    assert pairs[0].examples and not pairs[1].examples


def test_twin_accuracy_counts_groups_and_harmful_errors_count_photos():
    catalogue = make_catalogue(12, seed=17)
    records = {d.kcode: d.record for d in catalogue}
    a, b = catalogue.twins[0]
    answers = table([(a, a)] * 30 + [(a, b)] * 10 + [(b, b)] * 40)
    answers["group"] = [f"{t}_{i // 10}" for i, t in enumerate(answers["true"])]
    figures = A.make_atlas(answers, records).metrics(PROV, 1.0)
    assert figures["twin_accuracy"].value == 70 / 80 and figures["twin_accuracy"].n == 80
    assert "8 capture groups" in figures["twin_accuracy"].note
    harmful = A.harm_between(records[a], records[b]) is A.Harm.OTHER
    assert figures["harmful_errors"].value == (0.125 if harmful else 0.0)
    assert figures["errors_in_cluster"].value == 1.0
    assert A.make_atlas(answers[:0], records).metrics(PROV, 1.0)["twin_accuracy"].value is None


def test_neighbours_are_those_of_a_dense_computation_at_any_block():
    rng = np.random.default_rng(1)
    means, keys = rng.normal(size=(50, 8)).astype(np.float32), [f"K-{i:06d}" for i in range(50)]
    unit = means - means.mean(0)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosines = unit @ unit.T - 2 * np.eye(50)
    for block in (1, 7, 1024):
        near = A.nearest_drugs(keys, means, block)
        assert [near[k][0] for k in keys] == [keys[i] for i in cosines.argmax(1)]
        np.testing.assert_allclose([near[k][1] for k in keys], cosines.max(1), atol=1e-4)


def test_the_model_joins_what_it_confuses_often_or_holds_close():
    few, often = A.Confusion("a", "b", 1, A.Harm.OTHER), A.Confusion("c", "d", 2, A.Harm.OTHER)
    near = {"e": ("f", 0.95), "f": ("e", 0.95), "d": ("e", 0.95), "g": ("h", 0.5), "h": ("g", 0.5)}
    assert A.model_clusters([few, often], {"a": 100, "c": 20}, near) == [["c", "d"], ["e", "f"]]


def test_a_pair_without_photos_is_drawn_with_an_empty_half():
    pair = A.AtlasPair("K-000001", "K-000002", 2, 9, A.Harm.OTHER, True, "정제 원형 하양 9 mm", ("gone.png",))
    fig = A.plot_pairs([pair], [(None, np.zeros((20, 20, 3), np.uint8))], {"K-000001": "가나다정 5밀리그램"})
    words = [t.get_text() for t in fig.axes[0].texts]
    assert any("twins" in w and "2 of 9" in w for w in words)
    assert any("가나다정" in w for w in words) and any("정제 원형 하양" in w for w in words)
