"""The overview's picture and its one next thing to do."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from app.loop import STATIONS, Loop, next_step, picture
from workbench.dataset import DatasetVersion


def version(number: str = "0.1.0", labeled: int = 6) -> DatasetVersion:
    return DatasetVersion("shapes", number, "d", "c", frames=12, labeled=labeled, boxes=18, labels=("a",))


@pytest.mark.parametrize(
    ("loop", "station"),
    [
        (Loop("s", {"new": 5}, (version(labeled=0),), 0), "review"),
        (Loop("s", {"new": 5}, (version(labeled=0),), 0, models=("yolox@1",)), "annotate"),
        (Loop("s", {"new": 5, "annotated": 2}, (version(),), 0, models=("m@1",)), "review"),
        (Loop("s", {"accepted": 8}, (version(),), 2), "version"),
        (Loop("s", {"accepted": 6}, (version(),), 0), "retrain"),
        (Loop("s", {"accepted": 6}, (version(),), 0, champion="m@1", champion_trained_on="shapes@0.1.0"), "deploy"),
        (
            Loop(
                "s",
                {"accepted": 6},
                (version("0.2.0"),),
                0,
                champion="m@1",
                deployed="m@1",
                champion_trained_on="shapes@0.1.0",
            ),
            "retrain",
        ),
        (
            Loop(
                "s",
                {"accepted": 6},
                (version(),),
                0,
                champion="m@1",
                deployed="m@1",
                champion_trained_on="shapes@0.1.0",
            ),
            "upload",
        ),
        (Loop("s", {"new": 5}, (version(),), 0, models=("m@1",), active={"annotate": (1, 5)}), "annotate"),
        (Loop("s", None, (version(),), None), "retrain"),
    ],
)
def test_the_next_thing_is_the_earliest_station_with_work(loop: Loop, station: str) -> None:
    assert next_step(loop).station == station


def test_one_frame_is_not_called_frames() -> None:
    assert next_step(Loop("s", {"annotated": 1}, (version(),), 0)).sentence.startswith("1 frame waits")


def tree_of(loop: Loop, todo: str = "") -> ElementTree.Element:
    html = picture(loop, todo, {"dataset": "shapes", "person": "a&b"})
    return ElementTree.fromstring(html[html.index("<nav") :])


def test_the_picture_has_eight_stations_in_a_ring_that_link_to_their_pages() -> None:
    links = list(tree_of(Loop("shapes", {"new": 5}, (version(),), 0), "annotate").iter("a"))
    names = [link.find("span[@class='name']").find("span[@class='number']").tail for link in links]
    # The second row runs back from right to left.
    assert names[:4] + names[:3:-1] == list(STATIONS)
    assert links[0].get("href") == "upload?dataset=shapes&person=a%26b"
    assert [link.get("class") for link in links].count("station todo") == 1


def test_text_from_outside_cannot_become_markup() -> None:
    loop = Loop(
        "shapes",
        {},
        (),
        0,
        best=("<script>x</script>", "<b>m</b>", 0.5),
        deployed="<img src=x>",
        champion="'\"&",
        champion_score=("<i>m</i>", 0.5),
        evaluations=1,
        runs=1,
    )
    assert {element.tag for element in tree_of(loop).iter()} == {"nav", "a", "span", "b", "i"}
    assert "<script" not in picture(loop)


def test_a_station_whose_part_is_down_says_so() -> None:
    assert "mongod does not answer" in picture(Loop("shapes", None, (version(),), None))
    assert "MLflow does not answer" in picture(Loop("shapes", {}, (version(),), None))


def test_before_the_parts_were_asked_no_station_says_they_are_down() -> None:
    html = picture(Loop("shapes", None, (version(),), is_partial=True))
    assert "does not answer" not in html and "asking" in html and "0.1.0" in html
