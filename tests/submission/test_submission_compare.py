"""The t-tests against zero and 0.005 nats in each unit, against published statistics and straight-line formulae."""

import json
import math
import re
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
from foreign_records import loss_of, make_foreign
from record_example import edit_json

from train.common.errors import UserError
from train.submission.__main__ import main
from train.submission.bases import find_scores
from train.submission.record_scores import RecordScores, exact_score
from train.submission.statistics import compare, nats_per_token_in_bpb, t_test, unit_tests


def t_below(t, df):
    """P(T_df <= t) by Simpson's rule over the density, whose tail is cut where it is below 1e-17."""
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    # x = t - (1 - u) / u maps u in (0, 1] to (-inf, t]
    u = np.linspace(1e-9, 1.0, 2_000_001)
    x = t - (1 - u) / u
    y = scale * (1 + x * x / df) ** (-(df + 1) / 2) / u**2
    return float((y[0] + y[-1] + 4 * y[1:-1:2].sum() + 2 * y[2:-1:2].sum()) * (u[1] - u[0]) / 3)


def straight_welch(a, b, margin):
    va, vb = statistics.variance(a) / len(a), statistics.variance(b) / len(b)
    t = (statistics.fmean(a) + margin - statistics.fmean(b)) / math.sqrt(va + vb)
    df = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return t, df, t_below(t, df)


# t to 4 and degrees of freedom to 4 decimals, as published in the records named (or recomputed from their scores)
@pytest.mark.parametrize(
    ("ours", "theirs", "t", "df"),
    [
        ("1392", "1019", -18.3720, 2.3794),
        ("1471", "1019", -62.062, 2.9539),
        ("1019", "549", -11.8339, 3.3063),
        ((1.09269834, 1.09269085, 1.09194120), "1019", -68.8548, 3.8409),
    ],
)
def test_published_statistics_are_reproduced(ours, theirs, t, df):
    a = ours if isinstance(ours, tuple) else find_scores(ours).val_bpb
    result = t_test(a, find_scores(theirs).val_bpb)
    assert result.statistic == pytest.approx(t, abs=5.1e-5) and result.df == pytest.approx(df, abs=5.1e-5)


def test_published_means_deviations_and_p():
    ours, theirs = find_scores("1392"), find_scores("#1019")
    assert round(statistics.fmean(ours.val_bpb), 10) == 1.1020347333
    assert round(statistics.stdev(ours.val_bpb), 8) == 0.00114386
    assert round(statistics.fmean(find_scores("1471").val_bpb), 10) == 1.0865547233
    assert round(statistics.stdev(find_scores("1471").val_bpb), 8) == 0.00070236
    assert (round(statistics.fmean(theirs.val_loss), 8), round(statistics.stdev(theirs.val_loss), 8)) == (
        1.88217853,
        0.00059750,
    )
    runs = find_scores("122")
    assert (round(statistics.fmean(runs.val_bpb), 8), round(statistics.stdev(runs.val_bpb), 8)) == (
        1.16027254,
        0.00145697,
    )
    assert round(statistics.fmean(runs.val_loss), 8) == 2.38160730
    assert round(t_test(ours.val_bpb, theirs.val_bpb).pvalue, 8) == 0.00063882
    # #1392 scored the last 64 tokens of 45,508,608 32 times, which is 1,984 tokens of 4,991 bytes more
    losses = [bpb * math.log(2) * (151_074_052 + 4_991) / (45_508_608 + 1_984) for bpb in ours.val_bpb]
    assert statistics.fmean(losses) == pytest.approx(2.53578534, abs=2e-8)
    assert statistics.stdev(losses) == pytest.approx(0.00263202, abs=5e-9)


def test_the_margins_in_bits_per_byte_are_the_published_ones():
    sizes = (2.4359301, 2.9613203, 3.3196808, 3.7266311)
    assert [round(nats_per_token_in_bpb(size), 6) for size in sizes] == [0.002961, 0.002436, 0.002173, 0.001936]


@pytest.mark.parametrize("margin", [0.0, 0.003, 0.0072])
@pytest.mark.parametrize("sizes", [(3, 3), (2, 6), (5, 3)])
def test_against_the_formula_and_an_integral(sizes, margin):
    rng = np.random.default_rng(sum(sizes) + int(1e4 * margin))
    a, b = (list(1.1 - 0.008 * (side == 0) + 0.002 * rng.standard_normal(size)) for side, size in enumerate(sizes))
    t, df, p = straight_welch(a, b, margin)
    result = t_test(a, b, margin)
    assert (result.statistic, result.df) == (pytest.approx(t, rel=1e-9), pytest.approx(df, rel=1e-9))
    assert result.pvalue == pytest.approx(p, rel=1e-5, abs=1e-9)


