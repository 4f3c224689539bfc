"""Metrics against references written another way: scikit-learn, ultralytics where it is installed, and plain loops."""

import importlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from pillsnap.core.errors import PillsnapError
from pillsnap.evaluation.calibration import calibrate, fit_temperature, nll
from pillsnap.evaluation.reports import (
    dump_metrics_json,
    evaluate_classification_metrics,
    plot_confusion_matrix,
    roc_pr_macro,
    save_confusions,
)
from pillsnap.models.metrics import (
    accuracy,
    confusion_pairs,
    detection_ap,
    ece,
    macro_f1,
    match_boxes,
    per_class,
    topk_accuracy,
)
from pillsnap.models.pipeline import softmax
from pillsnap.models.yolo import load_ultralytics


def scores(seed: int, n: int = 120, c: int = 7):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, c, n)
    return (rng.normal(size=(n, c)) + 1.5 * np.eye(c)[y]).astype(np.float32), y


# ---- classification ------------------------------------------------------------------------------


@pytest.mark.spec("EV3")
@pytest.mark.parametrize("seed", range(5))
def test_figures_are_scikit_learns(seed):
    z, y = scores(seed)
    pred = z.argmax(1)
    m = evaluate_classification_metrics(z, y, [f"K-{i:06d}" for i in range(7)])
    assert m["accuracy"] == m["acc"] == m["top1"] == pytest.approx(sk.accuracy_score(y, pred), abs=1e-12)
    assert m["macro_f1"] == pytest.approx(sk.f1_score(y, pred, average="macro", zero_division=0), abs=1e-12)
    assert m["top5"] == pytest.approx(sk.top_k_accuracy_score(y, z, k=5, labels=range(7)), abs=1e-12)
    assert m["confidence"] == pytest.approx(softmax(z).max(1).mean())
    r = sk.classification_report(y, pred, labels=range(7), output_dict=True, zero_division=0)
    for row in m["per_class"].itertuples():
        want = r[str(row.class_id)]
        assert (row.n, row.precision, row.recall, row.f1) == pytest.approx(
            (want["support"], want["precision"], want["recall"], want["f1-score"])
        )


@pytest.mark.spec("EV3")
def test_torch_tensors_are_let_in():
    torch = pytest.importorskip("torch")
    z, y = scores(0)
    assert topk_accuracy(torch.tensor(z).bfloat16().float(), torch.tensor(y), 5) == topk_accuracy(
        torch.tensor(z).bfloat16().float().numpy(), y, 5
    )
    assert accuracy(torch.tensor(z.argmax(1)), torch.tensor(y)) == accuracy(z.argmax(1), y)


@pytest.mark.spec("EV3")
@given(st.integers(0, 2**31), st.integers(1, 8), st.integers(2, 6))
@settings(max_examples=60, deadline=None)
def test_top_k_is_a_rank_even_with_ties(seed, k, c):
    rng = np.random.default_rng(seed)
    z, y = rng.integers(0, 3, (15, c)).astype(float), rng.integers(0, c, 15)  # three values: ties everywhere
    want = np.mean([y[i] in np.argsort(-z[i], kind="stable")[:k] for i in range(15)])
    assert topk_accuracy(z, y, k) == pytest.approx(want)
    assert topk_accuracy(z, y, 1) == pytest.approx(accuracy(z.argmax(1), y))  # argmax takes the first of equals, too


@pytest.mark.spec("EV3", "BX2")
def test_the_score_of_nothing_is_no_number():
    empty = np.zeros((0, 4))
    assert all(
        np.isnan(v)
        for v in (
            accuracy([], []),
            topk_accuracy(empty, [], 5),
            macro_f1([], [], 4),
            ece([], []),
            detection_ap([], [])["mAP@0.5"],
        )
    )
    assert per_class([], [], 4).n.sum() == 0
    m = evaluate_classification_metrics(empty, [], list("abcd"))
    assert m["n"] == 0 and np.isnan(m["accuracy"]) and np.isnan(m["top5"]) and np.isnan(m["ece"])


def test_what_does_not_belong_together_is_refused():
    for bad in (
        lambda: accuracy([0], [0, 1]),
        lambda: topk_accuracy(np.zeros((1, 2)), [2]),
        lambda: macro_f1([0], [9], 3),
        lambda: per_class([-2], [0], 3),
        lambda: ece([1.7], [1]),
    ):
        with pytest.raises(PillsnapError):
            bad()


@pytest.mark.spec("EV3")
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60), st.integers(1, 20))
@settings(max_examples=80, deadline=None)
def test_ece_by_the_book(answers, bins):
    conf, right = np.array([a[0] for a in answers]), np.array([a[1] for a in answers])
    want = 0.0
    for b in range(bins):  # Guo et al. 2017, equation 3: bins ((m-1)/M, m/M]
        lo, hi = b / bins, (b + 1) / bins
        inside = (np.ceil(conf * bins).astype(int).clip(1, bins) - 1) == b
        if inside.any():
            want += inside.mean() * abs(right[inside].mean() - conf[inside].mean())
        assert ((conf[inside] >= lo - 1e-9) & (conf[inside] <= hi + 1e-9)).all()
    assert ece(conf, right, bins) == pytest.approx(want, abs=1e-12)
    assert ece(conf, right) == ece(conf, right, 15)  # the paper's number of bins


