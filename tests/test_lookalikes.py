"Clusters and pairs of drugs that look alike by their records."

import time
import tracemalloc

import pytest

from pillsnap.dataset.lookalikes import look_of, metadata_clusters, twins
from pillsnap.synth.catalogue import make_catalogue


@pytest.mark.parametrize("drugs", (12, 48, 240))
@pytest.mark.spec("BX12")
def test_planted_twins_share_a_cluster_and_lead_the_pairs(drugs):
    catalogue = make_catalogue(drugs, seed=17)
    records = {d.kcode: d.record for d in catalogue}
    clusters = metadata_clusters(records)
    assert catalogue.twins and all(clusters[a] == clusters[b] for a, b in catalogue.twins)
    pairs = twins(records)
    equal = {(p.first, p.second) for p in pairs if p.difference <= 0.1}
    assert set(catalogue.twins) <= equal
    others = [p for p in pairs if (p.first, p.second) not in equal]
    assert all(p.difference > 0.1 for p in others) and pairs == sorted(pairs)


def test_clusters_hold_one_form_outline_colours_and_a_millimetre():
    records = {d.kcode: d.record for d in make_catalogue(500, seed=3)}
    clusters = metadata_clusters(records)
    members = {}
    for key, name in clusters.items():
        members.setdefault(name, []).append(look_of(records[key]))
    for looks in members.values():
        assert len({(x.form, x.shape, x.colours) for x in looks}) == 1
        for side in ("long_mm", "short_mm"):
            sizes = [getattr(x, side) for x in looks]
            assert max(sizes) - min(sizes) <= 1 + 1e-9
    sizes = {}
    for key, name in clusters.items():
        look = look_of(records[key])
        if look.known:
            same = sizes.setdefault((look.form, look.shape, look.colours, look.long_mm, look.short_mm), name)
            assert same == name, "drugs of one size are in one cluster"


def test_the_order_of_records_and_drugs_of_other_blocks_change_no_cluster():
    records = {d.kcode: d.record for d in make_catalogue(120, seed=5)}
    clusters = metadata_clusters(records)
    assert metadata_clusters(dict(reversed(records.items()))) == clusters
    rounds = {k: r for k, r in records.items() if r["drug_shape"] == "원형"}
    assert metadata_clusters(rounds) == {k: clusters[k] for k in rounds}


def test_a_record_without_look_is_alone_and_in_no_pair():
    catalogue = make_catalogue(48, seed=17)
    records = {d.kcode: d.record for d in catalogue}
    records["K-099999"] = dict.fromkeys(next(iter(records.values())))
    clusters = metadata_clusters(records)
    blank = {*catalogue.blank, "K-099999"}
    assert all(list(clusters.values()).count(clusters[k]) == 1 for k in blank)
    assert not blank & {k for p in twins(records) for k in (p.first, p.second)}


def test_swapped_capsule_halves_tints_and_close_imprints():
    capsule = {"drug_shape": "장방형", "form_code_name": "경질캡슐제, 산제", "leng_long": 18, "leng_short": 6.4}
    a = {**capsule, "color_class1": "노랑, 투명", "color_class2": "파랑", "print_front": "AB12"}
    b = {**capsule, "color_class1": "파랑", "color_class2": "노랑", "print_front": "AB17"}
    c = {**capsule, "color_class1": "노랑", "color_class2": None, "print_front": "AB12"}
    d = {**capsule, "color_class1": "파랑", "color_class2": "노랑", "print_front": "XYZ9"}
    records = {"a": a, "b": b, "c": c, "d": d}
    clusters = metadata_clusters(records)
    assert clusters["a"] == clusters["b"] == clusters["d"] != clusters["c"]
    pairs = {(p.first, p.second): p for p in twins(records)}
    assert pairs["a", "b"].difference < pairs["a", "d"].difference < pairs["a", "c"].difference
    assert twins(records)[0] == pairs["a", "b"] and len(pairs) == 6, "a colour on one side is enough for a pair"


@pytest.mark.spec("BX12")
def test_clusters_and_pairs_of_4523_drugs_take_seconds_and_little_memory():
    records = {d.kcode: d.record for d in make_catalogue(4523, seed=17)}
    tracemalloc.start()
    started = time.process_time()
    clusters, pairs = metadata_clusters(records), twins(records)
    seconds, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(clusters) == 4523 and len(pairs) == 1000
    assert peak < 60e6, f"{peak / 1e6:.0f} MB"
    assert seconds < 60, f"{seconds:.0f} s of processor time"
    sizes = [list(clusters.values()).count(c) for c in set(clusters.values())]
    assert max(sizes) < 400, "a cluster that holds a tenth of all drugs says nothing"