def test_each_unit_shifts_the_null_hypothesis_by_its_margin():
    ours, theirs = find_scores("1019"), find_scores("549")
    tests = {test.unit.split(" of ")[0]: test for test in unit_tests(ours, theirs)}
    assert list(tests) == ["nats per token", "nats per byte", "bits per byte"]
    bars = [0.005 / (math.log(2) * ours.bytes_per_token), 0.005 / math.log(2), 0.005]
    for unit, bar in zip(tests.values(), bars, strict=True):
        assert unit.test.statistic == pytest.approx(straight_welch(ours.val_bpb, theirs.val_bpb, bar)[0], rel=1e-9)
        assert unit.margin == pytest.approx(bar, rel=1e-12)
    # the improvement of 0.00784 nats per token is 0.00322 nats per byte
    assert [unit.passes for unit in tests.values()] == [True, False, False]


def test_a_test_on_losses_has_the_same_t_within_one_tokenizer():
    theirs = find_scores("1019")
    loss = tuple(value * math.log(2) * theirs.bytes_per_token for value in (1.1031, 1.1036, 1.1039))
    ours = RecordScores("ours", (), (1.1031, 1.1036, 1.1039), loss)
    assert len(unit_tests(ours, theirs)) == 3
    assert t_test(ours.val_loss, theirs.val_loss, 0.005).statistic == pytest.approx(
        unit_tests(ours, theirs)[0].test.statistic, rel=1e-5
    )


def test_text_names_both_tokenizers_and_the_result():
    ours = RecordScores("ours", ("1", "2", "3"), (1.1015, 1.1018, 1.1021), (2.5345, 2.5352, 2.5359))
    text = compare(ours, find_scores("1019")).text()
    assert "nats per token of #1019 (2.4359 bytes)" in text and "nats per token of ours (3.3196 bytes)" in text
    assert "A is better than B by 0.01293509 bits per byte." in text
    assert text.endswith("Result: A is better by enough in every unit.")
    worse = compare(find_scores("1019"), find_scores("1392")).text()
    assert "A is not better than B: its mean is 0.01270036 bits per byte higher." in worse
    assert worse.endswith("A is not better by enough in any unit.")
    unknown = compare(find_scores("1471"), find_scores("1392")).text()
    assert "nats per token: not tested" in unknown
    # #1471 is better by 0.0155 bpb, which is enough in each unit tested
    assert unknown.endswith("Result: A is better by enough in every unit.")
    small = compare(RecordScores("a", (), (1.1005, 1.1006)), RecordScores("b", (), (1.1025, 1.1026))).text()
    assert small.endswith(
        "Result: not known: A is not better by enough in the units tested, and nats per token were not."
    )


@pytest.mark.parametrize(
    ("a", "b", "fragment"),
    [
        ((1.1,), (1.2, 1.3), "A: 1 seed: "),
        ((1.1, 1.2), (), "B: no score: "),
        ((1.1, 1.1), (1.2, 1.2), "the scores of A are all equal, and so are those of B: a t-test needs some variance"),
        ((1.1, 1.1), (1.2,), "the scores of A are all equal: a t-test needs some variance"),
    ],
)
def test_scores_without_a_deviation_are_refused(a, b, fragment):
    with pytest.raises(UserError, match=fragment):
        t_test(a, b)


# the record of 2026-03-18 with 2,048 tokens; the bar of its day was 1.2193657
LONG_CONTEXT = (1.20576485, 1.20617460, 1.20715923)


def test_against_one_published_number_the_one_sample_test_is_made():
    result = t_test(LONG_CONTEXT, (1.2193657,))
    assert (round(result.statistic, 2), result.df, round(result.pvalue, 5)) == (-31.42, 2, 0.00051)
    # the bar was 0.005 bits per byte below the baseline's 1.2243657
    shifted = t_test(LONG_CONTEXT, (1.2243657,), 0.005)
    assert shifted.statistic == pytest.approx(result.statistic, rel=1e-9)
    spread = statistics.stdev(LONG_CONTEXT) / math.sqrt(3)
    assert result.statistic == pytest.approx((statistics.fmean(LONG_CONTEXT) - 1.2193657) / spread, rel=1e-9)
    assert result.pvalue == pytest.approx(t_below(result.statistic, 2), rel=1e-5)