@pytest.mark.spec("EV1")
def test_confusions_add_up_and_stay_sparse(tmp_path):
    z, y = scores(3)
    pred = z.argmax(1)
    cm = sk.confusion_matrix(y, pred, labels=range(7))
    pairs = confusion_pairs(pred, y, top=None)
    assert {(p["true_id"], p["pred_id"]): p["n"] for p in pairs} == {
        (i, j): cm[i, j] for i in range(7) for j in range(7) if i != j and cm[i, j]
    }
    assert [p["n"] for p in pairs] == sorted((p["n"] for p in pairs), reverse=True)
    assert all(p["share"] == pytest.approx(p["n"] / cm[p["true_id"]].sum()) for p in pairs)
    text = save_confusions(pred, y, [f"정{i}" for i in range(7)], tmp_path / "c.csv").read_text(encoding="utf-8")
    assert text.count("\n") == len(pairs) + 1 and "정" in text


@pytest.mark.spec("EV1")
def test_thousands_of_classes_draw_pairs_and_no_matrix(tmp_path):
    import matplotlib.pyplot as plt

    rng = np.random.default_rng(0)
    y = rng.integers(0, 4523, 3000)
    pred = y.copy()
    pred[:20] = (y[:20] + 1) % 4523
    fig = plot_confusion_matrix(pred, y, [f"K-{i:06d}" for i in range(4523)], path=tmp_path / "c.csv")
    assert len(fig.axes) == 1 and not fig.axes[0].images and len(fig.axes[0].patches) == 15
    few = plot_confusion_matrix(y % 5, y % 5, list("abcde"))
    assert len(few.axes) == 2 and len(few.axes[0].images) == 1
    plt.close("all")


@pytest.mark.spec("EV1")
def test_macro_curves_are_scikit_learns():
    z, y = scores(1, 300)
    p = softmax(z)
    m = roc_pr_macro(p, y)
    assert m["auroc"] == pytest.approx(sk.roc_auc_score(y, p, multi_class="ovr", average="macro"))
    assert m["ap"] == pytest.approx(np.mean([sk.average_precision_score(y == c, p[:, c]) for c in range(7)]))


@pytest.mark.spec("EV2")
def test_metrics_json_keeps_history_and_latest(tmp_path):
    path = tmp_path / "reports" / "metrics.json"
    for e in (1, 2, 3, 2):
        got = dump_metrics_json({"epoch": e, "classification": {"acc": e / 10}}, path)
    assert [h["epoch"] for h in got["history"]] == [1, 2, 3] and got["latest"]["epoch"] == 3


# ---- calibration ---------------------------------------------------------------------------------


@pytest.mark.spec("EV3")
@pytest.mark.parametrize("factor", [0.25, 1.0, 4.0])
def test_temperature_is_the_minimum_that_scipy_finds(factor):
    optimize = pytest.importorskip("scipy.optimize")
    z, y = scores(5, 600)
    z = z * factor
    want = optimize.minimize_scalar(
        lambda t: nll(z, y, t), bounds=(0.05, 20), method="bounded", options=dict(xatol=1e-7)
    ).x
    assert fit_temperature(z, y) == pytest.approx(want, rel=1e-4)


@pytest.mark.spec("EV3", "X82")
def test_calibration_photos_fit_and_clean_photos_give_the_figure():
    z, y = scores(6, 600)
    number = np.repeat(np.arange(60), 10)
    groups, parts = [f"g{i}" for i in number], np.array(["calib", "clean", "val"], object)[number % 3]
    fit, clean = parts == "calib", parts == "clean"
    c = calibrate(z * 5, y, groups, parts)
    assert c.temperature == pytest.approx(fit_temperature(z[fit] * 5, y[fit]))
    p = softmax(z[clean] * 5, c.temperature)
    assert c.ece_after == pytest.approx(ece(p.max(1), p.argmax(1) == y[clean])) and c.ece_after < c.ece_before
    assert (c.n_fit, c.n_test, c.groups_fit, c.groups_test) == (200, 200, 20, 20)
    poisoned = np.where(fit, y, (y + 1) % 7)  # labels of other parts cannot move T
    assert calibrate(z * 5, poisoned, groups, parts).temperature == c.temperature
    with pytest.raises(PillsnapError, match="in the calibration and in the clean part"):
        calibrate(z, y, ["one"] * 600, parts)
    assert calibrate(z[:60], y[:60], groups[:60], parts[:60]).temperature == 1.0


# ---- boxes ---------------------------------------------------------------------------------------


