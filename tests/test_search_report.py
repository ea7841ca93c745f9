"""The report of a search: what its figures and tables show, by hand."""

import math
import re

import numpy as np
import pytest

from evaluation.plots import svg
from evaluation.search_report import MOST_DOTS, Found, figures, render

NOTHING = Found("A search", {}, {}, (), (), (), {}, (), None)


def record(step, generated, evaluated, structural, restarts=0, median: float | None = 0.0):
    """A line of metrics.jsonl, where a tenth of what was generated was neither."""
    other = generated // 10
    return {
        "step": step, "seconds": 1.0 + step, "generated": generated, "invalid": 3,
        "not_finite": generated - evaluated - structural - other, "structural_hits": structural,
        "functional_hits": other, "evaluated": evaluated, "restarts": restarts, "best": -0.1,
        "median": median, "distinct": 30 - step, "redundant": 0.25, "redundant_for_updates": 0.5,
    }  # fmt: skip


def lines(panel):
    """Label -> x, y."""
    return {line.get_label(): line.get_data() for line in panel.lines}


def page(found, tmp_path):
    render(found, tmp_path / "report.html")
    return (tmp_path / "report.html").read_text()


def test_the_running_best_starts_at_the_first_program_and_lost_runs_are_no_gap():
    fitness = [0.3, -0.05, math.nan, 1.5, -0.2, math.inf, -0.1]
    ((_, figure),) = figures(NOTHING._replace(fitness=fitness))
    panel = figure.axes[0]
    drawn = lines(panel)
    programs, best = drawn["best so far"]
    np.testing.assert_array_equal(programs, range(8))
    np.testing.assert_allclose(
        best, np.expm1(np.minimum.accumulate([0, 0.3, -0.05, np.inf, 1.5, -0.2, np.inf, -0.1]))
    )
    top = panel.get_ylim()[1]
    _, dots = drawn["program tried"]
    np.testing.assert_allclose(
        dots, [top, np.expm1(-0.05), top, top, np.expm1(-0.2), top, np.expm1(-0.1)]
    )


def test_many_programs_are_thinned_but_the_best_of_all_is_seen():
    fitness = np.random.default_rng(0).normal(0.1, 0.1, 2 * MOST_DOTS + 1)
    ((_, figure),) = figures(NOTHING._replace(fitness=fitness.tolist()))
    drawn = lines(figure.axes[0])
    assert len(drawn["program tried (one in 3)"][0]) <= MOST_DOTS
    assert drawn["best so far"][1][-1] == pytest.approx(math.expm1(fitness.min()))


def test_medians_and_restarts_are_where_as_many_programs_had_been_tried():
    records = [record(0, 10, 3, 4), record(1, 30, 5, 20, 1, -0.1), record(2, 60, 9, 40, 1, None)]
    found = NOTHING._replace(records=records, fitness=[0.0] * 9)
    panel = figures(found)[0][1].axes[0]
    drawn = lines(panel)
    np.testing.assert_array_equal(drawn["median of the population"][0], [3, 5, 9])
    np.testing.assert_allclose(drawn["median of the population"][1], [0, np.expm1(-0.1), np.nan])
    np.testing.assert_array_equal(drawn["restart"][0], [5, 5])
    rates = lines(figures(found)[1][1].axes[0])
    np.testing.assert_allclose(rates["tried"], [[10, 30, 60], [3 / 10, 2 / 20, 4 / 30]])


def test_rates_are_shares_of_what_was_generated_between_records():
    records = [record(0, 10, 3, 4), record(1, 10, 3, 4), record(2, 30, 5, 20)]
    ((_, figure),) = figures(NOTHING._replace(records=records))
    hits, redundancy, variety = figure.axes
    drawn = lines(hits)
    for label, shares in (
        ("dataflow seen before", [4 / 10, 16 / 20]),
        ("updates seen before", [1 / 10, 2 / 20]),
        ("tried", [3 / 10, 2 / 20]),
        ("not finite on probes", [2 / 10, 0]),
    ):
        np.testing.assert_allclose(drawn[label], [[10, 30], shares])
    np.testing.assert_array_equal(lines(redundancy)["reach no output"][1], [0.25] * 3)
    np.testing.assert_array_equal(lines(redundancy)["never matter for an update"][1], [0.5] * 3)
    np.testing.assert_array_equal(variety.lines[0].get_ydata(), [30, 29, 28])