def test_command_compares_with_one_number_in_words_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    results = {str(seed): {"val_bpb": bpb} for seed, bpb in enumerate(LONG_CONTEXT)}
    ours, theirs = tmp_path / "ours.json", tmp_path / "theirs.json"
    ours.write_text(json.dumps({"seed_results": results}))
    theirs.write_text(json.dumps({"val_bpb": 1.2193657, "val_loss": 2.0642}))
    for other in ("1.2193657", str(theirs)):
        assert main(["compare", str(ours), other]) == 0
        text = capsys.readouterr().out
        assert f"B  {other}: val_bpb 1.21936570" in text and "(one number)\n" in text
        said = re.search(
            r"^One-sample test, A better than B: t = (.*), df = 2\.0000, one-sided p = (.*)\.$", text, re.M
        )
        assert said and (round(float(said[1]), 2), round(float(said[2]), 5)) == (-31.42, 0.00051)
        assert "B is one number, which the test takes as exact." in text
        assert main(["compare", str(ours), other, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["test"], round(found["t"], 2), found["df"], round(found["p"], 5)) == (
            "One-sample test", -31.42, 2, 0.00051,
        )  # fmt: skip
        assert found["b"]["val_bpb"] == [1.2193657] and found["b"]["val_bpb_std"] is None
        assert [unit["passes"] for unit in found["units"]] == [True] * len(found["units"])
    assert len(found["units"]) == 3
    assert main(["compare", "1392", "1019", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["test"], round(found["t"], 4), round(found["df"], 4)) == ("Welch's test", -18.3720, 2.3794)
    t, df, p = straight_welch(find_scores("1392").val_bpb, find_scores("1019").val_bpb, 0.005)
    last = {name: pytest.approx(value, rel=1e-5) for name, value in (("t", t), ("df", df), ("p", p))}
    assert found["units"][-1] == {"unit": "bits per byte", "margin_bpb": 0.005, **last, "passes": True}
    with pytest.raises(UserError, match="A: 1 seed: a t-test needs at least two"):
        main(["compare", "1.2193657", str(ours)])


LOG = """seed:{seed}
final_int6_roundtrip val_loss:2.0000 val_bpb:1.2000 eval_time:1000ms
final_int6_roundtrip_exact val_loss:2.00000000 val_bpb:1.20000000
final_int6_sliding_window val_loss:1.9000 val_bpb:{bpb:.4f} stride:64 eval_time:9000ms
final_int6_sliding_window_exact val_loss:1.90000000 val_bpb:{bpb:.8f}
"""


def test_scores_come_from_the_json_or_else_from_the_logs(tmp_path: Path):
    for seed, bpb in ((42, 1.10327377), (314, 1.10181145), (999, 1.10101898)):
        (tmp_path / f"train_seed{seed}.log").write_text(LOG.format(seed=seed, bpb=bpb))
    logs = find_scores(str(tmp_path))
    assert logs.val_bpb == (1.10327377, 1.10181145, 1.10101898) and logs.seeds == ("42", "314", "999")
    assert logs.val_loss == (1.9, 1.9, 1.9)
    results = {"7": {"val_bpb": 1.5}, "8": {"val_bpb": 1.6, "val_loss": 2.0}}
    (tmp_path / "submission.json").write_text(json.dumps({"seed_results": results}))
    for name in (str(tmp_path), str(tmp_path / "submission.json")):
        assert find_scores(name) == RecordScores(name, ("7", "8"), (1.5, 1.6))


def test_scores_are_read_from_any_layout_and_no_log_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ours = make_foreign(tmp_path / "ours")
    shutil.copy(ours / "train_seed42.log", ours / "train.log")
    found = find_scores(str(ours))
    # the json has no losses, the logs have
    assert found.seeds == ("42", "314", "999") and found.val_bpb == (1.06110033, 1.06120033, 1.06140033)
    assert found.val_loss == tuple(loss_of(bpb) for bpb in found.val_bpb) and found.text and found.text.challenge
    assert found.bytes_per_token == pytest.approx(3.1571515, abs=1e-7)
    results = [{"seed": seed, "val_bpb": bpb} for seed, bpb in zip(found.seeds, found.val_bpb, strict=True)]
    edit_json(ours, seed_results=results, seeds=None)
    assert find_scores(str(ours)).val_bpb == found.val_bpb
    (ours / "submission.json").unlink()
    (ours / "train_seed999.log").rename(ours / "my_log_999.txt")
    assert find_scores(str(ours)).val_bpb == found.val_bpb
    assert main(["compare", str(ours), "1.06785"]) == 0
    text = capsys.readouterr().out
    assert "One-sample test" in text and "nats per token of " in text and "p < 0.25" in text


def test_the_score_of_a_log_is_its_last_exact_one():
    flat, exact, other = ({"val_loss": 2.0, "val_bpb": bpb} for bpb in (1.0, 1.01, 0.9))
    assert exact_score({"finals": {"a": flat, "a_exact": exact, "b": other}}) == exact
    assert exact_score({"finals": {"b": other}}) == other
    assert exact_score({"finals": {}}) is None


@pytest.mark.parametrize("number", ["NaN", "1e400", "true", '"1.1"', "1" + "0" * 400], ids=lambda text: text[:5])
def test_scores_that_are_no_numbers_are_refused(tmp_path: Path, number: str):
    (tmp_path / "submission.json").write_text(f'{{"seed_results": {{"1": {{"val_bpb": {number}}}}}}}')
    with pytest.raises(UserError, match=r"no scores in submission\.json .*, and none in a log"):
        find_scores(str(tmp_path))
    (tmp_path / "submission.json").unlink()
    (tmp_path / "a.log").write_text("final_int6_roundtrip_exact val_loss:nan val_bpb:nan\n")
    with pytest.raises(UserError, match="and none in a log"):
        find_scores(str(tmp_path))


def test_what_holds_no_scores_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"no such record folder, submission\.json or published record"):
        find_scores("records/none")
    with pytest.raises(UserError, match="not a record folder"):
        find_scores(str(tmp_path))
    (tmp_path / "train_seed1.log").write_text("seed:1\nstep:1/2 train_loss:2.0\n")
    with pytest.raises(UserError, match=r"no scores in submission\.json .*, and none in a log"):
        find_scores(str(tmp_path))
    for results in ([1], {"1": {}}, 5):
        (tmp_path / "submission.json").write_text(json.dumps({"seed_results": results}))
        with pytest.raises(UserError, match="and none in a log"):
            find_scores(str(tmp_path))


def test_command_prints_the_comparison(capsys):
    assert main(["compare", "1392", "1019"]) == 0
    output = capsys.readouterr().out
    assert "t = -18.3720, df = 2.3794, one-sided p = 0.00063882." in output
    assert output.count("passes\n") == 3
    assert "The leaderboard's rule at its end, p < 0.25 against the record before: passes (p = 0.00063882)." in output
    assert main(["compare", "1019", "1392", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["leaderboard_p"], found["leaderboard_passes"]) == (0.25, False)


def scored_record(folder: Path, tokens: int, digest: str, *, whole: int = 0) -> str:
    folder.mkdir()
    facts = {"evaluation": {"tokens": tokens, "validation_tokens": whole or tokens, "window": 2048}}
    results = {"1": {"val_bpb": 1.05}, "2": {"val_bpb": 1.06}}
    (folder / "submission.json").write_text(
        json.dumps({"seed_results": results, **facts, "tokenizer": {"sha256": digest}})
    )
    return str(folder)


def test_scores_of_different_texts_are_not_compared(tmp_path: Path):
    ours = scored_record(tmp_path / "ours", 12_288, "a")
    for pair, fragment in (
        (
            (ours, "1019"),
            "ours on another text of 12,288 tokens, #1019 on the challenge's",
        ),
        (("1019", ours), "#1019 on the challenge's validation text, .*ours on another text of 12,288"),
        # of one tokenizer, and more apart than a window
        ((ours, scored_record(tmp_path / "longer", 14_336, "a")), "on another text of 14,336 tokens"),
        (
            ("1019", scored_record(tmp_path / "part", 65_536, "b", whole=40_540_160)),
            "part on another text of 65,536 tokens",
        ),
    ):
        with pytest.raises(UserError, match=f"^scored on different texts: .*{fragment}"):
            main(["compare", *pair])
    silent = tmp_path / "silent.json"
    silent.write_text('{"seed_results": {"1": {"val_bpb": 1.05}, "2": {"val_bpb": 1.06}}}')
    for other in (str(silent), scored_record(tmp_path / "other", 9_216, "c")):
        with pytest.raises(UserError, match=r"^may be scored on different texts: "):
            main(["compare", ours, other])


def test_scores_of_one_text_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ours = scored_record(tmp_path / "ours", 12_288, "a")
    # a window of another length leaves out another end
    assert main(["compare", ours, scored_record(tmp_path / "again", 13_312, "a")]) == 0
    assert (
        "Both are scored on another text of 12,288 tokens, not on the challenge's validation text."
        in capsys.readouterr().out
    )
    challenge = scored_record(tmp_path / "challenge", 40_540_160 - 1024, "b")
    silent = tmp_path / "silent.json"
    silent.write_text('{"seed_results": {"1": {"val_bpb": 1.05}, "2": {"val_bpb": 1.06}}}')
    for other in ("1019", str(silent), scored_record(tmp_path / "sp1024", 62_021_632, "c")):
        assert main(["compare", challenge, other]) == 0
        output = capsys.readouterr().out
        assert "Both are scored" not in output and "Result: " in output


def test_the_help_says_what_exit_codes_mean(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "Exit code: 0 if they were compared, even if A is not better; 2 if they cannot be" in said