def plain_ap(preds, gts, thr):
    "COCO's matching and the 101-point integral, in loops and from the definition."
    found, total = [], sum(len(g) for g in gts)
    for (boxes, conf), truth in zip(preds, gts):
        free = set(range(len(truth)))
        for i in sorted(range(len(conf)), key=lambda i: -conf[i]):
            best, who = 0.0, None
            for j in sorted(free):
                a, b = boxes[i], truth[j]
                w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
                inter = max(w, 0) * max(h, 0)
                u = inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)
                if u > best:
                    best, who = u, j
            hit = who is not None and best >= thr
            if hit:
                free.remove(who)
            found.append((conf[i], hit))
    found.sort(key=lambda t: -t[0])
    tp, curve = 0, []
    for k, (_, hit) in enumerate(found, 1):
        tp += hit
        curve.append((tp / total, tp / k))

    def precision_at(r):
        better = [p for rec, p in curve if rec >= r]
        return max(better) if better else 0.0

    return np.mean([precision_at(r) for r in np.linspace(0, 1, 101)])  # COCO: mean of 101 points


def random_boxes(seed, photos=25, noise=6.0, extra=2, lost=0.2):
    rng = np.random.default_rng(seed)
    preds, gts = [], []
    for _ in range(photos):
        g = rng.uniform(0, 500, (rng.integers(0, 5), 2))
        g = np.hstack([g, g + rng.uniform(40, 90, g.shape)])
        keep = rng.random(len(g)) > lost
        e = rng.uniform(0, 500, (rng.integers(0, extra + 1), 2))
        e = np.hstack([e, e + 60])
        twice = g[keep][rng.random(keep.sum()) < 0.3]  # some pills are boxed a second time
        p = np.vstack([g[keep] + rng.normal(0, noise, (keep.sum(), 4)), e, twice + rng.normal(0, noise, twice.shape)])
        preds.append((p, rng.uniform(0.05, 1, len(p))))
        gts.append(g)
    return preds, gts


@pytest.mark.spec("DT2")
@pytest.mark.parametrize("seed", range(4))
def test_ap_by_brute_force(seed):
    preds, gts = random_boxes(seed)
    got = detection_ap(preds, gts)
    for thr, ap in got["ap"].items():
        assert ap == pytest.approx(plain_ap(preds, gts, thr), abs=0.006)  # trapezium against mean of points
    assert got["mAP@0.5:0.95"] == pytest.approx(np.mean(list(got["ap"].values())))
    assert 0 < got["mAP@0.5:0.95"] < got["mAP@0.5"] < 1 and got["n_boxes"] == sum(map(len, gts))


@pytest.mark.spec("DT2")
@pytest.mark.parametrize("seed", range(4))
def test_ap_is_what_ultralytics_prints(seed, tmp_path, monkeypatch):
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    load_ultralytics()  # an import by itself would change PIL's Image.open for the whole process
    um = importlib.import_module("ultralytics.utils.metrics")
    preds, gts = random_boxes(seed)
    thrs = np.arange(0.5, 1, 0.05).round(2)
    tp, conf = [], []
    for (b, c), g in zip(preds, gts):
        o = np.argsort(-c)
        tp.append(np.stack([match_boxes(b[o], g, t) >= 0 for t in thrs], 1))
        conf.append(c[o])
    out = um.ap_per_class(
        np.concatenate(tp), np.concatenate(conf), np.zeros(len(np.concatenate(conf))), np.zeros(sum(map(len, gts)))
    )
    got = detection_ap(preds, gts)
    assert got["mAP@0.5"] == pytest.approx(out[5][0, 0], abs=1e-9) and got["mAP@0.5:0.95"] == pytest.approx(
        out[5][0].mean(), abs=1e-9
    )
    assert (got["precision"], got["recall"]) == pytest.approx(
        (out[2][0], out[3][0]), abs=0.08
    )  # it smooths its F1 curve before it picks a point


@pytest.mark.spec("DT2")
def test_shuffled_labels_are_worth_nothing():
    preds, gts = random_boxes(9, photos=60)
    right, wrong = detection_ap(preds, gts)["mAP@0.5"], detection_ap(preds[7:] + preds[:7], gts)["mAP@0.5"]
    assert right > 0.5 and wrong < 0.05


@pytest.mark.spec("DT2")
@given(st.integers(0, 2**31), st.floats(0.3, 0.95))
@settings(max_examples=40, deadline=None)
def test_a_pill_is_found_once(seed, thr):
    ((boxes, _),) = random_boxes(seed, photos=1, extra=4)[0]
    truth = random_boxes(seed, photos=1, extra=4)[1][0]
    taken = match_boxes(boxes, truth, thr)
    hits = taken[taken >= 0]
    assert len(set(hits.tolist())) == len(hits) <= min(len(boxes), len(truth))


def test_a_network_that_overflows_answers_nothing():
    "Rows of NaN are no guess of the first drug, and no sure one."
    from pillsnap.evaluation.reports import evaluate_classification_metrics

    logits = np.zeros((6, 3))
    logits[:, 0] = 9
    logits[3:] = np.nan
    found = evaluate_classification_metrics(logits, [0] * 6, ["A", "B", "C"])
    assert (found["accuracy"], found["top1"]) == (0.5, 0.5) and 0 < found["ece"] < 0.1
