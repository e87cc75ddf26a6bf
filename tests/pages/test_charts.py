"""Charts are valid Vega-Lite and carry the numbers they were given, whatever a label is called."""

from __future__ import annotations

from app import charts

LABELS = ("RBC", "odd: label [x].y", "赤")


def rows(chart) -> list[dict]:
    """The chart's data; building it also validates it against Vega-Lite's schema."""
    (data,) = chart.to_dict()["datasets"].values()
    return data


def test_a_bar_a_label_with_the_worst_first() -> None:
    chart = charts.ap_bars({label: {"ap": 0.9 - index / 10, "ap50": 0.95} for index, label in enumerate(LABELS)})
    assert [row["ap"] for row in rows(chart)] == [0.9, 0.8, 0.7]
    assert chart.to_dict()["layer"][0]["encoding"]["y"]["sort"] == ["赤", "odd: label [x].y", "RBC"]


def test_a_confusion_counts_truth_in_rows_and_ends_with_nothing_there() -> None:
    made = rows(charts.confusion(LABELS[:2], [[8, 1, 1], [0, 5, 0], [2, 0, 0]]))
    assert len(made) == 9
    assert {"truth": "RBC", "prediction": charts.NOTHING, "boxes": 1, "share": 0.1} in made
    assert {"truth": charts.NOTHING, "prediction": "RBC", "boxes": 2, "share": 1.0} in made


def test_curves_keep_their_points() -> None:
    assert len(rows(charts.pr_curves({label: [(0.0, 1.0), (0.5, 0.8)] for label in LABELS}))) == 6
    assert rows(charts.learning({"map_50": [(1, 0.2), (2, 0.4)]}, "score"))[1] == {
        "metric": "map_50",
        "epoch": 2,
        "score": 0.4,
    }


def test_charts_of_nothing_are_drawn_too() -> None:
    for chart in (charts.ap_bars({}), charts.pr_curves({}), charts.learning({}), charts.confusion((), [])):
        assert chart.to_dict()["data"]