def test_the_funnel_has_a_panel_per_pair_with_the_programs_of_both():
    stages = {
        "search": {3: -0.3, 5: -0.2, 8: 0.1},
        "other seeds": {3: -0.1, 5: -0.2, 8: math.nan},
        "longer": {5: -0.1},
    }
    correlations = [
        ("search", "other seeds", 0.5, 1.0, 3),
        ("other seeds", "longer", math.nan, math.nan, 1),
    ]
    found = NOTHING._replace(stages=stages, correlations=correlations, winner=5)
    ((_, figure),) = figures(found)
    first, second = figure.axes
    assert first.get_title(loc="left") == "Spearman 0.50, 3 programs"
    assert second.get_title(loc="left") == "Spearman -, 1 programs"
    assert (first.get_xlabel(), first.get_ylabel()) == ("search", "other seeds")
    (dots,) = (line for line in first.lines if line.get_marker() == "o")
    (winner,) = (line for line in first.lines if line.get_marker() == "*")
    np.testing.assert_allclose(dots.get_xdata(), np.expm1([-0.3, -0.2, 0.1]))
    np.testing.assert_allclose(dots.get_ydata()[:2], np.expm1([-0.1, -0.2]))
    assert 0.0 < dots.get_ydata()[2] <= 1.0  # lost, at the edge
    np.testing.assert_allclose(np.ravel(winner.get_data()), np.expm1([-0.2, -0.2]))
    svg(figure)


def test_texts_are_escaped_and_nothing_is_fetched(tmp_path):
    bad = "<script src='http://example.org'>&$x$"
    found = Found(
        bad, {bad: bad}, {bad: bad}, [record(0, 10, 3, 4)], [0.1, -0.1], [(0, bad, bad, 0.0)],
        {bad: {0: 0.0}, bad + "2": {0: 0.1}}, [(bad, bad + "2", 1.0, 1.0, 1)], 0,
    )  # fmt: skip
    text = page(found, tmp_path)
    assert "<script" not in text
    assert "&lt;script" in text
    tags = " ".join(re.findall(r"<[^>]*>", text))
    assert "http" not in tags
    assert not re.search(r"(?:src|href)=[\"']?(?!#)[^\"'>]", tags)
    assert not re.search(r"url\((?!#)", text)
    assert "@import" not in text


@pytest.mark.parametrize(
    "found",
    [
        NOTHING,
        NOTHING._replace(programs={"start": "def train(): ..."}, fitness=[math.nan]),
        NOTHING._replace(fitness=[math.inf, math.nan], records=[record(0, 4, 1, 1, 0, math.nan)]),
        NOTHING._replace(records=[record(0, 10, 3, 4), record(1, 20, 5, 9)], fitness=[0.1] * 5),
        NOTHING._replace(stages={"search": {0: 0.1}}, winner=0),
        NOTHING._replace(stages={"search": {0: 0.1}, "other seeds": {1: 0.1}}),
        NOTHING._replace(stages={"search": {0: math.inf}, "other seeds": {0: math.nan}}, winner=0),
        NOTHING._replace(lineage=[(0, "start", "", math.nan), (4, "evaluated", "x", math.inf)]),
    ],
)
def test_a_search_that_has_hardly_begun_has_a_report(found, tmp_path):
    text = page(found, tmp_path)
    assert text.count("<svg") == len(figures(found))
    assert text.endswith("</body></html>\n")


def rows(text):
    """Class and cells of the lineage's rows."""
    table = text[text.index("how its loss is known") :]
    return [
        (kind, re.findall("<td>(.*?)</td>", cells))
        for kind, cells in re.findall("<tr class='(.*?)'>(.*?)</tr>", table)
    ]


def test_a_short_lineage_is_told_in_full_with_neutral_steps_marked(tmp_path):
    lineage = [
        (0, "start", "", 0.0),
        (12, "structural", "insert 1: v1 = g", 0.0),
        (1500, "evaluated", "delete 3", math.log(0.9)),
        (1600, "evaluated", "delete 4", math.log(0.95)),
        (1700, "functional", "delete 2", math.nan),
    ]
    assert rows(page(NOTHING._replace(lineage=lineage), tmp_path)) == [
        ("lower", ["0", "", "first program", "0%"]),
        ("neutral", ["12", "insert 1: v1 = g", "dataflow seen before", "0%"]),
        ("lower", ["1,500", "delete 3", "tried", "\N{MINUS SIGN}10.00%"]),
        ("other", ["1,600", "delete 4", "tried", "\N{MINUS SIGN}5.00%"]),
        ("other", ["1,700", "delete 2", "updates seen before", "lost"]),
    ]


def test_of_a_long_lineage_the_improving_steps_are_told(tmp_path):
    fitness = np.zeros(70)
    fitness[20:] = -0.1  # a step down
    fitness[30] = 0.2  # and one up, which the next makes good
    fitness[50:] = -0.3
    lineage = [(i, "evaluated", "", x) for i, x in enumerate(fitness)]
    text = page(NOTHING._replace(lineage=lineage), tmp_path)
    assert [cells[0] for _, cells in rows(text)] == ["0", "20", "50", "69"]
    assert "Left out are 64 of them, and 2 other steps" in text
