"Drugs and things that no model was trained on: the score, its threshold, and the answer."

import json

import numpy as np
import pytest

from pillsnap.delivery.classmap import ClassMap
from pillsnap.evaluation.openset import Shown, SingleOutputs, measure_open_set
from pillsnap.models.decision import AnswerRule
from pillsnap.models.pipeline import Pipeline
from pillsnap.models.unknown import UnknownRule, fit_unknown_score, unknown_rule_to_dict, unknown_threshold

KEYS = ("K-000001", "K-000002", "K-000003")
CENTRES = np.array([[4.0, 0.0], [-2.0, 3.5], [-2.0, -3.5]])


def outputs(kind, places, n=40, seed=0):
    "Embeddings in a plane around some places, four photos a group; the last layer is linear."
    rng, shown, e = np.random.default_rng(seed), [], []
    for what, place in enumerate(places):
        for i in range(n):
            label = what if kind == "known" else -1
            shown.append(Shown(f"{seed}/{kind}/{what}/{i}", f"{seed}/{kind}/{what}/{i // 4}", kind, str(what), label))
            e.append(place + 0.5 * rng.standard_normal(2))
    e = np.array(e)
    return SingleOutputs(shown, e @ CENTRES.T, e)


def joined(*parts):
    return SingleOutputs(
        [s for p in parts for s in p.shown],
        np.concatenate([p.logits for p in parts]),
        np.concatenate([p.embedding for p in parts]),
    )


KNOWN = {p: outputs("known", CENTRES, seed=i) for i, p in enumerate(("train", "calib", "clean"))}


def strangers(drug, thing, seed):
    return joined(outputs("drugs", [drug], seed=seed), outputs("objects", [thing], seed=seed))


@pytest.mark.spec("BX9")
def test_score_and_threshold_do_not_depend_on_test_unknowns():
    "Whatever the test unknowns are, the rule is the same; other validation unknowns may change the score."
    validation = strangers((9.0, -7.0), (12.0, 0.0), seed=5)
    tests = [
        strangers(*places, seed=6) for places in (((0.0, 0.0), (0.2, 0.1)), ((30.0, 30.0), (-9.0, 0.0)), CENTRES[:2])
    ]
    rules = [measure_open_set(KNOWN["train"], KNOWN, {"validation": validation, "test": t}, 0.02).rule for t in tests]
    assert len({(r.score.name, r.threshold) for r in rules}) == 1
    score = fit_unknown_score(rules[0].score.name, KNOWN["train"].embedding, KNOWN["train"].labels)
    calib = score(KNOWN["calib"].logits, KNOWN["calib"].embedding)
    assert rules[0].threshold == unknown_threshold(calib, KNOWN["calib"].groups, 0.02)
    assert 0 < np.mean(calib > rules[0].threshold) + 1e-9 <= 0.02 + 1e-9
    near = strangers((0.3, 0.0), (0.0, 0.3), seed=5)  # between the clouds: the logits tell it, in validation alone
    other = measure_open_set(KNOWN["train"], KNOWN, {"validation": near, "test": tests[0]}, 0.02)
    assert not other.chosen_on.equals(
        measure_open_set(KNOWN["train"], KNOWN, {"validation": validation, "test": tests[0]}, 0.02).chosen_on
    )


class Plane:
    "The mean of the first two channels is the embedding."

    size = 8

    def outputs(self, x):
        e = x.mean((2, 3))[:, :2]
        return (4 * e).astype(np.float32), e

    def logits(self, x):
        return self.outputs(x)[0]


@pytest.mark.spec("BX9")
@pytest.mark.parametrize("asked", [True, False])
def test_the_pipeline_refuses_what_is_like_no_known_drug(asked):
    "Red and green are known; white has large logits and is refused, unless the rule asks for no unknown score."
    rng, runner, world = np.random.default_rng(0), Plane(), ClassMap(KEYS[:2])

    def photo(r, g):
        return np.clip(rng.normal(0, 10, (40, 40, 3)) + (r, g, 60), 0, 255).astype(np.uint8)

    plain = Pipeline(runner, world)
    trained = [photo(*c) for c in ((200, 40), (40, 200)) for _ in range(20)]
    x = np.stack([plain.views(p, "single").images[0] for p in trained])
    from pillsnap.photos.images import normalise

    z, e = runner.outputs(normalise(x))
    score = fit_unknown_score("mahalanobis", e, np.repeat([0, 1], 20))
    own = score(z, e)
    rule = UnknownRule(score, 3 * float(own.max()), 0.02, 10)
    stored = json.loads(json.dumps(AnswerRule("lac", 0.05, (1.0, 1.0), unknown=unknown_rule_to_dict(rule)).to_dict()))
    if not asked:
        stored["unknown"] = None
    pipeline = Pipeline(runner, world, rule=AnswerRule.from_dict(stored))
    for p in trained[:4] + trained[-4:]:
        assert pipeline.predict(p)["items"][0]["reason"] != "unknown_score"
    for strange in (photo(250, 250), photo(10, 10)):
        item = pipeline.predict(strange)["items"][0]
        assert (item["answer"] == "unknown" and item["reason"] == "unknown_score") == asked
        assert not (asked and item["shortlist"])
